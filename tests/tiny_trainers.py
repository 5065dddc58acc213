"""The trainers of students at tiny shapes, and what tests ask of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.train.base import Trainer
from rgbench.train.guided import LRMMLCM, LRMTCD, RGMLCM, RGTCD
from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM
from rgbench.train.mlcm import MLCM
from rgbench.train.recipe import LRMRecipe
from rgbench.train.rg_lcd import RGLCD
from rgbench.train.tcd import TCD
from tests.parity import tiny

PLAIN = {"lcd": LCD, "tcd": TCD, "mlcm": MLCM}
DIRECT = {"rg_lcd": RGLCD, "rg_tcd": RGTCD, "rg_mlcm": RGMLCM}
THROUGH_PROXY = {"lrm": LRM, "lrm_tcd": LRMTCD, "lrm_mlcm": LRMMLCM}
KINDS = (*PLAIN, *DIRECT, *THROUGH_PROXY)


def distillation_of(kind: str) -> str:
    """``lcd`` or a neighbour's."""
    return next((name for name in tiny.RECIPES if kind.endswith(name)), "lcd")


def make(kind: str, models: DiffusionModels, **sections) -> Trainer:
    return build(kind, tiny.recipe(distillation_of(kind), **sections), models)


def build(kind: str, recipe: LRMRecipe, models: DiffusionModels) -> Trainer:
    """A trainer of a recipe that names all parts, with weights of the models' dtype."""
    if kind in PLAIN:
        return PLAIN[kind](recipe, models)
    expert = tiny.expert(dtype=models.dtype)
    if kind in DIRECT:
        return DIRECT[kind](recipe, models, expert)
    return THROUGH_PROXY[kind](recipe, models, expert, tiny.proxy(models.dtype))


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
