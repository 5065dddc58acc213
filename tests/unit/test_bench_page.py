"""The page holds what the files say, and says so where they say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rgbench.cli.main import app
from tests.conftest import ROOT
from tools.bench.growth_tables import table
from tools.bench.page import page

MACHINE = {"device": "a CPU", "device_type": "cpu", "threads": 2, "cores": 2, "versions": {"torch": "2.15"}}


def value(median: float) -> dict:
    return {"median": median, "low": median * 0.9, "high": median * 1.1, "num": 3}


def step(seconds: float) -> dict:
    return {"seconds": value(seconds), "images_per_sec": 32 / seconds, "flops": 46e9, "bytes": 3e9, "operators": 9,
            "floor_arithmetic_sec": 0.45, "floor_traffic_sec": 0.3, "share_of_matmul_rate": 0.45 / seconds,
            "share_of_floor": 0.45 / seconds}  # fmt: skip


def write(folder: Path, name: str, **content) -> None:
    head = {"schema_version": 1, "command": f"rgbench bench {name}", "machine": MACHINE}
    (folder / f"{name}.json").write_text(json.dumps(head | content))


def train_step(folder: Path, ratio: float, overrides: list[str] | None = None, name: str = "train-step-x") -> None:
    steps = {"plain": step(1.0), "rgbench": step(0.5), "rgbench, latents cached": step(0.4)}
    row = {
        "method": "lcd", "weights": "shipped", "batch_size": 32, "dtype": "float32", "resolution": 64, "square": 9,
        "matmul_flop_per_sec": value(1e11), "copy_bytes_per_sec": value(1e10), "steps": steps,
        "shapes": {"flop_per_sec": 8e10, "share_covered": 0.9, "num": 3, "heaviest": []},
        "ratio_to_plain": {"rgbench": value(ratio), "rgbench, latents cached": value(ratio)},
        "peak_memory": {name: {"bytes": 2**30, "what": "RSS"} for name in steps},
        "beside_busy_process": {"idle_sec": value(0.5), "busy_sec": value(0.75), "times_idle": value(1.5)},
        "parts": {"teacher": 0.3, "student": 0.1},
    }  # fmt: skip
    write(folder, name, what="train-step", preset="benchtop", overrides=overrides or [], rounds=3, rows=[row])


def test_nothing_measured_is_said(tmp_path):
    text = page(tmp_path)
    assert text.count("not measured") >= 20 and "holds" not in text and "was not counted" in text


def test_figures_are_the_files(tmp_path):
    train_step(tmp_path, 1.4)
    text = page(tmp_path)
    line = "| lcd step on the CPU, benchtop, × plain | ≥ 1.3 | 1.40 from images, 1.40 from a latents cache | holds |"
    assert line in text
    share = "90 % from images, 112 % from a latents cache"
    assert f"| LCD step, benchtop, share of the matmul rate | ≥ 50 % | {share} | holds |" in text
    assert "| lcd | rgbench | 0.500 [0.450, 0.550] | 1.40 [1.26, 1.54] | 64.0 |" in text
    assert "| teacher | 0.300 s, 75.0 % |" in text and "`rgbench bench train-step-x`" in text
    assert "| lcd step beside one busy process, × its idle time | ≤ 2.0 | 1.50 | holds |" in text


def test_a_miss_is_called_one(tmp_path):
    train_step(tmp_path, 1.1)
    text = page(tmp_path)
    assert "1.10 from images, 1.10 from a latents cache | **misses** |" in text
    why = text.split("### What the misses come from")[1].split("##")[0]
    assert "lcd step: it needs 1.00 times less arithmetic than the plain step from images" in why
    assert "cache, less than the 1.3 aimed at" in why and "webdataset" not in why and "Share of the matmul" not in why


def test_reasons_are_read_from_the_files(tmp_path):
    train_step(tmp_path, 1.4)
    assert "What the misses come from" not in page(tmp_path)
    row = {"subject": "demo", "seconds": 800.0, "cpu_sec": 999.0, "peak_rss_bytes": 2**30,
           "stages": {"train lcd": 500.0, "end": 300.0}}  # fmt: skip
    write(tmp_path, "whole-demo", what="whole", preset="demo", overrides=[], rows=[row])
    assert "- demo: its longest stage, train lcd, takes 500 s of 800;" in page(tmp_path)


def test_settings_of_ones_own_meet_no_target(tmp_path):
    train_step(tmp_path, 9.0, ["train.batch_size=8"], "train-step-batch8")
    text = page(tmp_path)
    assert "9.00 from images" not in text and "train.batch_size=8" in text


def test_full_size_costs_follow_from_the_count(tmp_path):
    row = {"method": "lcd", "batch_size": 16, "dtype": "bfloat16", "resolution": 512, "student_parameters": 10**9,
           "proxy_parameters_learning": 0, "held_bytes": {"networks": 10e9, "learning": 12e9},
           "steps": {"plain": {"flops": 98.9e12, "bytes": 1, "operators": 1},
                     "rgbench": {"flops": 49.45e12, "bytes": 1, "operators": 1}}}  # fmt: skip
    made = {"method": "generate", "steps_per_image": 4, "resolution": 512, "flops": 3.6e12}
    write(tmp_path, "count-x", what="count", preset="sd21-base", overrides=[], rows=[row, made])
    text = page(tmp_path)
    assert "| lcd | 16 | 98.9 | 49.5 | 3.09 | 1000 M | 0.050 | 22.0 |" in text
    # 4 GB of gradients, 2·63/64 of them sent at 50 GB/s, beside 0.05 s / 0.45 of arithmetic
    assert "sends 7.88 GB from each GPU, 0.16 s" in text and "59 % of a step" in text
    # a million images of 3.6 TFLOP at 35 % of 989 TFLOP/s
    assert "2.9 GPU hours" in text and "bottleneck on GPUs is generation: 2.89 GPU hours against 0.0033" in text
    assert "takes 59 % of a step at most, if nothing overlaps: the bottleneck is the exchange" in text
    assert "24 GB" not in text.split("## How cost grows")[1]  # said of RG-LCD alone


@pytest.mark.parametrize(("learning", "said"), [(14e9, "cannot fit, at any batch, a card of 24 GB; adapters"),
                                                (13e9, "leaves room for activations on a card of 24 GB.")])  # fmt: skip
def test_what_is_held_decides_about_a_small_card(learning, said, tmp_path):
    row = {"method": "rg_lcd", "batch_size": 16, "dtype": "bfloat16", "resolution": 512, "student_parameters": 10**9,
           "proxy_parameters_learning": 0, "held_bytes": {"networks": 10.5e9, "learning": learning},
           "steps": {name: {"flops": 5e13, "bytes": 1, "operators": 1} for name in ("plain", "rgbench")}}  # fmt: skip
    write(tmp_path, "count-x", what="count", preset="sd21-base", overrides=[], rows=[row])
    assert said in page(tmp_path)


def test_the_demos_shorter_training_is_not_the_recipes(tmp_path):
    row = {"subject": "demo", "seconds": 800.0, "cpu_sec": 999.0, "peak_rss_bytes": 2**30,
           "stages": {"train lrm": 299.6, "end": 500.4}}  # fmt: skip
    write(tmp_path, "whole-demo", what="whole", preset="demo", overrides=[], rows=[row])
    assert "| `recipes/lrm.yaml` whole | ≤ 300 s | not measured |" in page(tmp_path)
    whole(tmp_path, "lrm", 301.0, [])
    assert "| `recipes/lrm.yaml` whole | ≤ 300 s | 301 s | **misses** |" in page(tmp_path)


def whole(folder: Path, subject: str, seconds: float, overrides: list[str]) -> None:
    row = {"subject": subject, "seconds": seconds, "cpu_sec": 99.0, "peak_rss_bytes": 2**30,
           "stages": {"start": 4.0, "end": seconds - 4.0}}  # fmt: skip
    write(folder, f"whole-{subject}", what="whole", preset=subject, overrides=overrides, rows=[row])


def test_whole_runs_have_their_limits(tmp_path):
    whole(tmp_path, "lrm", 301.0, [])
    whole(tmp_path, "demo", 301.0, [])
    text = page(tmp_path)
    assert "| `recipes/lrm.yaml` whole | ≤ 300 s | 301 s | **misses** |" in text
    assert "| `make demo` after install | ≤ 720 s | 301 s | holds |" in text
    assert "| start | 4.0 |" in text and "| **together** | 301.0 |" in text and "took 1.00 GiB" in text
    whole(tmp_path, "demo", 1.0, ["DEMO_NUM=8"])
    assert "| `make demo` after install | ≤ 720 s | not measured |" in page(tmp_path)


@pytest.mark.parametrize(("times", "mark"), [(2.5, "holds"), (2.51, "**misses**")])
def test_an_evaluation_says_of_how_many_images(times, mark, tmp_path):
    row = {"images": 2048, "metrics": ["fid"], "seconds": 20.0, "generation_sec": 8.0, "times_generation": times,
           "share_outside_generation": 0.6}  # fmt: skip
    write(tmp_path, "eval", what="eval", preset="benchtop", rows=[row])
    text = page(tmp_path)
    assert f"× generation | ≤ 2.5 | {times:.2f} of 2,048 images | {mark} |" in text
    assert ("what each metric costs was not measured" in text) == (mark != "holds")


def test_the_committed_page_is_the_files(tmp_path):
    committed = ROOT / "docs" / "performance.md"
    words = ["bench", "table", str(ROOT / "results" / "bench"), "--out"]
    assert CliRunner().invoke(app, [*words, str(committed), "--check"]).exit_code == 0
    other = tmp_path / "page.md"
    other.write_text("another")
    assert CliRunner().invoke(app, [*words, str(other), "--check"]).exit_code == 1


@pytest.mark.parametrize(
    "name",
    [
        "train-step",
        "levers",
        "generate",
        "eval",
        "fid",
        "data",
        "start",
        "count",
        "whole",
        "gpu",
        "growth",
        "metrics",
        "compile",
        "table",
    ],
)
def test_every_verb_has_help(name):
    assert CliRunner().invoke(app, ["bench", name, "--help"]).exit_code == 0


def test_a_line_without_a_cell_for_each_head_is_no_table():
    assert table(("", "b"), [("lcd", 1)]) == "|  | b |\n| --- | ---: |\n| lcd | 1 |\n"
    with pytest.raises(ValueError, match="3 cells under 2 heads"):
        table(("", "b"), [("lcd", 1, 2)])
