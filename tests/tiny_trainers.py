"""The three trainers of students at tiny shapes, and what tests ask of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.train.base import Trainer
from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM
from rgbench.train.rg_lcd import RGLCD
from tests.parity import tiny


def make(kind: str, models: DiffusionModels, **sections) -> Trainer:
    recipe = tiny.recipe(**sections)
    if kind == "lcd":
        return LCD(recipe, models)
    if kind == "rg_lcd":
        return RGLCD(recipe, models, tiny.expert())
    return LRM(recipe, models, tiny.expert(), tiny.proxy())


def batch() -> Batch:
    return tiny.TinySource().load([3, 1, 4, 8])


def loop(trainer: Trainer, tmp_path) -> Loop:
    return Loop(trainer, tiny.TinySource(), trainer.recipe, RunDirectory(tmp_path))  # type: ignore[attr-defined]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def backward(result, optimiser: str) -> None:
    torch.stack([term.mean() for term in result.losses[optimiser].values()]).sum().backward()
