"""``rgbench plan``: held to what torch's profiler measures of the same loop on a CPU; what does not fit; bad input."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from rgbench.core.errors import UsageError
from rgbench.core.launch import Ranks
from rgbench.core.run import RunDirectory
from rgbench.train import plan as planning
from rgbench.train.plan import GPUS, Plan, describe, find_gpu, plan, remedies
from rgbench.train.recipe import load_recipe
from rgbench.train.train import build_loop
from tests import families, sd_folders
from tests.conftest import Cli
from tests.parity import tiny
from tests.resume.test_teachers import write_recipe
from tools.bench.timing import count_flops

LONG = pytest.mark.long
CHECKPOINTED = {"train": {"gradient_checkpointing": True}}
MIXED = {"train": {"dtype": "bfloat16", "batch_size": 6, "gradient_accumulation_steps": 3}, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Teachers, a reward and images on disk; and all without weights in ``bare``."""
    root = tmp_path_factory.mktemp("planned")
    tiny.save_pipeline(root / "sd")
    for name in ("sdxl", "sd3", "flux"):
        families.save(name, root / name)
    sd_folders.save_parts(root)
    shutil.copytree(root, root / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return root


def measured(file: Path, folder: Path) -> tuple[int, int]:
    """Peak bytes in the second step, with all that it found alive, and the FLOPs of a third one."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop, _ = build_loop(load_recipe(str(file)), RunDirectory(folder / "run"), Ranks())
        loop.train_step()
        with record_function("second step"):
            loop.train_step()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    (step,) = (event for event in events if event.name() == "second step")
    alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        if step.start_ns() <= event.start_ns() <= step.end_ns():
            peak = max(peak, alive)
    return peak, count_flops(loop.train_step)


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("lrm", "sd", {}),
        pytest.param("rg_lcd", "sdxl", CHECKPOINTED, marks=LONG),
        pytest.param("lcd", "sd", {}, marks=LONG),
        pytest.param("lcd", "sdxl", MIXED, marks=LONG),
        pytest.param("rg_lcd", "sd", {"train": {"dtype": "bfloat16"}}, marks=LONG),
        pytest.param("lrm", "sdxl", {}, marks=LONG),
        pytest.param("lrm", "sd3", CHECKPOINTED, marks=LONG),
        pytest.param("lcd", "flux", MIXED, marks=LONG),
    ],
)
def test_a_plan_from_configurations_is_what_is_measured(parts, tmp_path, kind, name, changes) -> None:
    file = write_recipe(parts, tmp_path, kind, name, changes)
    bare = [f"model.path={parts / 'bare' / name}"]
    bare += [f"reward.path={parts / 'bare' / 'reward'}"] if kind != "lcd" else []
    found = plan(str(file), bare, on_gpu=False)
    peak, flops = measured(file, tmp_path)
    assert found.peak == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(flops, rel=1e-3) and flops > 0
    assert found.parts["activations and buffers"] > 0.3 * peak, "not a test of weights alone"


def test_a_pre_training_counts_both_of_its_kinds_of_steps() -> None:
    common = ["train.batch_size=2", "train.steps=10"]
    without, whole, mixed = (plan("lrm_pretrain", [*common, f"proxy.align.steps={num}"]) for num in (0, 10, 2))
    assert mixed.flops == pytest.approx(0.8 * without.flops + 0.2 * whole.flops)
    assert mixed.peak == pytest.approx(whole.peak, rel=0.01) and "reward" not in without.parts


def test_live_bytes_are_counted_by_label() -> None:
    with planning._shapes_alone(on_gpu=False) as meter:
        kept = torch.zeros(1000)
        meter.label("batch", [kept])
        meter.restart()
        made = kept + 1
        made.view(10, 100).add_(1)
        del made
        again = kept * 2
        assert meter.peak == {"batch": 4000, "activations and buffers": 4000}
        nn.Linear(1000, 3)(again)
        assert float(again.sum()) == 1 and bool(again.isfinite().all())
    assert meter.peak.total() == 8000 + 4 * 3003 + 4 * 3 and meter.flops == 2 * 3000


@pytest.mark.parametrize(("on_gpu", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_norms_are_wide_where_a_gpu_has_them_so(on_gpu: bool, dtype: torch.dtype) -> None:
    with planning._shapes_alone(on_gpu), torch.autocast("cpu", torch.bfloat16):
        assert nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))(torch.zeros(2, 4)).dtype == dtype


GIB = 2**30
LARGE = Plan({"teacher": 20 * GIB, "activations and buffers": 10 * GIB}, 165.2e12, 3600, "bfloat16", ("a note",))


def test_what_does_not_fit_says_by_how_much_and_what_helps(monkeypatch) -> None:
    saved = {"train.gradient_checkpointing=true": 2, "train.gradient_accumulation_steps=16": 1, "lora={rank: 64}": 7}

    def planned(recipe: str, overrides: list[str]) -> Plan:
        size = 30 - sum(saved.get(override, 0) for override in overrides)
        return Plan({"teacher": size * GIB}, 1e12, 10, "bfloat16", ())

    monkeypatch.setattr(planning, "plan", planned)
    helps = list(remedies("lcd", ["train.batch_size=16"], GPUS["4090"]))
    assert [words[-1] for words, _ in helps] == list(saved) and len(helps[-1][0]) == 3
    rows = dict(describe(LARGE, "4090", helps))
    assert rows["peak"] == "30.00 GiB" and rows["4090"].startswith("does not fit: 8.40 GiB more than 90% of 24 GiB")
    assert rows["with"].endswith("lora={rank: 64}: 20.00 GiB, fits") and "remedy" not in rows
    assert rows["time"].startswith("2.5 s a step, 2.5 h in all") and "not measured" in rows["time"]
    assert rows["note"] == "a note"
    saved["lora={rank: 64}"] = 0
    helps = list(remedies("lcd", ["train.batch_size=16"], GPUS["4090"]))
    assert "a larger GPU" in dict(describe(LARGE, "4090", helps))["remedy"]
    assert [words for words, _ in remedies("lcd", [], GPUS["h100"])] == [["train.gradient_checkpointing=true"]]
    assert "4090" not in dict(describe(LARGE, None, []))


def test_a_gpu_that_is_unknown_is_answered_with_the_nearest(cli: Cli) -> None:
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(UsageError, match="--gpu a100-90: unknown; did you mean 'a100-"):
        find_gpu("a100-90")
    done = cli("plan", "lcd", "--gpu", "4080")
    assert done.returncode == 2 and "did you mean '4090'" in done.stderr


def test_a_preset_without_its_configurations_says_how_to_get_them_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UsageError, match=r"configuration of the teacher: .*get it with: hf download \S+FLUX") as caught:
        plan("flux/lcd_lora")
    assert ".safetensors " not in str(caught.value)
