"""A world of normal numbers, where teacher, student and every fixed point have closed forms.

Data N(0, c²), so that V_t = α_t² c² + σ_t² and the teacher predicts x̂0 = G_t z with G_t = α_t c²/V_t. A student is one
number a timestep, x̂0 = g_t z.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from rgbench.diffusion import sampling
from rgbench.diffusion.sampling import tcd_sample
from rgbench.train.lcd import Networks

C = 0.7
CUMPROD = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
ALPHA, SIGMA = CUMPROD.sqrt(), (1 - CUMPROD).sqrt()
VARIANCE = ALPHA**2 * C**2 + SIGMA**2
TEACHER = ALPHA * C**2 / VARIANCE  # G_t


class Linear(nn.Module):
    """Predicts the sample: x̂0 = g_t z."""

    config = SimpleNamespace(time_cond_proj_dim=None)

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors.clone())

    def forward(self, latents: Tensor, timesteps: Tensor, **unused: object) -> tuple[Tensor]:
        return (self.factors[timesteps].view(-1, 1, 1, 1) * latents,)


def networks(student: Linear, target: Linear | None = None) -> Networks:
    return Networks(Linear(TEACHER), student, target or student, CUMPROD, "sample")  # type: ignore[arg-type]


def factor(t: int, s: int, g: float) -> float:
    """Of a jump by x̂0 = g z: z_s = factor · z_t."""
    return float(ALPHA[s] * g + SIGMA[s] * (1 - ALPHA[t] * g) / SIGMA[t])


def teacher_factor(t: int, s: int, num: int = 1) -> float:
    """Of ``num`` DDIM steps of the teacher at whole timesteps."""
    times, product = [t - round(i * (t - s) / num) for i in range(num + 1)], 1.0
    for first, second in pairwise(times):
        product *= factor(first, second, float(TEACHER[first]))
    return product


def solve_fixed_point(student: Linear, loss, grid: list[int]) -> None:
    """Set each g_t, from the lowest up, to the minimum of the real step's loss, quadratic in g_t.

    Args:
        loss: of the grid's index, a scalar that is differentiable in ``student.factors``.
        grid: ascending.
    """
    for index, t in enumerate(grid):
        slopes = []
        for value in (0.0, 1.0):
            student.factors.data[t] = value
            slopes.append(float(torch.autograd.grad(loss(index), student.factors)[0][t]))
        student.factors.data[t] = slopes[0] / (slopes[0] - slopes[1])


def sampled_std(student: Linear, num_steps: int, gamma: float) -> float:
    """Of images of the real sampler from z_999 ~ N(0, 1): row i gets draw i's noise alone, and variances add up."""
    num_draws = 1 + (num_steps - 1 if gamma > 0 else 0)
    units, drawn = torch.eye(num_draws, dtype=torch.float64).view(num_draws, num_draws, 1, 1, 1), iter(range(num_draws))

    def draw(*unused: object) -> Tensor:
        return units[next(drawn)]

    embeds = torch.zeros(num_draws, 1, 1, dtype=torch.float64)
    with mock.patch.object(sampling, "draw_noise", draw):
        z = tcd_sample(
            student,
            CUMPROD,
            "sample",
            embeds,
            embeds,
            [],
            num_steps=num_steps,
            guidance_scale=1.0,
            latent_shape=(1, 1, 1),
            original_steps=50,
            gamma=gamma,
        )
    return float(z.square().sum().sqrt())
