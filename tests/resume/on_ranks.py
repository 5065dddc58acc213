"""What two gloo ranks check of one another; started as ``python -m tests.resume.on_ranks FOLDER CHECK...``.

Each check runs on both ranks at once. A failed assertion ends that process with a traceback, and the test reads it.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from rgbench.core.errors import Interrupted, RgbenchError
from rgbench.core.launch import Ranks
from rgbench.core.process import StopRequest
from rgbench.data import latents
from rgbench.train.cache import fill
from rgbench.train.loop import Loop
from rgbench.train.rg_lcd import RGLCD
from tests.parity import tiny
from tests.resume.loops import (
    ALL_KINDS,
    COMMAND,
    SPLIT_KINDS,
    SignallingSource,
    assert_same,
    assert_same_gradients,
    everything,
    make_loop,
    run_to_end,
)


def assert_ranks_equal(loop: Loop, ranks: Ranks) -> None:
    """Bit by bit, of everything that is saved."""
    both = ranks.gather_rows(torch.cat([value.double().flatten() for value in everything(loop).values()])[None])
    assert torch.equal(both[0], both[1])


def one_rank_and_two(folder: Path, ranks: Ranks, kind: str, steps: int, **train: Any) -> None:
    """In float64 a gradient within 1e-12, parameters within 1e-9; in float32, as the CPU rounds, within 1e-3."""
    for accumulation in (1, 2):
        path, options = folder / f"equal-{kind}-{accumulation}", {"gradient_accumulation_steps": accumulation, **train}
        alone = make_loop(kind, folder / "teacher", path / f"alone-{ranks.rank}")
        shared = make_loop(kind, folder / "teacher", path / "shared", None, ranks, **options)
        assert_same_gradients(alone, shared, 1e-3)
        alone = make_loop(kind, folder / "teacher", path / f"alone64-{ranks.rank}", dtype=torch.float64)
        shared = make_loop(kind, folder / "teacher", path / "shared64", None, ranks, torch.float64, **options)
        assert_same_gradients(alone, shared, 1e-12)
        for _ in range(steps - 1):
            values, others = alone.train_step(), shared.train_step()
            assert all(abs(values[name] - others[name]) <= 1e-8 * max(1.0, abs(values[name])) for name in values)
        assert_ranks_equal(shared, ranks)
        wanted, found = everything(alone), everything(shared)
        assert not [name for name, value in wanted.items() if (value - found[name]).abs().max() > 1e-9]
        assert alone.cost.reward_calls == shared.cost.reward_calls


def resume(folder: Path, ranks: Ranks, kind: str, accumulation: int, stopped_at: int, **train: Any) -> Loop:
    """12 steps straight against a stop by a signal to one rank, then the rest; returns the loop of those."""
    path = folder / f"resume-{kind}-{accumulation}-{stopped_at}"
    options = {"gradient_accumulation_steps": accumulation, "save_every": 3, **train}
    straight = run_to_end(make_loop(kind, folder / "teacher", path / "straight", None, ranks, **options))
    signalled = SignallingSource(1 + (stopped_at - 1) * accumulation if ranks.rank == 1 else None)
    first = make_loop(kind, folder / "teacher", path / "resumed", signalled, ranks, **options)
    with StopRequest() as stop:
        if ranks.is_main:
            with pytest.raises(Interrupted) as caught:
                first.train(stop, COMMAND)
            assert caught.value.exit_code == 75
        else:
            with pytest.raises(SystemExit) as left:
                first.train(stop, COMMAND)
            assert left.value.code == 75
    assert first.step == stopped_at, "saved within the step in which the signal came to one of the ranks"
    second = make_loop(kind, folder / "teacher", path / "resumed", None, ranks, **options)
    second.restore()
    assert second.step == stopped_at
    assert_same(everything(second), everything(first))
    run_to_end(second)
    assert_same(everything(second), everything(straight))
    assert_ranks_equal(second, ranks)
    return second


class BadForOne:
    """A reward that is not finite for one image of one rank, from the third call on."""

    name, differentiable = "bad", True

    def __init__(self, ranks: Ranks, how: str) -> None:
        self.ranks, self.how, self.calls = ranks, how, 0

    def fingerprint(self) -> dict[str, str]:
        return {"name": self.name}

    def __call__(self, images, prompts):
        self.calls += 1
        scores = images.mean((1, 2, 3))
        if self.calls < 3 or self.ranks.rank == 0:
            return scores
        if self.how == "value":
            return scores * torch.tensor([1.0, float("nan")])
        return scores + (scores * 0).sqrt()


def not_finite(folder: Path, ranks: Ranks, how: str, mesh: DeviceMesh | None = None) -> None:
    """NaN on rank 1 stops both before the update, and the main one names the sample."""
    recipe = tiny.recipe()
    trainer = RGLCD(recipe, tiny.models(folder / "teacher", mesh=mesh), BadForOne(ranks, how))
    loop = make_loop("lcd", folder / "teacher", folder / f"bad-{how}", None, ranks)
    loop = Loop(trainer, tiny.TinySource(), recipe, loop.run, ranks)
    for _ in range(2):
        loop.train_step()
    before = everything(loop)
    wrong = ranks.gather_lists(loop.load_batch(2).ids)[3]
    if ranks.is_main:
        with pytest.raises(RgbenchError) as caught:
            loop.train_step()
        said = str(caught.value)
        assert said.startswith("step 2: ") and wrong in said and "no parameter was changed" in said
        assert ("loss term reward of the student" if how == "value" else "gradient of the student") in said
    else:
        with pytest.raises(SystemExit) as left:
            loop.train_step()
        assert left.value.code == 1
    assert_same(everything(loop), before)
    assert all(parameter.grad is None for parameter in trainer.student.parameters())


def failures(folder: Path, ranks: Ranks) -> None:
    """A failure of one rank alone stops both; parameters that drifted apart are found before they are saved."""

    def work() -> None:
        if ranks.rank == 1:
            raise OSError(28, "No space left on device", "/scratch/x")

    expected = (
        pytest.raises(RgbenchError, match="rank 1: .*No space left") if ranks.is_main else pytest.raises(SystemExit)
    )
    with expected:
        ranks.together(work)
    loop = make_loop("lcd", folder / "teacher", folder / "drift", None, ranks)
    loop.train_step()
    if ranks.rank == 1:
        with torch.no_grad():
            loop.updater.groups["student"].parameters[3].add_(1e-6)
    expected = (
        pytest.raises(RgbenchError, match="the student differs between ranks")
        if ranks.is_main
        else pytest.raises(SystemExit)
    )
    with expected:
        loop.save()
    assert not list((folder / "drift" / "checkpoints").iterdir())


def lacks_memory(folder: Path, ranks: Ranks, where: str) -> None:
    """A GPU's lack of memory on rank 1 alone, in its step or its update, stops both; the main one says what to do."""
    loop = make_loop("lcd", folder / "teacher", folder / f"memory-{where}", None, ranks)
    loop.train_step()

    def lack(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if ranks.rank == 1:
        setattr(*{"step": (loop.trainer, "step", lack), "update": (loop.trainer, "after_update", lack)}[where])
    expected = pytest.raises(RgbenchError if ranks.is_main else SystemExit)
    with expected as caught:
        loop.train_step()
    said = "rank 1: step 1: the GPU's memory does not suffice (CUDA out of memory); use a larger train.gradient_acc"
    assert str(caught.value).startswith(said) if ranks.is_main else caught.value.code == 1


def fails_in_its_first_shard(folder: Path, ranks: Ranks) -> None:
    """The other rank stops after one shard of its own, and never waits for more than one."""
    recipe = tiny.recipe(model={"path": str(folder / "teacher")})
    found = latents.LatentsCache.at(folder / "cache", {"data": "bad"}, 12)
    said: list[str] = []

    class Bad(tiny.TinySource):
        def load(self, indices):
            if ranks.rank == 1:
                raise OSError(5, "Input/output error", "/data/3.jpg")
            return super().load([index % 10 for index in indices])

    said_by_main = pytest.raises(RgbenchError, match="rank 1: .*/data/3.jpg")
    with said_by_main if ranks.is_main else pytest.raises(SystemExit):
        fill(recipe, Bad(), found, ranks, said.append)
    assert len(said) == (1 if ranks.is_main else 0)


def cached(folder: Path, ranks: Ranks) -> None:
    """Each rank encodes its shards; the main one completes the cache when both are done."""
    recipe = tiny.recipe(model={"path": str(folder / "teacher")})
    latents.SHARD_SAMPLES = 3
    found = latents.LatentsCache.at(folder / "cache", {"data": "tiny"}, 10)
    said: list[str] = []
    fill(recipe, tiny.TinySource(), found, ranks, said.append)
    ranks.on_main(found.complete)
    assert ranks.gather_lists([len(said)]) == [2, 2]
    ranks.largest(0)
    assert latents.CachedSource(tiny.TinySource(), found).load([9, 0]).ids == ["tiny/9", "tiny/0"]


def main(folder: Path, checks: list[str]) -> None:
    ranks = Ranks.join("cpu")
    assert ranks.size == 2
    if "quick" in checks:
        one_rank_and_two(folder, ranks, "lrm", 3)
        resume(folder, ranks, "lrm", 2, 5)
        one_rank_and_two(folder, ranks, "dollar", 3)
        not_finite(folder, ranks, "value")
        not_finite(folder, ranks, "gradient")
        failures(folder, ranks)
        lacks_memory(folder, ranks, "step")
        lacks_memory(folder, ranks, "update")
        cached(folder, ranks)
        fails_in_its_first_shard(folder, ranks)
    if "matrix" in checks:
        for kind, accumulation, stopped_at in itertools.product(ALL_KINDS, (1, 2), (5, 7)):
            resume(folder, ranks, kind, accumulation, stopped_at)
        for kind in SPLIT_KINDS:
            one_rank_and_two(folder, ranks, kind, 10)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
