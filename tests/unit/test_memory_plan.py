"""``rgbench plan``: held to what torch's profiler measures of the same loop on a CPU; what does not fit; bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch import nn

from rgbench.core.errors import UsageError
from rgbench.core.launch import Ranks
from rgbench.train import plan as planning
from rgbench.train.plan import GPUS, Plan, describe, find_gpu, plan, remedies
from tests import families, sd_folders
from tests.conftest import Cli
from tests.fork_server import ForkServer
from tests.parity import tiny
from tests.resume.on_planned import measured
from tests.resume.test_ranks import on_two_ranks
from tests.resume.test_teachers import write_recipe

LONG = pytest.mark.long
CHECKPOINTED = {"train": {"gradient_checkpointing": True}}
SHARED = {"train": {"shard": True, "gradient_checkpointing": True}}
IN_PARTS = {"train": {"dtype": "bfloat16", "batch_size": 8, "gradient_accumulation_steps": 4, "shard": True}}
MIXED = {"train": {"dtype": "bfloat16", "batch_size": 6, "gradient_accumulation_steps": 3}, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Teachers, a reward and images on disk; and all without weights in ``bare``. The weights of ``wide`` are large."""
    root = tmp_path_factory.mktemp("planned")
    for name in ("sd", "wide"):
        tiny.save_pipeline(root / name)
    tiny.unet(block_out_channels=(64, 128)).save_pretrained(root / "wide" / "unet")
    for name in ("sdxl", "sd3", "flux"):
        families.save(name, root / name)
    sd_folders.save_parts(root)
    shutil.copytree(root, root / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return root


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
    peak, flops = measured(file, tmp_path, Ranks())
    assert found.peak == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(flops, rel=1e-3) and flops > 0
    assert found.parts["activations and buffers"] > 0.3 * peak, "not a test of weights alone"


@LONG
@pytest.mark.enable_socket
@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("lcd", "wide", {}),
        ("lcd", "wide", {"train": {"shard": True}}),
        ("rg_lcd", "wide", IN_PARTS),
        ("lcd", "sdxl", SHARED),
        ("lcd", "flux", MIXED | {"train": {"shard": True, "dtype": "bfloat16"}}),
        ("lrm", "sd3", SHARED),
    ],
)
def test_a_plan_of_two_gpus_is_what_two_ranks_measure(
    parts: Path, tmp_path: Path, fork_server: ForkServer, kind, name, changes
) -> None:
    file = write_recipe(parts, tmp_path, kind, name, changes).rename(tmp_path / "recipe.yaml")
    on_two_ranks(fork_server.folder / "python", tmp_path, module="on_planned")
    peak, flops = json.loads((tmp_path / "measured.json").read_text())
    found = plan(str(file), on_gpu=False, gpus=2)
    assert found.peak == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(flops, rel=1e-3) and flops > 0
    assert name != "wide" or found.parts["activations and buffers"] < 0.3 * peak, "not a test of activations alone"


def test_each_gpu_has_its_part_of_the_batch_and_with_shards_of_the_networks(parts, tmp_path) -> None:
    file = str(write_recipe(parts, tmp_path, "lcd", "wide", {"train": {"batch_size": 8}}))
    steps, shard = ["train.gradient_accumulation_steps=2"], ["train.shard=true"]
    alone, split, shared = plan(file, [*steps, *shard]), plan(file, steps, gpus=2), plan(file, [*steps, *shard], gpus=4)
    networks = ("student", "target", "teacher", "gradients", "optimiser state")
    assert {name: split.parts[name] for name in networks} == {name: alone.parts[name] for name in networks}
    for name in networks:  # but for a step's number beside each tensor's moments
        assert shared.parts[name] == pytest.approx(alone.parts[name] / 4, rel=0.01), name
    assert 0 < shared.parts["gathered blocks"] < alone.parts["student"] and "gathered blocks" not in split.parts
    assert (2 * split.flops, 4 * shared.flops) == (alone.flops, alone.flops)
    assert (alone.notes, shared.notes) == (("train.shard: of no effect on one GPU; give --gpus",), ())
    assert not torch.distributed.is_initialized() and not PartialState._shared_state


def test_a_batch_that_the_gpus_cannot_split_is_refused_as_in_training(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"train.batch_size 4 cannot be split over 3 processes .* a multiple of 3"):
        plan("lcd", ["train.batch_size=4"], gpus=3)
    with pytest.raises(UsageError, match="train.batch_size 6 cannot be split over 1 processes × .*steps 4"):
        plan("lcd", ["train.batch_size=6", "train.gradient_accumulation_steps=4"])
    with pytest.raises(UsageError, match="--gpus 0: at least 1"):
        plan("lcd", gpus=0)
    with pytest.raises(UsageError, match="nowhere"):
        plan("lcd", ["train.batch_size=4", f"model.path={tmp_path / 'nowhere'}"], gpus=2)
    assert not torch.distributed.is_initialized(), "also after an error"


def test_gradients_are_averaged_in_a_flat_copy_that_is_counted() -> None:
    with planning._first_of(2) as ranks, planning._shapes_alone(on_gpu=False) as meter:
        gradients = [torch.zeros(1000), torch.zeros(10, 50)]
        meter.label("gradients", gradients)
        meter.restart()
        ranks.average(gradients)
    assert meter.peak == {"gradients": 6000, "activations and buffers": 6000}


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
        meter.restart()
        kept.untyped_storage().resize_(0)
        assert torch.zeros(2000).numel() == 2000 and meter.peak == {"batch": 0, "activations and buffers": 12000}
        kept.untyped_storage().resize_(4000)
        meter.restart()
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

    def planned(recipe: str, overrides: list[str], gpus: int) -> Plan:
        size = 30 - sum(saved.get(override, 0) for override in overrides)
        return Plan({"teacher": size * GIB}, 1e12, 10, "bfloat16", (), gpus)

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


def test_several_gpus_may_share_what_does_not_fit_into_each(monkeypatch) -> None:
    large = replace(LARGE, gpus=8)
    monkeypatch.setattr(planning, "plan", lambda recipe, overrides, gpus: large)

    def added(*overrides: str, recipe: str = "lcd", gpus: int = 8) -> list[str]:
        return [words[-1] for words, _ in remedies(recipe, ["train.batch_size=16", *overrides], GPUS["4090"], gpus)]

    checkpointing, lora = "train.gradient_checkpointing=true", "lora={rank: 64}"
    assert added() == [checkpointing, "train.gradient_accumulation_steps=2", "train.shard=true", lora]
    for cannot in ("train.dtype=float16", "train.compile=true", "train.shard=true"):
        assert "train.shard=true" not in added(cannot)
    assert "train.shard=true" not in added(gpus=1) + added(recipe="lrm_pretrain")
    rows = dict(describe(large, "4090", []))
    assert rows["peak, on each of 8 GPUs"] == "30.00 GiB" and "messages between GPUs" in rows["time"]


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
