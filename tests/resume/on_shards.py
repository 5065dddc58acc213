"""What two gloo ranks with shards check; started as ``python -m tests.resume.on_shards FOLDER CHECK...``.

The checks are those of :mod:`tests.resume.on_ranks` with ``train.shard``, and a few more.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rgbench.core.errors import RgbenchError
from rgbench.core.launch import Ranks
from rgbench.core.run import RunDirectory
from rgbench.core.shard import gather, is_shard
from rgbench.models.pipeline import load_models
from rgbench.models.student import merged, unsharded
from rgbench.train.loop import Loop
from tests.parity import tiny
from tests.resume.loops import (
    assert_same,
    assert_same_gradients,
    everything,
    make_loop,
)
from tests.resume.on_ranks import assert_ranks_equal, not_finite, one_rank_and_two, resume
from tests.tiny_trainers import make

EQUAL = ("lcd", "rg_lcd", "lrm", "tcd", "mlcm", "weighted", "vsd", "dollar")
RESUMED = ("lcd", "rg_lcd", "lrm", "dollar")


def a_short_run(folder: Path, ranks: Ranks) -> None:
    """Two steps are those of one whole process; their checkpoint is its, and goes on bit by bit, in halves."""
    path, teacher = folder / "short", folder / "teacher"
    options = {"dtype": torch.float64, "gradient_accumulation_steps": 2, "shard": True}
    alone = make_loop("lrm", teacher, path / f"alone-{ranks.rank}", dtype=torch.float64)
    shared = make_loop("lrm", teacher, path / "shared", None, ranks, **options)
    assert_same_gradients(alone, shared, 1e-12)
    values, others = alone.train_step(), shared.train_step()
    assert all(abs(values[name] - others[name]) <= 1e-9 * max(1.0, abs(values[name])) for name in values)
    saved = everything(shared)
    assert_close_to(everything(alone), saved)
    shared.save()
    again = make_loop("lrm", teacher, path / "shared", None, ranks, **options)
    again.restore()
    for loop in (shared, again):
        loop.train_step()
    assert_same(everything(again), everything(shared))
    whole = make_loop("lrm", teacher, path / f"whole-{ranks.rank}", dtype=torch.float64)
    shutil.copytree(shared.run.checkpoints, whole.run.checkpoints, dirs_exist_ok=True)
    whole.restore()
    assert_same(everything(whole), saved)
    half_is_held(again, ranks)


def resumed_alone(folder: Path, ranks: Ranks, kind: str, accumulation: int, stopped_at: int) -> None:
    """A sharded run resumes bit by bit, and its checkpoint is that of one process, which goes on from it."""
    shared = resume(folder, ranks, kind, accumulation, stopped_at, shard=True)
    assert all(is_shard(own) for own in shared.trainer.student.parameters())
    path = folder / f"alone-{kind}-{accumulation}-{stopped_at}-{ranks.rank}"
    alone = make_loop(kind, folder / "teacher", path, None, Ranks())
    shutil.copytree(shared.run.checkpoints, alone.run.checkpoints, dirs_exist_ok=True)
    alone.restore()
    assert alone.step == 12
    assert_same(everything(alone), everything(shared))
    values, others = alone.train_step(), shared.train_step()
    assert all(others[name] == pytest.approx(values[name], rel=1e-3) for name in values if name.startswith("loss"))


def half_is_held(loop: Loop, ranks: Ranks) -> None:
    """Of teacher, student, target and both moments; and all of the target where it is gathered to be exported."""
    trainer: Any = loop.trainer
    assert sum(isinstance(module, FSDPModule) for module in trainer.student.modules()) > 8, "block by block"
    moments = [v for s in loop.updater.optimisers["student"].state.values() for v in s.values() if v.ndim]
    for tensors in (*([*n.parameters()] for n in (trainer.models.unet, trainer.student, trainer.target)), moments):
        held = sum(tensor.to_local().numel() for tensor in tensors)
        assert held == pytest.approx(sum(tensor.numel() for tensor in tensors) / 2, rel=0.02)
    wanted = {name: gather(value) for name, value in trainer.target.state_dict().items()}
    loop.unshard()
    assert (trainer.target is not None) == ranks.is_main
    if ranks.is_main:
        assert type(trainer.target) is UNet2DConditionModel and trainer.target.config == trainer.student.config
        assert_same(trainer.target.state_dict(), wanted)


def one_rank_cannot_read(folder: Path, ranks: Ranks) -> None:
    """Both stop before either waits for a shard of the other."""

    class Source(tiny.TinySource):
        def load(self, indices: list[int]) -> Any:
            if ranks.rank == 1:
                raise OSError(5, "Input/output error", "/data/3.jpg")
            return super().load(indices)

    loop = make_loop("lcd", folder / "teacher", folder / "unread", Source(), ranks, shard=True)
    expected = pytest.raises(RgbenchError, match=r"rank 1: .*/data/3\.jpg")
    with expected if ranks.is_main else pytest.raises(SystemExit):
        loop.train_step()


def a_family(folder: Path, ranks: Ranks, name: str, lora: dict[str, Any] | None, told: int | None) -> None:
    """Two steps of SDXL, SD3 or FLUX, with gradient checkpointing, are those of one whole process; so is the export."""
    sections = {"lcd": {"time_cond_proj_dim": told}, "sampling": {"guidance_scale": 1.0}, "lora": lora}
    loops, path = [], folder / f"run-{name}-{'whole' if lora is None else 'lora'}"
    for place, own in ((f"alone-{ranks.rank}", Ranks()), ("shared", ranks)):
        models = load_models(folder / name, "cpu", torch.float64, 16, mesh=own.mesh())
        train = {"gradient_checkpointing": own.size > 1, "shard": own.size > 1, "lr": 1e-2}
        trainer = make("lcd", models, **sections, train=train)
        loops.append(Loop(trainer, tiny.TinySource(), trainer.recipe, RunDirectory(path / place), own))  # type: ignore[attr-defined]
    alone, shared = loops
    assert_same_gradients(alone, shared, 1e-10)
    values, others = alone.train_step(), shared.train_step()
    assert all(abs(values[key] - others[key]) <= 1e-9 * max(1.0, abs(values[key])) for key in values)
    assert_ranks_equal(shared, ranks)
    assert_close_to(everything(alone), everything(shared))
    copy = unsharded(shared.trainer.target, ranks.is_main)
    if ranks.is_main:
        assert_close_to(merged(alone.trainer.target).state_dict(), merged(copy).state_dict())


def assert_close_to(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert wanted.keys() == found.keys()
    assert not [name for name, value in wanted.items() if (value - found[name]).abs().max() > 1e-9]


def in_bfloat16(folder: Path, ranks: Ranks) -> None:
    """Losses of whole networks, up to the precision."""
    alone = make_loop("lrm", folder / "teacher", folder / f"b-{ranks.rank}", precision="bfloat16")
    shared = make_loop("lrm", folder / "teacher", folder / "b", None, ranks, precision="bfloat16", shard=True)
    for _ in range(2):
        values, others = alone.train_step(), shared.train_step()
        assert all(others[name] == pytest.approx(values[name], rel=0.02) for name in values if name.startswith("loss"))


def one_rank_leaves(folder: Path, ranks: Ranks) -> None:
    """It lacks memory in its step, says so, and the other, which waits for it, does not wait for ever."""
    loop = make_loop("lcd", folder / "teacher", folder / "leaves", None, ranks, shard=True)

    def lack(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if ranks.rank == 1:
        loop.trainer.step = lack  # type: ignore[method-assign, assignment]
        with pytest.raises(RgbenchError, match="rank 1: step 0: the GPU's memory does not suffice"):
            loop.train_step()
    else:
        with pytest.raises(RuntimeError):
            loop.train_step()


def main(folder: Path, checks: list[str]) -> None:
    ranks = Ranks.join("cpu")
    assert ranks.size == 2
    if "quick" in checks:
        a_short_run(folder, ranks)
        one_rank_cannot_read(folder, ranks)
    if "matrix" in checks:
        for kind in EQUAL:
            one_rank_and_two(folder, ranks, kind, 5, shard=True)
        for kind, (accumulation, stopped_at) in itertools.product(RESUMED, ((1, 5), (2, 7))):
            resumed_alone(folder, ranks, kind, accumulation, stopped_at)
        not_finite(folder, ranks, "value", ranks.mesh())
        not_finite(folder, ranks, "gradient", ranks.mesh())
        for name, told in (("sdxl", 16), ("sd3", None), ("flux", 16)):
            for lora in (None, {"rank": 2}):
                a_family(folder, ranks, name, lora, told)
        in_bfloat16(folder, ranks)
    one_rank_leaves(folder, ranks)
    os._exit(0)  # what ranks that left one another in the middle of a step would still do is of no interest


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
