"""Schedule, DDIM solver and consistency functions against diffusers and closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from rgbench.diffusion.consistency import (
    boundary_scalings,
    consistency_function,
    guidance_embedding,
    pseudo_huber,
    squared_error,
)
from rgbench.diffusion.ddim import ddim_grid, ddim_jump, grid_timesteps, guided_ddim_step
from rgbench.diffusion.schedule import add_noise, predicted_eps, predicted_x0

KINDS = ("epsilon", "v_prediction", "sample")
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CUMPROD = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_grid():
    assert ddim_grid(1000, 50).tolist() == list(range(19, 1000, 20))
    assert ddim_grid(1000, 30)[[0, -1]].tolist() == [32, 989]
    start, below = grid_timesteps(torch.tensor([0, 1, 49]), 1000, 50)
    assert start.tolist() == [19, 39, 999] and below.tolist() == [0, 19, 979]
    for n in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            ddim_grid(1000, n)


@pytest.mark.parametrize("steps", [1, 7, 25, 50])
def test_the_grid_is_diffusers_trailing_spacing(steps):
    scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    if 1000 % steps == 0:
        assert ddim_grid(1000, steps).flip(0).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_ddim_step_is_diffusers(kind):
    """The whole grid, lowest point (t_n = 0, ᾱ_0) included, unguided."""
    scheduler = DDIMScheduler(
        **SCHEDULE, prediction_type=kind, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False
    )
    scheduler.set_timesteps(50)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = CUMPROD, CUMPROD[0]
    latents, output = randn(50, 4, 4, 4), randn(50, 4, 4, 4, seed=1)
    start, below = grid_timesteps(torch.arange(50), 1000, 50)
    w = torch.zeros(50, dtype=torch.float64)
    ours = guided_ddim_step(output, randn(50, 4, 4, 4, seed=2), latents, start, below, w, CUMPROD, kind)
    for i in range(50):
        theirs = scheduler.step(output[i], int(start[i]), latents[i]).prev_sample
        assert torch.allclose(ours[i], theirs, rtol=1e-12, atol=1e-12)


def test_guidance_acts_on_x0_and_eps_each():
    latents, cond, uncond = (randn(2, 4, 4, 4, seed=s) for s in range(3))
    start, below = torch.tensor([999, 19]), torch.tensor([979, 0])
    w = torch.tensor([3.0, 7.0], dtype=torch.float64)[:, None, None, None]
    ours = guided_ddim_step(cond, uncond, latents, start, below, w.flatten(), CUMPROD, "v_prediction")
    parts = []
    for convert in (predicted_x0, predicted_eps):
        c, u = (convert(m, latents, start, CUMPROD, "v_prediction") for m in (cond, uncond))
        parts.append(c + w * (c - u))
    assert torch.allclose(ours, ddim_jump(*parts, below, CUMPROD))


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_invert_the_forward_process(kind):
    latents, noise = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    t = torch.tensor([0, 500, 999])
    noisy = add_noise(latents, noise, t, CUMPROD)
    velocity = DDPMScheduler(**SCHEDULE)
    velocity.alphas_cumprod = CUMPROD
    output = {"epsilon": noise, "sample": latents, "v_prediction": velocity.get_velocity(latents, noise, t)}[kind]
    assert torch.allclose(predicted_x0(output, noisy, t, CUMPROD, kind), latents, atol=1e-9)
    assert torch.allclose(predicted_eps(output, noisy, t, CUMPROD, kind), noise, atol=1e-9)


def test_unknown_prediction_type():
    z = randn(1, 4, 2, 2)
    for convert in (predicted_x0, predicted_eps):
        with pytest.raises(ValueError, match="use epsilon, v_prediction or sample"):
            convert(z, z, torch.tensor([1]), CUMPROD, "flow")


@pytest.mark.parametrize("scaling", [10.0, 1.0])
def test_boundary_scalings_are_diffusers(scaling):
    scheduler = LCMScheduler(timestep_scaling=scaling)
    t = torch.tensor([0, 1, 19, 999])
    c_skip, c_out = boundary_scalings(t, scaling, torch.float64)
    for i, step in enumerate(t.tolist()):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(step)
        assert float(c_skip[i]) == pytest.approx(skip, rel=1e-12) and float(c_out[i]) == pytest.approx(out, rel=1e-12)
    assert c_skip[0] == 1 and c_out[0] == 0


def test_the_consistency_function_is_the_identity_at_zero():
    z, output = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    assert torch.equal(consistency_function(output, z, torch.tensor([0]), CUMPROD, "sample", 10.0), z)


@pytest.mark.parametrize("dim", [4, 16, 17, 256])
def test_guidance_embedding_is_diffusers_bit_for_bit(dim):
    w = torch.linspace(0, 14, 29)
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    assert torch.equal(guidance_embedding(w, dim), embed(None, w, embedding_dim=dim))


def test_guidance_embedding_has_the_sine_first():
    embedding = guidance_embedding(torch.tensor([0.0]), 8)
    assert embedding.tolist() == [[0.0] * 4 + [1.0] * 4]


def test_losses_are_per_sample():
    a, b = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    huber, squared = pseudo_huber(a, b, 0.1), squared_error(a, b)
    assert huber.shape == squared.shape == (3,)
    assert torch.allclose(huber[1], (((a[1] - b[1]) ** 2 + 0.01).sqrt() - 0.1).mean())
    assert torch.allclose(squared[2], ((a[2] - b[2]) ** 2).mean())
    assert torch.equal(pseudo_huber(a, a, 0.1), torch.zeros(3, dtype=torch.float64))
