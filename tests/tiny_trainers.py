"""The trainers of students at tiny shapes, and what tests ask of them."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.train.base import Trainer
from rgbench.train.dollar import Dollar
from rgbench.train.guided import LRMMLCM, LRMTCD, RGMLCM, RGTCD
from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM, load_proxy
from rgbench.train.mlcm import MLCM
from rgbench.train.recipe import LRMRecipe
from rgbench.train.rg_lcd import RGLCD
from rgbench.train.tcd import TCD
from rgbench.train.vsd import VSD
from tests.parity import tiny

PLAIN = {"lcd": LCD, "tcd": TCD, "mlcm": MLCM}
DIRECT = {"rg_lcd": RGLCD, "rg_tcd": RGTCD, "rg_mlcm": RGMLCM}
THROUGH_PROXY = {"lrm": LRM, "lrm_tcd": LRMTCD, "lrm_mlcm": LRMMLCM}
OF_TWO_TIME_SCALES = {"vsd": VSD, "dollar": Dollar}
KINDS = (*PLAIN, *DIRECT, *THROUGH_PROXY, *OF_TWO_TIME_SCALES)
SCORED = dict.fromkeys(DIRECT, 1) | dict.fromkeys(THROUGH_PROXY, 3) | {"dollar": 2}  # images by the expert, per sample


def distillation_of(kind: str) -> str:
    """``lcd`` or a neighbour's."""
    return "vsd" if kind == "dollar" else next((name for name in tiny.RECIPES if kind.endswith(name)), "lcd")


def make(kind: str, models: DiffusionModels, **sections) -> Trainer:
    return build(kind, tiny.recipe(distillation_of(kind), **sections), models)


def build(kind: str, recipe: LRMRecipe, models: DiffusionModels) -> Trainer:
    """A trainer of a recipe that names all parts, with weights of the models' dtype."""
    if kind in PLAIN:
        return PLAIN[kind](recipe, models)
    if kind == "vsd":
        return VSD(recipe, models)
    expert = tiny.expert(dtype=models.dtype)
    if kind == "dollar":
        with mock.patch("rgbench.train.lrm.open_source", lambda section: tiny.TinySource()):
            return Dollar(recipe, models, expert, load_proxy(recipe, models))
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
