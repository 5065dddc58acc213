"""TCD: its jump, where it ends, its fixed point in a closed form, what it nests, and its sampler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler

from rgbench.core.errors import ConfigError
from rgbench.diffusion.consistency import squared_error
from rgbench.diffusion.ddim import ddim_grid, ddim_jump, jump, jump_factors
from rgbench.diffusion.sampling import lcm_timesteps, tcd_sample
from rgbench.diffusion.schedule import predicted_eps, predicted_x0
from rgbench.models.student import make_student
from rgbench.train.recipe import TCDSection, TCDSolverSection, load_recipe
from rgbench.train.tcd import TCDInputs, distil, jump_to
from tests import gaussian
from tests.gaussian import CUMPROD, Linear
from tests.parity import tiny
from tests.tiny_trainers import assert_equal, backward, batch, make

KINDS = ["epsilon", "v_prediction", "sample"]
GRID = ddim_grid(1000, 50).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("tcd") / "teacher")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- the jump ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_jump_to_its_own_timestep_is_exact_and_others_are_linear_in_x0(kind):
    t = torch.tensor([19, 499, 759, 999])
    z, output = numbers(2, 4, 1, 2, 2)
    assert torch.equal(jump(output, z, t, t, CUMPROD, kind), z)
    assert torch.equal(jump(output.float(), z.float(), t, t, CUMPROD, kind), z.float())
    s = torch.tensor([0, 19, 239, 979])
    ratio, kappa = jump_factors(t, s, CUMPROD, z)
    x0, eps = predicted_x0(output, z, t, CUMPROD, kind), predicted_eps(output, z, t, CUMPROD, kind)
    found = jump(output, z, t, s, CUMPROD, kind)
    assert torch.allclose(found, ratio * z + kappa * x0, rtol=0, atol=1e-13)
    h = ((CUMPROD[s] / (1 - CUMPROD[s])).log() - (CUMPROD[t] / (1 - CUMPROD[t])).log()).view(-1, 1, 1, 1) / 2
    alphas, lower_alphas, lower_sigmas = (x.sqrt().view(-1, 1, 1, 1) for x in (CUMPROD[t], CUMPROD[s], 1 - CUMPROD[s]))
    semilinear = lower_alphas / alphas * z - lower_sigmas * (h.exp() - 1) * eps
    assert torch.allclose(found, semilinear, rtol=0, atol=1e-12)


def test_s_is_uniform_on_the_places_at_or_below_t_n():
    index = torch.tensor([0, 1, 4] * 4000)
    fraction = torch.rand(len(index), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(len(index), 1)
    inputs = TCDInputs(zeros, zeros, zeros, zeros, index, zeros, fraction)
    s = jump_to(TCDSection(), inputs, 1000, 50)
    assert set(s[0::3].tolist()) == {0}
    for rows, places in ((s[1::3], [0, 19]), (s[2::3], [0, 19, 39, 59, 79])):
        counts = torch.tensor([int((rows == place).sum()) for place in places])
        assert counts.sum() == 4000 and (counts - 4000 / len(places)).abs().max() < 150
    assert jump_to(TCDSection(s="zero"), inputs, 1000, 50).unique().tolist() == [0]
    assert jump_to(TCDSection(s="next"), inputs, 1000, 50).unique().tolist() == [0, 19, 79]
    last = torch.full_like(fraction, 1 - 2**-24)
    ends = jump_to(TCDSection(), TCDInputs(zeros, zeros, zeros, zeros, index, zeros, last), 1000, 50)
    assert torch.equal(ends, jump_to(TCDSection(s="next"), inputs, 1000, 50)), "never above t_n"


# ---- nesting ----------------------------------------------------------------------------


def at_clean_zero(models):
    """ᾱ_0 = 1, where a jump to 0 is x̂0 itself."""
    models.schedule[0] = 1.0
    return models


def test_jumps_to_zero_are_lcd_without_its_boundary_scalings(folder, monkeypatch):
    def bare(timesteps, scaling, dtype):
        return torch.zeros(len(timesteps), dtype=dtype), torch.ones(len(timesteps), dtype=dtype)

    monkeypatch.setattr("rgbench.diffusion.consistency.boundary_scalings", bare)
    sections = {"lcd": {"loss": "huber", "teacher_steps": 2}}
    lcd, tcd = (
        make(kind, at_clean_zero(tiny.models(folder)), **sections, **own)
        for kind, own in (("lcd", {}), ("tcd", {"tcd": {"s": "zero"}}))
    )
    results = [trainer.step(batch(), tiny.draws()) for trainer in (lcd, tcd)]
    assert torch.equal(*(result.losses["student"]["lcd"] for result in results))
    for trainer, result in zip((lcd, tcd), results, strict=True):
        backward(result, "student")
        trainer.after_update(["student"])
    gradients = [{n: p.grad for n, p in trainer.student.named_parameters()} for trainer in (lcd, tcd)]
    assert_equal(*gradients)


def test_jumps_to_the_next_point_are_regression_on_the_teacher(folder):
    trainer = make("tcd", tiny.models(folder), tcd={"s": "next"})
    torch.nn.init.normal_(trainer.student.conv_out.weight)
    inputs = trainer.prepare(batch(), tiny.draws())
    distilled = trainer.distil(inputs)
    with torch.no_grad():
        output = trainer.student(
            distilled.noisy,
            distilled.start_timesteps,
            encoder_hidden_states=inputs.prompt_embeds,
            timestep_cond=distilled.w_embedding,
        ).sample
    origin = (output, distilled.noisy, distilled.start_timesteps, trainer.models.schedule, "epsilon")
    end = ddim_jump(predicted_x0(*origin), predicted_eps(*origin), distilled.timesteps, trainer.models.schedule)
    assert torch.allclose(distilled.losses, squared_error(end, distilled.previous), rtol=1e-4)
    torch.nn.init.normal_(trainer.target.conv_out.weight, std=3.0)  # which is not asked
    assert torch.equal(trainer.distil(inputs).losses, distilled.losses)


# ---- the fixed point --------------------------------------------------------------------


def step_inputs(index: int, fractions: torch.Tensor) -> TCDInputs:
    """One sample a place of s, all with one noisy latent."""
    num = len(fractions)
    ones, rows = torch.ones(num, 1, 1, 1, dtype=torch.float64), torch.zeros(num, 1, 1, dtype=torch.float64)
    return TCDInputs(ones, ones / 3, rows, rows, torch.full((num,), index), torch.full((num,), 3.0), fractions)


@pytest.fixture(scope="module")
def fixed_points() -> dict[str, Linear]:
    """Students of the real step's loss at its minimum."""
    found = {}
    for s in ("uniform", "zero"):
        student = Linear(torch.zeros(1000, dtype=torch.float64))
        networks, settings = gaussian.networks(student), TCDSolverSection(time_cond_proj_dim=None)

        def loss(index: int, s=s, networks=networks, settings=settings) -> torch.Tensor:
            fractions = (torch.arange(index + 1, dtype=torch.float64) + 0.5) / (index + 1)
            return distil(networks, settings, TCDSection(s=s), step_inputs(index, fractions)).losses.sum()

        gaussian.solve_fixed_point(student, loss, GRID)
        found[s] = student
    return found


def expected(places) -> dict[int, float]:
    """g_t = Σ κ_s (F_s − σ_s/σ_t) / Σ κ_s² by recursion over the grid."""
    alpha, sigma, g = gaussian.ALPHA.tolist(), gaussian.SIGMA.tolist(), {}
    for index, t in enumerate(GRID):
        t_n = max(t - 20, 0)
        above = below = 0.0
        for s in places(index):
            end = 1.0 if s == t_n else gaussian.factor(t_n, s, g[t_n])
            end *= gaussian.teacher_factor(t, t_n)
            kappa = alpha[s] - alpha[t] * sigma[s] / sigma[t]
            above += kappa * (end - sigma[s] / sigma[t])
            below += kappa**2
        g[t] = above / below
    return g


def test_the_steps_fixed_point_is_the_closed_form(fixed_points):
    forms = {"uniform": lambda index: [0, *GRID[:index]], "zero": lambda index: [0]}
    for s, places in forms.items():
        for t, value in expected(places).items():
            assert float(fixed_points[s].factors.data[t]) == pytest.approx(value, rel=0, abs=1e-10), (s, t)
    table = {259: (0.76221, 0.81980), 499: (0.57862, 0.71013), 759: (0.45928, 0.65995), 999: (0.40625, 0.64867)}
    for t, values in table.items():
        found = [float(fixed_points[s].factors.data[t]) for s in ("uniform", "zero")]
        assert found == pytest.approx(values, abs=1e-5)


def test_small_gamma_fits_the_students_mean_over_s(fixed_points):
    wanted = {"uniform": (0.78857, 0.70599, 0.56757), "zero": (0.99062, 0.86243, 0.66885)}
    for s, values in wanted.items():
        found = [gaussian.sampled_std(fixed_points[s], 4, gamma) for gamma in (0.0, 0.3, 1.0)]
        assert found == pytest.approx(values, abs=1e-4), s


def test_noise_up_to_the_next_timestep_keeps_the_marginal():
    for t in (759, 499, 259):
        s = int((1 - 0.3) * t)
        ratio = CUMPROD[t] / CUMPROD[s]
        assert float(ratio * gaussian.VARIANCE[s] + 1 - ratio) == pytest.approx(float(gaussian.VARIANCE[t]), abs=1e-14)


# ---- the sampler ------------------------------------------------------------------------


class Recorded:
    """A network that answers with fixed numbers of (z, t)."""

    def __init__(self, dim: int | None) -> None:
        self.config = type("Config", (), {"time_cond_proj_dim": dim})

    def __call__(self, latents, t, **unused):
        return ((latents * 0.7 + t / 1000).sin(),)


def generators(num: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(num)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_sampler_is_diffusers(kind, gamma):
    """At a grid of 25, whose scheduler's default of 50 would show."""
    scheduler = TCDScheduler(original_inference_steps=25, prediction_type=kind)
    embeds, unet = torch.zeros(3, 1, 1), Recorded(16)
    for steps in (1, 2, 4, 7, 25):
        scheduler.set_timesteps(steps)
        assert lcm_timesteps(steps, 25, 1000).tolist() == scheduler.timesteps.tolist()
        theirs, ours = generators(3), generators(3)
        z = torch.cat([torch.randn(1, 4, 2, 2, generator=g) for g in theirs])
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t)[0], t, z, eta=gamma, generator=theirs, return_dict=False)[0]
        options = {"num_steps": steps, "guidance_scale": 4.0, "latent_shape": (4, 2, 2)}
        settings = {"original_steps": 25, "gamma": gamma}
        found = tcd_sample(unet, scheduler.alphas_cumprod, kind, embeds, embeds, ours, **options, **settings)
        assert (found - z).abs().max() <= 2e-6 * max(1.0, float(z.abs().max()))
        for a, b in zip(theirs, ours, strict=True):
            assert torch.equal(torch.randn(1, generator=a), torch.randn(1, generator=b)), "as many draws"


def test_without_gamma_it_is_ddim_along_the_same_timesteps():
    scheduler, unet = DDIMScheduler(beta_schedule="scaled_linear"), Recorded(16)
    cumprod, embeds = scheduler.alphas_cumprod, torch.zeros(2, 1, 1)
    z = torch.cat([torch.randn(1, 4, 2, 2, generator=g) for g in generators(2)])
    for t, s in zip([999, 759, 499, 259], [759, 499, 259, 0], strict=True):
        t_B, s_B = torch.full((2,), t), torch.full((2,), s)
        output = unet(z, torch.tensor(t))[0]
        origin = (output, z, t_B, cumprod, "epsilon")
        z = ddim_jump(predicted_x0(*origin), predicted_eps(*origin), s_B, cumprod)
    options = {"num_steps": 4, "guidance_scale": 4.0, "latent_shape": (4, 2, 2), "original_steps": 50, "gamma": 0.0}
    assert torch.equal(tcd_sample(unet, cumprod, "epsilon", embeds, embeds, generators(2), **options), z)


def test_the_guidance_reaches_a_student_that_is_told(folder):
    models = tiny.models(folder)
    student = make_student(models.unet, 16)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight)
    told = models.with_student(student, 25, 10.0, 0.3)
    images = [told.sample(tiny.PROMPTS[:2], generators(2), num_steps=2, guidance_scale=scale) for scale in (2.0, 5.0)]
    assert told.sampler == "tcd" and (images[0] - images[1]).abs().max() > 1e-4


# ---- recipes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lcd.timestep_scaling=7", "lcd.timestep_scaling"),
        ("sampling.gamma=1.5", "sampling.gamma"),
        ("tcd.s=all", "tcd.s"),
        ("lcd.teacher_steps=20", "teacher_steps 20"),
        ("reward.kind=hps", "reward"),
    ],
)
def test_what_tcd_cannot_do_is_refused(override, key):
    with pytest.raises(ConfigError, match=key):
        load_recipe("tcd", [override])
