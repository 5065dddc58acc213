"""What a GPU owner measures in one command: a full-size evaluation at tiny width, the commands, their targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rgbench.cli.main import app
from rgbench.core.errors import RgbenchError
from tests.unit.test_bench_page import step, value
from tests.unit.test_bench_parts import TINY
from tools.bench import evaluation, on_gpu
from tools.bench.page import page


@pytest.mark.long
def test_an_evaluation_is_estimated_for_30000(tmp_path):
    row = evaluation.measure_full_size(TINY, tmp_path, num=8, metrics=["fid", "hps"], device="cpu", dtype="float32")
    half, whole = row["rounds"]
    assert (half["images"], whole["images"], row["images"]) == (4, 8, 8)
    assert 0 < row["share_outside_generation"] < 1
    assert row["estimated"] == evaluation._drawn_on(half, whole, 30_000)


def test_a_line_is_drawn_through_two_sizes():
    half, whole = evaluation._split(100, 12.0, 5.0), evaluation._split(200, 14.0, 10.0)
    found = evaluation._drawn_on(half, whole, 1000)
    assert found["seconds"] == pytest.approx(30.0) and found["generation_sec"] == pytest.approx(50.0)


@pytest.mark.parametrize("command", on_gpu.COMMANDS, ids=" ".join)
def test_every_command_is_one_that_rgbench_takes(command, tmp_path):
    """Its words are understood to the last: what is refused is a device that no option names."""
    done = CliRunner().invoke(app, [*on_gpu.words(command, tmp_path, "cuda"), "--device", "abacus"])
    assert done.exit_code == 2 and "abacus" in done.output


def test_one_that_fails_leaves_the_others(tmp_path):
    said: list[str] = []
    with pytest.raises(RgbenchError, match="1 of 2 failed, .*: rgbench bench nonsense --device cpu"):
        on_gpu.run_all((("nonsense",), ("levers", "--help")), tmp_path, "cpu", said.append)
    assert len(said) == 2 and said[1].startswith("[2/2] rgbench bench levers --help")


MACHINE = {"device": "a GPU", "device_type": "cuda", "cores": 16, "threads": 16, "versions": {"torch": "2.15"}}


def write(folder: Path, name: str, **content) -> None:
    head = {"schema_version": 1, "command": f"rgbench bench {name}", "machine": MACHINE, "preset": "sd21-base"}
    (folder / f"{name}.json").write_text(json.dumps(head | content))


def option(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1] if name in command else ""


def train_steps(folder: Path, **row) -> None:
    """A file for each of the commands that measure steps."""
    for command in on_gpu.COMMANDS:
        if command[0] == "train-step":
            settings = [word for word in command if word.startswith("train.")]
            size = 4 if "train.batch_size=4" in settings else 16
            head = {"method": option(command, "--method"), "dtype": "bfloat16", "batch_size": size}
            name = f"train-step-{option(command, '--tag')}"
            write(folder, name, what="train-step", overrides=settings, rounds=3, rows=[head | row])


def targets(folder: Path) -> list[list[str]]:
    """Cells of the targets that need a step on a GPU."""
    lines = page(folder).split("## Targets")[1].split("Rows that need")[0].splitlines()
    wanted = ("step on a GPU", "low-memory")
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if any(word in line for word in wanted)]


def test_each_command_has_a_file_of_its_own():
    files = [(*command[: 2 if command[0] == "growth" else 1], option(command, "--tag")) for command in on_gpu.COMMANDS]
    assert len(set(files)) == len(files)


def test_steps_of_one_method_a_command_fill_their_targets(tmp_path):
    both = {"rgbench": value(1.6), "rgbench, latents cached": value(1.7)}
    kinds = {"plain": 20e9, "rgbench": 12e9, "rgbench, latents cached": 12e9}
    train_steps(tmp_path, ratio_to_plain=both, steps={name: step(1.0) for name in kinds}, parts=None, square=9,
                matmul_flop_per_sec=value(1e11), copy_bytes_per_sec=value(1e10), beside_busy_process=None,
                shapes={"flop_per_sec": 8e10, "share_covered": 0.9, "num": 3, "heaviest": []},
                peak_memory={name: {"bytes": bytes_, "what": "CUDA"} for name, bytes_ in kinds.items()})  # fmt: skip
    found = targets(tmp_path)
    assert [name for name, *_ in found] == [
        "lcd step on a GPU, SD2.1-base shape, bf16, × plain",
        "rg_lcd step on a GPU, SD2.1-base shape, bf16, batch 4, × plain",
        "lrm step on a GPU, SD2.1-base shape, bf16, × plain",
        "lcd step, low-memory settings, peak × plain",
        "rg_lcd step, batch 4, low-memory settings, peak × plain",
        "lrm step, low-memory settings, peak × plain",
        "RG-LCD step at batch 4, low-memory settings, peak",
        "LCD step on a GPU, share of the matmul rate",
    ]
    shown = [*["1.60 from images, 1.70 from a latents cache"] * 3, *["0.60"] * 3, "12.0 GB"]
    assert [cells[2] for cells in found[:-1]] == shown and {cells[3] for cells in found} == {"holds"}


def test_a_target_whose_step_does_not_fit_is_missed(tmp_path):
    train_steps(tmp_path, does_not_fit="CUDA out of memory.")
    assert [cells[2:] for cells in targets(tmp_path)] == [["does not fit", "**misses**"]] * 8
    assert "| rg_lcd | batch 4 | does not fit | – |" in page(tmp_path)


@pytest.mark.parametrize(("outside", "mark"), [(0.15, "holds"), (0.16, "**misses**")])
def test_30000_images_are_held_to_their_limit(outside, mark, tmp_path):
    times = {"images": 512, "seconds": 10.0, "generation_sec": 8.0, "times_generation": 1.25,
             "share_outside_generation": 0.2}  # fmt: skip
    estimated = times | {"images": 30_000, "share_outside_generation": outside}
    row = times | {"images": 1024, "metrics": ["fid"], "rounds": [times, times], "estimated": estimated}
    write(tmp_path, "eval", what="eval", rows=[row])
    text = page(tmp_path)
    shown = f"{100 * outside:.0f} %, drawn on from 512 and 1,024 images"
    assert f"| evaluation of 30,000 images on one GPU, outside generation | ≤ 15 % | {shown} | {mark} |" in text
    assert f"| 30000, drawn on from both | 10.0 | 8.0 | 1.25 | {100 * outside:.0f} % |" in text
