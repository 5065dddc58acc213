"""MLCM: its edges and stages, telescoping of its fixed point for every M and p, and what it nests."""

from __future__ import annotations

import math

import pytest
import torch

from rgbench.core.errors import ConfigError
from rgbench.diffusion.ddim import ddim_grid, jump_factors
from rgbench.train.mlcm import MLCMInputs, distil, lower_edges
from rgbench.train.recipe import MLCMSection, MLCMSolverSection, load_recipe
from tests import gaussian
from tests.gaussian import Linear
from tests.parity import tiny
from tests.tiny_trainers import assert_equal, backward, batch, make

GRID = ddim_grid(1000, 50).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("mlcm") / "teacher")


# ---- edges and stages -------------------------------------------------------------------


def test_edges_are_the_samplers_timesteps():
    t = torch.tensor([19, 259, 279, 499, 519, 759, 779, 999])
    assert lower_edges(t, 4, 50, 1000).tolist() == [0, 0, 259, 259, 499, 499, 759, 759]
    assert lower_edges(t, 1, 50, 1000).tolist() == [0] * 8
    assert lower_edges(torch.tensor(GRID), 50, 50, 1000).tolist() == [0, *GRID[:-1]]


def test_a_stage_is_a_function_of_the_step():
    own = MLCMSection.model_validate(
        {"stages": [{"segments": 8, "steps": 2}, {"segments": 4, "steps": 3}, {"segments": 1}]}, strict=False
    )
    assert [own.segments(step) for step in range(8)] == [8, 8, 4, 4, 4, 1, 1, 1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampling.steps=3"], "sampling.steps 3: at gamma 0 the 4 segments"),
        (["mlcm.stages=[{segments: 8, steps: 300}, {segments: 4}]"], "the last begins at step 300, train.steps is 250"),
        (["mlcm.stages=[{segments: 8}, {segments: 4}]"], "give each its steps, but not the last"),
        (["mlcm.stages=[{segments: 4, steps: 4}]"], "give each its steps, but not the last"),
        (["mlcm.stages=[{segments: 51}]"], "51 segments of a grid of 50 points"),
        (["mlcm.weight=snr"], "use space: x0"),
        (["mlcm.stages=[]"], "stages"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe("mlcm", overrides)
    load_recipe("mlcm", ["sampling.steps=3", "sampling.gamma=0.3"])


# ---- the fixed point --------------------------------------------------------------------


def fixed_point(segments: int, teacher_steps: int = 1, **own) -> Linear:
    """The student at the minimum of the real step's loss."""
    student = Linear(torch.zeros(1000, dtype=torch.float64))
    networks = gaussian.networks(student)
    settings = MLCMSolverSection(teacher_steps=teacher_steps)
    one, row = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)

    def loss(index: int) -> torch.Tensor:
        inputs = MLCMInputs(one, one / 3, row, row, torch.tensor([index]), torch.tensor([7.0]), segments)
        return distil(networks, settings, MLCMSection(**own), inputs).losses.sum()

    gaussian.solve_fixed_point(student, loss, GRID)
    return student


def teacher_std(teacher_steps: int = 1) -> float:
    """Of the teacher's N·p DDIM steps from z_999 ~ N(0, 1)."""
    lower = [0, *GRID[:-1]]
    return math.prod(gaussian.teacher_factor(t, s, teacher_steps) for t, s in zip(GRID, lower, strict=True))


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7, 8, 16, 25, 50])
def test_steps_from_edge_to_edge_are_the_teachers_whole_path(segments):
    """Telescoping, for every M: with unlimited capacity, the number of segments does not matter."""
    found = gaussian.sampled_std(fixed_point(segments), segments, 0.0)
    assert found == pytest.approx(teacher_std(), rel=0, abs=1e-10)
    assert found == pytest.approx(0.676324, abs=1e-6)


@pytest.mark.parametrize(("teacher_steps", "std"), [(5, 0.6959), (10, 0.6985)])
def test_more_teacher_steps_are_more_exact(teacher_steps, std):
    student = fixed_point(4, teacher_steps)
    found = gaussian.sampled_std(student, 4, 0.0)
    assert found == pytest.approx(teacher_std(teacher_steps), rel=0, abs=1e-10)
    assert found == pytest.approx(std, abs=5e-5)  # truth: 0.70114


def test_another_number_of_steps_is_not_the_teachers_path():
    assert gaussian.sampled_std(fixed_point(50), 4, 0.0) == pytest.approx(0.4589, abs=2e-4)


@pytest.mark.parametrize("own", [{"space": "x0"}, {"space": "x0", "weight": "snr"}])
def test_the_space_of_the_distance_moves_no_optimum(own):
    edge, other = fixed_point(4), fixed_point(4, **own)
    for t in GRID:
        assert float(other.factors.data[t]) == pytest.approx(float(edge.factors.data[t]), rel=0, abs=1e-10)


# ---- the step ---------------------------------------------------------------------------


def distilled(folder, kind: str = "mlcm", dtype: torch.dtype = torch.float32, target=1.0, **sections):
    trainer = make(kind, tiny.models(folder, dtype), **sections)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for network, scale in ((trainer.student, 1.0), (trainer.target, target)):
            network.conv_out.weight += scale * 0.1 * torch.randn(network.conv_out.weight.shape, generator=generator)
    return trainer.distil(trainer.prepare(batch(), tiny.draws(dtype=dtype)))


def test_a_distance_at_the_edge_is_kappa_squared_times_one_in_x0(folder):
    edge, x0, weighted = (
        distilled(folder, dtype=torch.float64, mlcm={"space": space, "weight": weight})
        for space, weight in (("edge", "one"), ("x0", "one"), ("x0", "snr"))
    )
    t, cumprod = edge.start_timesteps, tiny.models(folder, torch.float64).schedule
    _, kappa = jump_factors(t, lower_edges(t, 8, 50, 1000), cumprod, edge.losses)
    assert torch.allclose(edge.losses, kappa**2 * x0.losses, rtol=1e-9)
    snr = cumprod[t].double() / (1 - cumprod[t].double())
    assert torch.allclose(weighted.losses, (snr + 1) * x0.losses, rtol=1e-6)


def test_it_follows_the_network_that_is_asked_for(folder):
    losses = {
        (target, scale): distilled(folder, target=scale, mlcm={"target": target}).losses
        for target in ("ema", "student")
        for scale in (1.0, 5.0)
    }
    assert torch.equal(losses["student", 1.0], losses["student", 5.0])
    assert not torch.equal(losses["ema", 1.0], losses["ema", 5.0])
    assert not torch.equal(losses["ema", 1.0], losses["student", 1.0])


def at_clean_zero(models):
    """ᾱ_0 = 1, where a jump to 0 is x̂0 itself."""
    models.schedule[0] = 1.0
    return models


def test_one_segment_is_lcd_without_its_boundary_scalings(folder, monkeypatch):
    def bare(timesteps, scaling, dtype):
        return torch.zeros(len(timesteps), dtype=dtype), torch.ones(len(timesteps), dtype=dtype)

    monkeypatch.setattr("rgbench.diffusion.consistency.boundary_scalings", bare)
    one = {"mlcm": {"stages": [{"segments": 1}], "target": "ema"}, "sampling": {"steps": 1}}
    trainers = [
        make(kind, at_clean_zero(tiny.models(folder)), lcd={"loss": "huber", "teacher_steps": steps}, **own)
        for kind, own, steps in (("lcd", {}, 1), ("mlcm", one, 1), ("mlcm", one, 3))
    ]
    results = [trainer.step(batch(), tiny.draws()) for trainer in trainers]
    lcd, same, finer = (result.losses["student"]["lcd"] for result in results)
    assert torch.equal(lcd, same) and not torch.equal(lcd, finer)
    for result in results[:2]:
        backward(result, "student")
    assert_equal(*({n: p.grad for n, p in trainer.student.named_parameters()} for trainer in trainers[:2]))


def test_a_segment_a_point_is_regression_on_the_teachers_step(folder):
    whole = {"mlcm": {"stages": [{"segments": 50}], "target": "ema"}, "sampling": {"steps": 50}}
    mlcm, unread = (distilled(folder, target=scale, lcd={"loss": "l2"}, **whole) for scale in (1.0, 5.0))
    tcd = distilled(folder, "tcd", lcd={"loss": "l2"}, tcd={"s": "next"})
    assert torch.equal(mlcm.losses, unread.losses) and torch.equal(mlcm.losses, tcd.losses)
