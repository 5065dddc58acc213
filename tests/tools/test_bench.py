"""Benchmarks at tiny width: they count as written down, compare like with like, and keep what they measured."""

from __future__ import annotations

import gc
import inspect
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from webdataset.tariterators import tar_file_expander

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.train.recipe import load_recipe
from rgbench.train.rg_lcd import RGLCD
from tests.conftest import ROOT
from tools.bench import __main__ as cli
from tools.bench import measure, processes, timing
from tools.bench.measure import CACHED, OURS, PLAIN, Contenders
from tools.bench.networks import HeldImages, Shape, random_models, random_proxy, random_reward, random_trainer
from tools.bench.page import page, table
from tools.bench.timing import DOES_NOT_FIT

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TINY = Shape(
    unet={
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
    },
    vae={
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.18215,
    },
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
    },
    clip={
        "embed_dim": 12,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": TEXT,
    },
    proxy={"image_size": 8, "patch_size": 4, "layers": 1, "width": 16, "head_width": 8},
)
CPU = torch.device("cpu")
SETTINGS = ["train.batch_size=2", "train.dtype=float32", "lcd.time_cond_proj_dim=16", "train.num_workers=0"]
WORDS = "CUDA out of memory. Tried to allocate 20.00 MiB."


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks in place of full-size ones, on a machine whose rate is measured in no time."""
    monkeypatch.setattr(cli, "_shape", lambda preset: None if preset == "benchtop" else TINY)
    monkeypatch.setitem(timing.SQUARE, "cpu", 64)


def contenders(method: str, folder: Path, *settings: str, **train: object) -> Contenders:
    words = [*SETTINGS, "train.gradient_checkpointing=false", *(f"train.{key}={value}" for key, value in train.items())]
    recipe = load_recipe(f"sd21/{method}", [*words, *settings])
    torch.manual_seed(0)
    return Contenders(random_trainer(TINY, recipe, CPU), HeldImages(TINY.side, 4), folder)


def run(*words: str | Path) -> str:
    done = CliRunner().invoke(cli.app, [*map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_flops_are_counted_as_written_down() -> None:
    linear, attention = nn.Linear(5, 7), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(2, 4, 8)
    # forward 2·3·5·7; backward the same for the input and again for the weight
    assert timing.count_flops(lambda: linear(x).sum().backward()) == 3 * (2 * 3 * 5 * 7)
    with torch.no_grad():  # where evaluation mode would fuse everything into one operator without a formula
        found = timing.count_flops(lambda: attention(y, y, y, need_weights=False))
    assert found == 4 * (2 * 8 * 8 * 8) + 2 * (2 * 2 * 2 * 4 * 4 * 4)  # projections and scores
    assert torch.backends.mha.get_fastpath_enabled()
    conv = nn.Conv2d(6, 10, 3, padding=1, bias=False)
    assert timing.count_flops(lambda: conv(torch.zeros(2, 6, 4, 5))) == 2 * (2 * 4 * 5) * (6 * 9) * 10


def test_contenders_take_turns_and_ratios_are_taken_pair_by_pair() -> None:
    order: list[str] = []
    seconds = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    assert "".join(order) == "ab" + "ababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    found = timing.ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0])
    assert found["median"] == 2.0 and found["low"] <= 2.0 <= found["high"] <= 4.0 and found["num"] == 3
    assert timing.spread([5.0]) == {"median": 5.0, "low": 5.0, "high": 5.0, "num": 1}
    assert 1e3 < timing.matmul_rate(CPU, "float32") < 1e15


def test_random_parts_fit_each_other() -> None:
    models, reward, proxy = random_models(TINY, CPU), random_reward(TINY, CPU), random_proxy(TINY, CPU)
    images = models.decode(torch.randn(2, *models.latent_shape))
    assert images.shape == (2, 3, TINY.side, TINY.side) and reward(images, ["a", "b"]).shape == (2,)
    proxy.check_fits(models.latent_shape, models.scaling_factor, "random")
    assert models.encode_prompts(["a red circle"]).shape == (1, 77, 16)
    tokens = models.tokenizer(["A red circle"], padding="max_length", max_length=77)["input_ids"][0]
    assert tokens[:5] == [49406, 320, 736, 7117, 49407] and set(tokens[5:]) == {0}


def test_a_step_needs_less_arithmetic_than_the_plain_one(tmp_path: Path) -> None:
    found = contenders("lrm", tmp_path, "proxy.trainable.text_layers=1")
    row = measure.step(found.trainer, found.source, tmp_path, rounds=1)
    json.dumps(row, allow_nan=False)
    plain, ours, cached = (row["steps"][name] for name in (PLAIN, OURS, CACHED))
    assert cached["flops"] < ours["flops"] < plain["flops"] and ours["peak_bytes"] is None
    assert ours["share_of_matmul_rate"] == pytest.approx(
        ours["flops"] / row["matmul_flop_per_sec"]["median"] / ours["seconds"]["median"]
    )
    assert row["ratio_to_plain"][OURS]["median"] > 0


def test_the_plain_step_recomputes_no_activations(tmp_path: Path) -> None:
    usual, saving = (contenders("lcd", tmp_path, f"train.gradient_checkpointing={on}") for on in ("false", "true"))
    before, after = ([timing.count_flops(c.work[name]) for name in (PLAIN, OURS)] for c in (usual, saving))
    assert after[0] == before[0] and after[1] > before[1]


def test_each_step_learns_and_its_memory_is_measured_without_the_others_moments(tmp_path: Path, monkeypatch) -> None:
    """As on a GPU: autocast over float32 weights; student and proxy change in every contender's step."""
    found = contenders("lrm", tmp_path, "proxy.trainable.text_layers=1", dtype="bfloat16")
    learning = [*found.trainer.student.parameters(), *found.trainer.proxy_parameters]

    def states() -> dict[str, int]:
        kinds = {PLAIN: found.plain.optimisers, OURS: found.loop.updater.optimisers}
        return {name: sum(len(o.state) for o in optimisers.values()) for name, optimisers in kinds.items()}

    seen = []

    def watched(device: torch.device, step) -> int:
        before = [p.detach().clone() for p in learning]
        seen.append(states())
        step()
        changed = [not torch.equal(a, b) for a, b in zip(before, learning, strict=True)]
        assert any(changed[: -len(found.trainer.proxy_parameters)]), "the student"
        assert any(changed[-len(found.trainer.proxy_parameters) :]), "the proxy"
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in learning)
        return 1

    monkeypatch.setattr(measure, "peak_bytes", watched)
    assert found.peak_bytes() == {PLAIN: 1, OURS: 1, CACHED: 1}
    assert [state[OURS] == 0 for state in seen] == [True, False, False]
    assert [state[PLAIN] == 0 for state in seen] == [False, True, True]


def test_a_step_that_does_not_fit_keeps_the_other_rows_and_frees_the_memory(tmp_path: Path, monkeypatch) -> None:
    alive: list[weakref.ref] = []
    make = measure.trainer_of

    def watched(*words):
        trainer, source = make(*words)
        alive.append(weakref.ref(trainer.student))
        return trainer, source

    def too_large(*_):
        raise torch.OutOfMemoryError(f"{WORDS}\nSee the documentation")

    monkeypatch.setattr(measure, "trainer_of", watched)
    monkeypatch.setattr(RGLCD, "step", too_large)
    words = ["step", *SETTINGS, "--preset", "sd21-base", "--method", "rg_lcd,lcd", "--rounds", "1", "--device", "cpu"]
    gc.disable()  # its own schedule would hide what is left alive
    try:
        file = Path(run(*words, "--out", tmp_path).strip())
    finally:
        gc.enable()
    assert [network() for network in alive] == [None, None]
    content = json.loads(file.read_text())
    rg_lcd, lcd = content["rows"]
    assert rg_lcd == {"method": "rg_lcd", "batch_size": 2, "dtype": "float32", DOES_NOT_FIT: WORDS}
    assert lcd["steps"][OURS]["flops"] > 0 and content["machine"]["versions"]["torch"] == torch.__version__
    text = page(tmp_path)
    assert "| rg_lcd, batch 2, float32 | does not fit | – |" in text and "| lcd, batch 2, float32 | plain | " in text


def test_both_samplers_give_the_same_images(tmp_path: Path) -> None:
    words = ["generate", "--preset", "sd21-base", "--batch-size", "2", "--rounds", "1", "--device", "cpu"]
    row = json.loads(Path(run(*words, "--out", tmp_path).strip()).read_text())["rows"][0]
    assert row["difference"]["share_within_2_of_255"] == 1.0 and row["difference"]["largest"] < 1e-4
    assert row["difference"]["psnr_db"] > 60 and row["images_per_sec"]["diffusers"] > 0
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    b[0, 0, 0, 0] = 0.5
    found = measure.differences(a, b)
    assert found["largest"] == 0.5 and found["share_within_2_of_255"] == pytest.approx(11 / 12)
    assert found["psnr_db"] == pytest.approx(-10 * torch.log10(torch.tensor(0.25 / 12)).item())


def test_two_sizes_are_drawn_on() -> None:
    half, whole = measure._split(100, 12.0, 5.0), measure._split(200, 14.0, 10.0)
    assert measure.drawn_on(half, whole, 1000) == {
        "images": 1000, "seconds": pytest.approx(30.0), "generation_sec": pytest.approx(50.0),
        "times_generation": pytest.approx(0.6)}  # fmt: skip


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark of its own process leaves changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"])


@pytest.mark.long
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("preset", ["benchtop", "sd21-base"])
def test_an_evaluation_is_split(preset: str, tmp_path: Path) -> None:
    words = ["eval", "--preset", preset, "--num", "8", "--metric", "fid,hps", "--device", "cpu", "--out", tmp_path]
    row = json.loads(Path(run(*words).strip()).read_text())["rows"][0]
    assert [each["images"] for each in row["rounds"]] == ([8] if preset == "benchtop" else [4, 8])
    assert row["images"] == 8 and row["times_generation"] > 1
    assert ("estimated" in row) == (preset != "benchtop")


# Prints its options, and writes what diffusers' script writes.
SCRIPT = """
import sys
from pathlib import Path
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:-2])
assert sys.argv[-2] == "--output_dir" and options["max_train_steps"] == "1" and options["train_batch_size"] == "4"
assert options["train_shards_path_or_url"].endswith(".tar") and options["loss_type"] == "huber"
length, files = "max_length=77", "tar_file_expander(streams, handler=handler)"
(Path(sys.argv[0]).parent / "ran").write_text(length)
"""


@pytest.mark.long
def test_the_script_takes_turns_with_ours(tmp_path: Path) -> None:
    copy = tmp_path / "train_lcm_distill_sd_wds.py"
    copy.write_text(SCRIPT)
    seconds = processes.script(copy, tmp_path / "runs", 1, 1, ["train.batch_size=4", "train.sample_every=0"], print)
    assert seconds["rgbench"][0] > seconds["diffusers"][0] > 0
    assert (tmp_path / "runs" / "ran").read_text() == processes.OWN_LENGTH  # the benchtop's tokenizer is shorter
    assert (tmp_path / "runs" / "rgbench-0" / "out" / "run.json").is_file()


def test_the_script_is_changed_where_it_would_not_run_and_another_file_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "train_lcm_distill_sd_wds.py"
    copy.write_text(SCRIPT)
    text = processes.adapted(copy)
    assert "max_length=tokenizer.model_max_length" in text and "(streams, eof_value=None, handler=handler)" in text
    assert "eof_value" in inspect.signature(tar_file_expander).parameters, "what webdataset calls it"
    assert len(text.splitlines()) == len(SCRIPT.splitlines()) and "max_length=77" not in text
    copy.write_text(SCRIPT.replace("max_length=77", "77"))
    for other in (copy, tmp_path / "other.py"):
        with pytest.raises(UsageError, match=rf"{other.name}: is not diffusers'"):
            processes.script(other, tmp_path / "runs", 1, 1, [], print)


MAKEFILE = """
install:
	touch installed
demo:
	test -f installed && test -z "$$(ls $$XDG_CACHE_HOME 2>/dev/null)"
	for r in lcd lrm; do mkdir -p $(DEMO)/runs/$$r-s0 && touch $(DEMO)/runs/$$r-s0/run.json || exit; done
	sleep $(SLOW)
"""


def test_students_per_hour_of_the_demo(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    row = json.loads(Path(run("students", "demo", "SLOW=0.3", "--out", "out").strip()).read_text())["rows"][0]
    assert row["students"] == 2 and 0.3 < row["seconds"] == row["stages"]["make demo"]["seconds"]
    assert row["students_per_hour"] == pytest.approx(2 * 3600 / row["seconds"])
    (tmp_path / "Makefile").write_text("install:\ndemo:\n\t@echo out of paper; exit 3\n")
    with pytest.raises(RgbenchError, match="make demo .*exit code 2: (.|\n)*out of paper"):
        processes.students("demo", tmp_path / "again", [], 8)
    with pytest.raises(UsageError, match="did you mean 'lrm'"):
        processes.students("lrn", tmp_path, [], 8)


@pytest.mark.long
def test_students_per_hour_of_a_recipe(tmp_path: Path) -> None:
    row = processes.students("lcd", tmp_path, ["train.steps=2", "train.batch_size=4", "train.sample_every=0"], 8)
    assert row["students"] == 1 and list(row["stages"]) == ["train", "eval"]
    assert all(stage["cpu_sec"] > 1 for stage in row["stages"].values())


def test_gpu_commands_are_understood_and_one_that_fails_leaves_the_others(tmp_path: Path) -> None:
    for command in processes.GPU_COMMANDS:  # to the last word: what is refused is a device that does not exist
        done = CliRunner().invoke(cli.app, [*command, "--device", "tpu"])
        assert done.exit_code == 2 and "'tpu' is not one of" in done.output, command
    names = [
        (command[0], command[command.index("--tag") + 1]) for command in processes.GPU_COMMANDS if "--tag" in command
    ]
    assert len(set(names)) == len(names) == len(processes.GPU_COMMANDS) - 1, "a file of its own for each"
    said: list[str] = []
    with pytest.raises(RgbenchError, match="1 of 2 failed, .*: nonsense"):
        processes.gpu(tmp_path, "cpu", said.append, (("nonsense",), ("step", "--help")))
    assert len(said) == 2


@pytest.mark.parametrize("preset", cli.PRESETS)
def test_the_plain_step_takes_the_packaged_recipes(preset: str) -> None:
    for name in cli.METHODS:
        recipe = cli._recipe_of_step(preset, name, ["train.batch_size=4"])
        assert recipe.train.batch_size == 4 and (name == "lcd" or recipe.guidance.scale is not None)


def test_unknown_names_are_refused() -> None:
    for words, hint in ((["step", "--preset", "benchtp"], "did you mean 'benchtop'"),
                        (["step", "--method", "ldc"], "--method ldc"),
                        (["step", "train.compile=true"], "train.compile")):  # fmt: skip
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 2 and hint in done.stderr


MACHINE = {"device": "a CPU", "device_type": "cpu", "threads": 2, "cores": 2, "versions": {"torch": "2.15"}}


def write(folder: Path, name: str, device: str = "cpu", **content: object) -> None:
    head = {
        "schema_version": 1,
        "command": f"python -m tools.bench {name}",
        "machine": MACHINE | {"device_type": device},
    }
    (folder / f"{name}.json").write_text(json.dumps(head | content))


def value(median: float) -> dict:
    return {"median": median, "low": median * 0.9, "high": median * 1.1, "num": 3}


def write_step(folder: Path, ratio: float, overrides: tuple[str, ...] = (), peak: float | None = None, **place) -> None:
    def one(seconds: float, peak_bytes: float | None) -> dict:
        return {"seconds": value(seconds), "images_per_sec": 32 / seconds, "flops": 46e9, "peak_bytes": peak_bytes,
                "share_of_matmul_rate": 0.45 / seconds}  # fmt: skip

    row = {
        "method": "lcd", "batch_size": 32, "dtype": "float32", "matmul_flop_per_sec": value(1e11),
        "steps": {PLAIN: one(1.0, peak and 2**30), OURS: one(0.5, peak and peak * 2**30), CACHED: one(0.4, peak)},
        "ratio_to_plain": {OURS: value(ratio), CACHED: value(ratio - 0.1)},
    }  # fmt: skip
    what = {"what": "step", "preset": "benchtop", "overrides": list(overrides), "rows": [row]} | place
    write(folder, f"step-{len(list(folder.iterdir()))}", **what)


def test_targets_are_held_to_the_files_of_their_own_settings(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert text.count("| not measured |") == 20 and "| holds |" not in text
    write_step(tmp_path, 9.0, ("train.batch_size=8",))
    name = "lcd step on the CPU, benchtop, × plain | ≥ 1.3"
    assert f"| {name} | not measured |  |" in page(tmp_path)
    write_step(tmp_path, 1.4)
    text = page(tmp_path)
    assert f"| {name} | 1.40 from images, 1.30 from cached latents | holds |" in text
    share = "90 % from images, 112 % from cached latents"
    assert f"| LCD step, benchtop, share of the matmul rate | ≥ 50 % | {share} | holds |" in text
    line = "rgbench | 0.500 [0.450, 0.550] | 1.40 [1.26, 1.54] | 64.0 | 46.0 | 1.00 | 90 % | – |"
    assert f"| lcd, batch 32, float32 | {line}" in text
    gpu = {"preset": "sd21-base", "device": "cuda"}
    write_step(tmp_path, 1.4, (processes.LOW_MEMORY,), 0.7, **gpu)
    assert "| lcd step, low-memory settings, peak memory × plain | ≤ 0.65 | 0.70 | **misses** |" in page(tmp_path)
    row = {"method": "lcd", DOES_NOT_FIT: "", "batch_size": 16, "dtype": "bfloat16"}
    write(tmp_path, "large", "cuda", what="step", preset="sd21-base", rows=[row])
    assert "bfloat16, × plain | ≥ 1.5 | does not fit | **misses** |" in page(tmp_path)


def test_whole_commands_have_their_limits(tmp_path: Path) -> None:
    def students(subject: str, stage: str, seconds: float, overrides: list[str]) -> None:
        row = {"subject": subject, "students": 3, "seconds": seconds, "students_per_hour": 10800 / seconds,
               "stages": {stage: {"seconds": seconds, "cpu_sec": 99.0}}}  # fmt: skip
        write(tmp_path, subject, what="students", preset=subject, overrides=overrides, rows=[row])

    students("lrm", "train", 301.0, [])
    students("demo", "make demo", 301.0, ["DEMO_NUM=8"])
    row = {"steps": 63, "seconds": {"rgbench": value(40.0), "diffusers": value(80.0)}, "ratio": value(2.0)}
    write(tmp_path, "script", what="script", preset="benchtop", rows=[row])
    text = page(tmp_path)
    assert "| `rgbench train lrm`, command to last file | ≤ 300 s | 301 s | **misses** |" in text
    assert "| `make demo` after install | ≤ 600 s | not measured |  |" in text
    assert "whole process, × diffusers' script | ≥ 2 | 2.00 | holds |" in text
    assert "35.9 students trained and evaluated per hour" in text and "| make demo | 301.0 | 99 |" in text


def test_steps_of_the_methods_are_multiples_of_lcds(tmp_path: Path) -> None:
    rows = [{"method": name, "flops": flops * 1e9, "flops_to_lcd": flops / 10, "seconds_to_lcd": value(flops / 10)}
            for name, flops in (("lcd", 10.0), ("vsd", 18.0))]  # fmt: skip
    proxy = {"method": "small proxy", "flops": 1e9, "flops_to_lrm": 0.05}
    write(tmp_path, "methods", what="methods", preset="benchtop", rows=[*rows, proxy])
    text = page(tmp_path)
    assert "| vsd | 18.0 | 1.80 | 1.80 [1.62, 1.98] |" in text
    assert "DOLLAR's proxy takes 5.0 % of the FLOPs of an LRM step." in text


@pytest.mark.long
def test_methods_cost_what_they_should(tmp_path: Path) -> None:
    """In network calls: LCD 6, of which the student's takes 3; VSD adds 3 for both scores and 3 for the fake's own."""
    rows = {row["method"]: row for row in measure.methods(tmp_path, 1, "cpu")}
    to_lcd = {name: row["flops_to_lcd"] for name, row in rows.items() if "flops_to_lcd" in row}
    assert to_lcd["tcd"] == pytest.approx(1, abs=0.05) and to_lcd["mlcm"] == pytest.approx(1, abs=0.05)
    assert to_lcd["weighted"] < 1 and to_lcd["vsd"] <= 2.01
    assert rows["small proxy"]["flops_to_lrm"] <= 0.1


@pytest.mark.parametrize(("times", "mark"), [(1.17, "holds"), (1.18, "**misses**")])
def test_30000_images_are_held_to_their_limit(times: float, mark: str, tmp_path: Path) -> None:
    one = {"images": 512, "seconds": 10.0, "generation_sec": 8.0, "times_generation": 1.25}
    both = [one, one | {"images": 1024}]
    row = one | {"metrics": ["fid"], "rounds": both, "estimated": one | {"images": 30_000, "times_generation": times}}
    write(tmp_path, "eval", "cuda", what="eval", preset="sd21-base", rows=[row])
    shown = "15 %, extrapolated from 512 and 1,024 images"
    text = page(tmp_path)
    assert f"| evaluation of 30,000 images on one GPU, outside generation | ≤ 15 % | {shown} | {mark} |" in text
    assert f"| 30,000, extrapolated | 10.0 | 8.0 | {times} |" in text


def test_the_committed_page_is_the_files(tmp_path: Path) -> None:
    committed = ROOT / "docs" / "performance.md"
    results = ROOT / "results" / "bench"
    run("page", results, "--out", committed, "--check")
    other = tmp_path / "page.md"
    other.write_text("another")
    with pytest.raises(RgbenchError, match="differs"):
        cli.page(results, other, check=True)
    used = page(results)
    for file in results.glob("*.json"):
        assert json.loads(file.read_text())["command"] in used, f"{file}: not on the page"
    (tmp_path / "old.json").write_text('{"schema_version": 99}')
    with pytest.raises(UsageError, match="schema version 99"):
        page(tmp_path)
    with pytest.raises(ValueError, match="2 cells under 1 heads"):
        table(("a",), [("lcd", "1")])
