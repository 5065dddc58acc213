"""The trainers' steps give the plain reference step's numbers: gradients, parameters, EMA, proxy."""

from __future__ import annotations

import copy

import pytest
import torch

from rgbench.core.errors import UsageError
from rgbench.core.launch import Ranks
from rgbench.data.batches import Batch
from rgbench.train.base import StepDraws
from rgbench.train.lcd import LCD
from rgbench.train.loop import Updater
from rgbench.train.lrm import LRM
from rgbench.train.vsd import VSD
from rgbench.train.weighted import Weighted
from tests.parity import tiny
from tests.resume.loops import ScoredSource, weighted_recipe
from tests.tiny_trainers import distillation_of, make
from tools.bench.plain import PlainDraws, PlainStep

METHODS = ["lcd", "rg_lcd", "lrm"]
NEIGHBOURS = ["tcd", "mlcm", "weighted", "vsd", "dollar"]
# of recipes that the plain step has: one stage, all networks at every step
SECTIONS = {"mlcm": {"mlcm": {"stages": [{"segments": 4}]}}, "vsd": {"vsd": {"ratio": 1}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("teacher"))


def build(method: str, folder, dtype: torch.dtype, **sections) -> LCD:
    """A trainer after one update, so that student, target, fake score and teacher are no longer equal."""
    models, kind = tiny.models(folder, dtype), distillation_of(method)
    if method == "weighted":
        trainer: LCD = Weighted(weighted_recipe(share=0.5), models)
    else:
        trainer = make(method, models, **SECTIONS.get(kind, {}) | sections)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for network in (trainer.student, trainer.target, *([trainer.fake] if isinstance(trainer, VSD) else [])):
            for parameter in network.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return trainer


def batch() -> Batch:
    return ScoredSource(tiny.TinySource()).load([0, 1, 2, 3])


def ours(trainer: LCD, updater: Updater, dtype: torch.dtype, step: int) -> dict[str, list[torch.Tensor]]:
    """One step as the loop takes it; the gradients before clipping."""
    result = trainer.step(batch(), StepDraws(0, step, 4, dtype=dtype))
    updater.backward(result, 1)
    found = gradients(updater.groups["student"].parameters, trainer)
    updater.reduce()
    trainer.after_update(updater.step(step, finite=True))
    return found


def gradients(student, trainer: LCD) -> dict[str, list[torch.Tensor]]:
    lists = {"student": student} | ({"proxy": trainer.proxy_parameters} if isinstance(trainer, LRM) else {})
    lists |= {"fake": list(trainer.fake.parameters())} if isinstance(trainer, VSD) else {}
    return {name: [p.grad.clone() for p in parameters] for name, parameters in lists.items()}


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """|a − b| / |b| over all elements."""
    gap = torch.stack([(x - y).detach().norm() for x, y in zip(a, b, strict=True)]).norm()
    return float(gap / torch.stack([y.detach().norm() for y in b]).norm())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("method", [*METHODS, *NEIGHBOURS])
def test_one_step_has_the_plain_steps_gradients(method, folder, dtype, limit):
    trainer = build(method, folder, dtype)
    plain = PlainStep(copy.deepcopy(trainer))
    updater = Updater(trainer.optimiser_groups(), trainer.recipe.train.dtype, Ranks(), "cpu")
    found = ours(trainer, updater, dtype, 0)
    for loss in plain.losses(batch(), StepDraws(0, 0, 4, dtype=dtype)).values():
        loss.backward()
    expected = gradients(plain.parameters["student"], plain.trainer)
    assert expected.keys() == found.keys()
    for name, wanted in expected.items():
        assert float(torch.stack([g.norm() for g in wanted]).norm()) > 1e-4
        assert difference(found[name], wanted) <= limit, name


def test_v_prediction_has_the_plain_steps_gradients(tmp_path):
    folder = tiny.save_pipeline(tmp_path / "teacher", "v_prediction")
    for method in ("lcd", "dollar"):
        test_one_step_has_the_plain_steps_gradients(method, folder, torch.float64, 1e-10)


@pytest.mark.parametrize("method", [*METHODS, "dollar"])
def test_two_updates_lead_to_the_same_networks(method, folder):
    trainer = build(method, folder, torch.float64, lcd={"loss": "l2" if method in ("lcd", "dollar") else "huber"})
    plain = PlainStep(copy.deepcopy(trainer))
    updater = Updater(trainer.optimiser_groups(), trainer.recipe.train.dtype, Ranks(), "cpu")
    for step in range(2):
        ours(trainer, updater, torch.float64, step)
        values = plain(batch(), StepDraws(0, step, 4, dtype=torch.float64))
        assert set(values) == set(updater.groups)
    start = list(build(method, folder, torch.float64).student.parameters())
    for name in ("student", "target"):
        mine, theirs = list(getattr(trainer, name).parameters()), list(getattr(plain.trainer, name).parameters())
        assert difference(mine, theirs) <= 1e-9
    assert difference(list(trainer.student.parameters()), start) > 1e-4  # it did move
    if isinstance(trainer, LRM):
        assert difference(list(trainer.proxy.parameters()), list(plain.trainer.proxy.parameters())) <= 1e-9


def test_its_own_draws_have_the_trainers_ranges():
    torch.manual_seed(0)
    draws = PlainDraws(500, torch.device("cpu"))
    assert draws.normal("noise", (2, 3)).shape == (500, 2, 3)
    w, index = draws.uniform("w", 2.0, 6.0), draws.integers("index", 50)
    assert 2.0 <= w.min() < 2.1 and 5.9 < w.max() < 6.0
    assert index.min() == 0 and index.max() == 49


@pytest.mark.parametrize(
    ("method", "sections", "message"),
    [
        ("rg_lcd", {"guidance": {"window": [0, 499]}}, "guidance.window"),
        ("rg_lcd", {"guidance": {"scale": None, "share": 0.3}}, "guidance.scale"),
        ("lrm", {"proxy": {"loss": "smooth"}}, "proxy.loss smooth"),
        ("tcd", {"tcd": {"s": "next"}}, "tcd.s next"),
        ("vsd", {"vsd": {"ratio": 2}}, "vsd.ratio above 1"),
    ],
)
def test_what_it_cannot_do_is_refused(method, sections, message, folder) -> None:
    with pytest.raises(UsageError, match=message):
        PlainStep(build(method, folder, torch.float32, **sections))
