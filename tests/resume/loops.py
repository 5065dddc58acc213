"""Loops at tiny shapes for the tests of this folder, in one process or in several."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rgbench.core import checkpoint
from rgbench.core.launch import Ranks
from rgbench.core.process import StopRequest
from rgbench.core.run import RunDirectory, stream_generator
from rgbench.core.shard import gather
from rgbench.data.batches import batch_indices
from rgbench.train.loop import Loop
from rgbench.train.pretrain import LRMPretrain
from rgbench.train.recipe import LRMPretrainRecipe, TrainSection, WeightedRecipe
from rgbench.train.weighted import Weighted
from tests.parity import tiny
from tests.tiny_trainers import KINDS, build, distillation_of

SPLIT_KINDS = (*KINDS, "weighted")
ALL_KINDS = (*SPLIT_KINDS, "lrm_pretrain")  # its loss is no mean over samples: no split of a batch is like another
COMMAND = "rgbench train tiny"


class SignallingSource(tiny.TinySource):
    """Sends this process a signal while a given batch is loaded."""

    def __init__(self, at_load: int | None = None, number: int = signal.SIGTERM) -> None:
        self.loads, self.at_load, self.number = 0, at_load, number

    def load(self, indices):
        if self.loads == self.at_load:
            os.kill(os.getpid(), self.number)
        self.loads += 1
        return super().load(indices)


def weighted_recipe(train: TrainSection | None = None, **own: Any) -> WeightedRecipe:
    """A recipe of samples and scores that the test gives."""
    values = tiny.recipe().model_dump(mode="json", include={"name", "model", "train"})
    values |= {"kind": "weighted", "data": {"kind": "teacher", "path": "unused"}, "weighted": own}
    values |= {} if train is None else {"train": train.model_dump(mode="json")}
    return WeightedRecipe.model_validate(values, strict=False)


class ScoredSource:
    """Images of a source as pairs of one prompt's, with their scores."""

    name = "scored"

    def __init__(self, source: Any) -> None:
        self.source, self.length = source, source.length

    def fingerprint(self):
        return {"kind": self.name}

    def load(self, indices):
        rows = [torch.randn(2, generator=stream_generator(7, "scores", i // 2)).double() for i in indices]
        return replace(self.source.load(indices), scores=torch.stack(rows), rank=torch.tensor(indices) % 2)


def make_loop(
    kind: str,
    folder: Path,
    path: Path,
    source: Any = None,
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
    **train: Any,
) -> Loop:
    """A trainer of ``kind`` in its loop, weights of ``dtype``, the recipe's ``train.dtype`` = ``precision``."""
    mesh = ranks.mesh() if ranks and train.get("shard") else None
    models = tiny.models(folder, dtype, mesh)
    recipe = tiny.recipe(distillation_of(kind), train={"dtype": precision, **train})
    if kind in KINDS:
        trainer: Any = build(kind, recipe, models)
    elif kind == "weighted":
        recipe = weighted_recipe(recipe.train, share=0.5)
        trainer, source = Weighted(recipe, models), ScoredSource(source or tiny.TinySource())
    else:
        values = {"kind": kind, "name": "tiny", "model": {"path": "unused"}, "data": {"kind": "scenes"}}
        values["train"] = {"steps": 12, "batch_size": 4, "lr": 1e-3, "dtype": precision, **train}
        recipe = LRMPretrainRecipe.model_validate(values, strict=False)
        trainer = LRMPretrain(recipe, models, tiny.proxy(dtype))
    run = RunDirectory(path)
    (ranks or Ranks()).on_main(lambda: run.create(recipe.model_dump(mode="json"), {"status": "running", "step": 0}))
    return Loop(trainer, source or tiny.TinySource(), recipe, run, ranks)


def everything(loop: Loop) -> dict[str, torch.Tensor]:
    """Networks, optimisers and the next 8 batches of a run; all ranks of a sharded one call it."""
    out = {}
    for stem, module in loop.trainer.modules().items():
        out |= {f"{stem}.{name}": gather(value).clone() for name, value in module.state_dict().items()}
    for name, optimiser in loop.updater.optimisers.items():
        tensors, _ = checkpoint.flatten_optimiser(optimiser)
        out |= {f"optimiser-{name}.{key}": gather(value).clone() for key, value in tensors.items()}
    for step in range(loop.step, loop.step + 8):
        out[f"batch-{step}"] = torch.from_numpy(batch_indices(loop.recipe.seed, step, 4, 10))
    return out


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def run_to_end(loop: Loop) -> Loop:
    with StopRequest() as stop:
        loop.train(stop, COMMAND)
    return loop


def assert_same_gradients(one: Loop, other: Loop, relative: float) -> None:
    """The next step's, in the L2 norm over all of the student's parameters."""
    wanted, found = (torch.cat([g.flatten() for g in gradients(loop)]) for loop in (one, other))
    error = float((wanted - found).norm() / wanted.norm())
    assert error <= relative, error


def gradients(loop: Loop) -> list[torch.Tensor]:
    """The student's next gradients, averaged over ranks and clipped; the step is then taken, as are those before."""
    caught: list[torch.Tensor] = []
    update = loop.updater.step

    def take(step: int, finite: bool) -> list[str]:
        found = [parameter.grad for parameter in loop.updater.groups["student"].parameters]
        caught.extend(gather(gradient).clone() for gradient in found if gradient is not None)
        return update(step, finite)

    loop.updater.step = take  # type: ignore[method-assign]
    while not caught:
        loop.train_step()
    return caught


def assert_close(
    folder: Path,
    path: Path,
    kind: str,
    steps: int,
    rounding: float,
    prepare: Callable[[Loop], None] | None = None,
    **train: Any,
) -> None:
    """A loop against one with ``train``: the gradients of one step and the parameters after some.

    In float64 the gradients agree within 1e-12, the parameters within 1e-9.

    Args:
        rounding: bound on the gradients' relative difference in float32, whose own distance from float64's is what
            ``test_a_split_rounds_no_worse_than_float32_itself`` measures.
        prepare: done to the loops in float64.
    """
    plain = make_loop(kind, folder, path / "a", batch_size=8)
    assert_same_gradients(plain, make_loop(kind, folder, path / "b", batch_size=8, **train), rounding)
    plain = make_loop(kind, folder, path / "c", dtype=torch.float64, batch_size=8)
    other = make_loop(kind, folder, path / "d", dtype=torch.float64, batch_size=8, **train)
    for loop in (plain, other) if prepare else ():
        prepare(loop)
    assert_same_gradients(plain, other, 1e-12)
    for _ in range(steps - 1):
        values, others = plain.train_step(), other.train_step()
        assert all(abs(values[name] - others[name]) <= 1e-8 * max(1.0, abs(values[name])) for name in values)
    before = everything(plain)
    assert all((value - before[name]).abs().max() <= 1e-9 for name, value in everything(other).items())
    assert plain.cost.reward_calls == other.cost.reward_calls
