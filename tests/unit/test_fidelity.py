"""The proxy's fidelity to its expert: right figures, samples of its own, and the gate that hangs on them."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kendalltau

from rgbench.core.errors import ConfigError
from rgbench.core.run import RunDirectory
from rgbench.models.pipeline import DiffusionModels
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM, Fidelity, Scores, calibration_error, gradient_cosine
from rgbench.train.recipe import FidelitySection, load_recipe
from tests.parity import tiny
from tests.unit.test_trainers import DecodedExpert


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> DiffusionModels:
    return tiny.models(tiny.save_pipeline(tmp_path_factory.mktemp("fidelity") / "teacher"))


class Scripted:
    """Scores by the draws alone: the expert's noise, and a proxy that agrees with it in one half of the timesteps."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.noise: list[torch.Tensor] = []

    def __call__(self, batch, draws, index, compare):
        self.indices += index.tolist()
        self.noise.append(draws.normal("noise", (3,)))
        expert = self.noise[-1].T.clone()
        proxy = torch.where(index < 25, expert, -expert)
        cosine = torch.where(index < 25, 1.0, -1.0)[:1] if compare else torch.zeros(0)
        return Scores(expert, proxy, cosine)


def scripted(score: Scripted, **section) -> Fidelity:
    batch = tiny.TinySource().load([0, 1, 2])
    options = {"every": 5, "prompts": 3, "samples": 9, "bins": 2} | section
    return Fidelity(FidelitySection(**options), batch, 0, 50, score)


def test_figures_of_a_proxy_that_is_right_at_small_timesteps_alone():
    judge = Scripted()
    values = scripted(judge).measure()
    assert values["fidelity/kendall_tau/t000-499"] == 1 and values["fidelity/kendall_tau/t500-999"] == -1
    assert values["fidelity/kendall_tau"] == 0 and values["fidelity/pair_accuracy"] == pytest.approx(0.5, abs=0.01)
    assert values["fidelity/gradient_cosine/t000-499"] == 1 and values["fidelity/gradient_cosine"] == 0
    assert len(judge.indices) == 2 * 3 * 9 and {i < 25 for i in judge.indices[:27]} == {True}
    assert len(set(judge.indices)) > 20, "timesteps are drawn from the whole bin"
    noise = torch.cat(judge.noise)
    assert len(noise.unique()) == noise.numel(), "each sample has noise of its own"
    again = Scripted()
    assert scripted(again).measure() == values and torch.equal(torch.cat(again.noise), noise)
    training = tiny.draws(0, 54).normal("noise", (3,))
    assert not torch.isin(noise, training).any(), "and none of the training's"


def test_calibration_error():
    level = torch.zeros(3, 40)
    assert calibration_error(level, level) == 0
    sure = torch.tensor([[9.0], [4.0], [0.0]]).expand(3, 40)
    wanted = sum(1 / (1 + math.exp(-gap)) - 0.5 for gap in (5, 9, 4)) / 3
    assert calibration_error(level, sure) == pytest.approx(wanted, abs=1e-6), "too sure of itself"
    assert calibration_error(sure, sure) == 0


def test_gradient_cosine():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = gradient_cosine(a.view(2, 1, 1, 2), b.view(2, 1, 1, 2))
    assert torch.allclose(found, torch.tensor([1.0, 0.0]))


def test_the_expert_as_its_own_proxy_is_faithful(models):
    section = {"fidelity": {"every": 1, "prompts": 2, "samples": 3, "bins": 2, "data": None}}
    recipe = tiny.recipe(proxy=section, train={"log_every": 1}, data={"num": 4})
    source, own = tiny.TinySource(), pytest.MonkeyPatch()
    own.setattr("rgbench.train.lrm.open_source", lambda section: source)
    through = LRM(recipe, models, tiny.expert(), DecodedExpert(tiny.expert(), models))
    other = LRM(recipe, models, tiny.expert(), tiny.proxy())
    own.undo()
    values, random = through.fidelity.measure(), other.fidelity.measure()
    assert values["fidelity/kendall_tau"] == values["fidelity/pair_accuracy"] == 1
    assert values["fidelity/gradient_cosine"] == pytest.approx(1, abs=1e-4)
    assert random["fidelity/kendall_tau"] < 1 and random["fidelity/gradient_cosine"] < 0.9
    _check_against_scipy(other, random)


def _check_against_scipy(trainer: LRM, values: dict[str, float]) -> None:
    """τ of one bin worked out from the images, outside of the class."""
    seen = []
    score = trainer.fidelity.score_samples
    trainer.fidelity.score_samples = lambda *arguments: seen.append(score(*arguments)) or seen[-1]
    trainer.fidelity.measure()
    taus = [kendalltau(c.expert[0].numpy(), c.proxy[0].numpy()).statistic for c in seen[:2]]
    assert values["fidelity/kendall_tau/t000-499"] == pytest.approx(sum(taus) / 2)


@pytest.fixture
def gated(models, monkeypatch):
    """Makes an LRM whose gate stands at a threshold."""
    monkeypatch.setattr("rgbench.train.lrm.open_source", lambda section: tiny.TinySource())

    def make(gate: float | None) -> LRM:
        section = {"fidelity": {"every": 2, "prompts": 2, "samples": 2, "bins": 1, "gate": gate}}
        recipe = tiny.recipe(proxy=section, train={"log_every": 1})
        return LRM(recipe, models, tiny.expert(), tiny.proxy())

    return make


def run(trainer: LRM, folder, steps: int) -> tuple[Loop, list[dict[str, float]]]:
    directory = RunDirectory(folder).create(trainer.recipe.model_dump(mode="json"), {"status": "running", "step": 0})
    loop = Loop(trainer, tiny.TinySource(), trainer.recipe, directory)
    return loop, [loop.train_step() for _ in range(steps)]


def test_a_closed_gate_is_no_reward_and_an_open_one_no_change(gated, models, tmp_path):
    closed, opened, never = gated(0.99), gated(-0.99), gated(None)
    opened.fidelity.tau = never.fidelity.tau = 1.0
    rows = [run(trainer, tmp_path / str(i), 2)[1] for i, trainer in enumerate((closed, opened, never))]
    assert [row["reward_gate"] for row in rows[0]] == [0, 0] and [row["reward_gate"] for row in rows[1]] == [1, 1]
    assert all(row["loss/reward"] == 0 and row["gradient/reward"] == 0 and row["reward"] != 0 for row in rows[0])
    assert "reward_gate" not in rows[2][0]
    states = [trainer.student.state_dict() for trainer in (closed, opened, never)]
    assert all(torch.equal(value, states[2][name]) for name, value in states[1].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_the_gate_outlives_an_interruption(gated, tmp_path):
    """3 steps ≡ 1 + resume + 2, and what was measured at the first step still holds the gate."""
    straight, parted = gated(0.99), gated(0.99)
    run(straight, tmp_path / "straight", 3)
    loop, _ = run(parted, tmp_path / "parted", 1)
    loop.save()
    again = gated(0.99)
    assert again.fidelity.tau != again.fidelity.tau
    loop = Loop(again, tiny.TinySource(), again.recipe, RunDirectory(tmp_path / "parted"))
    loop.restore()
    assert again.fidelity.tau == parted.fidelity.tau
    for _ in range(2):
        loop.train_step()
    for one, other in ((straight.student, again.student), (straight.proxy, again.proxy)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_measured_when_it_is_logged_and_no_more(gated, tmp_path):
    trainer = gated(None)
    before = {name: value.clone() for name, value in trainer.proxy.state_dict().items()}
    trainer.fidelity.measure()
    assert all(torch.equal(value, before[name]) for name, value in trainer.proxy.state_dict().items())
    assert all(p.grad is None for p in trainer.proxy.parameters())
    rows = run(trainer, tmp_path, 4)[1]
    assert ["fidelity/kendall_tau" in row for row in rows] == [False, True, False, True]
    with pytest.raises(ConfigError, match=r"proxy\.fidelity\.every 3 is no multiple of train\.log_every 2"):
        load_recipe("lrm", ["train.log_every=2", "proxy.fidelity.every=3"])
    with pytest.raises(ConfigError, match="a gate needs every"):
        load_recipe("lrm", ["proxy.fidelity.gate=0.2"])


def test_predictions_are_the_students(gated):
    """The judged predictions are f_θ at the drawn timesteps: a student that changes is judged anew."""
    trainer = gated(None)
    first = trainer.fidelity.measure()
    with torch.no_grad():
        trainer.student.conv_out.weight.mul_(-1)
    assert trainer.fidelity.measure() != first
