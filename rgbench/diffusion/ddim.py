"""The DDIM solver of consistency distillation (LCM, arXiv 2310.04378, eq. 17; DDIM, arXiv 2010.02502, eq. 12).

The grid has N points t = k·(1..N) − 1 with k = T // N. One step leads from a grid point to the one below it; below
the lowest lies t = 0, so that ᾱ_0 is the boundary there.

| symbol | name | meaning, shape |
|---|---|---|
| N, k | ``num_ddim_timesteps``, ``skip`` | grid points, and the timesteps between two of them |
| t_{n+k}, t_n | ``start_timesteps``, ``timesteps`` | the point drawn and the one below, (B,) int64 |
| w | ``guidance_scale`` | LCM form: c + w(c − u), (B,) |
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgbench.diffusion.schedule import Schedule, alphas_sigmas, per_sample, predicted_eps, predicted_x0


def grid_step(num_train_timesteps: int, num_ddim_timesteps: int) -> int:
    """k = T // N.

    Raises:
        ValueError: N is not in [1, T].
    """
    if not 1 <= num_ddim_timesteps <= num_train_timesteps:
        raise ValueError(f"num_ddim_timesteps is {num_ddim_timesteps}: use 1 to {num_train_timesteps}")
    return num_train_timesteps // num_ddim_timesteps


def ddim_grid(num_train_timesteps: int, num_ddim_timesteps: int) -> Tensor:
    """The ascending grid t = k·(1..N) − 1, (N,) int64: 19, 39 … 999 for T = 1000, N = 50."""
    skip = grid_step(num_train_timesteps, num_ddim_timesteps)
    return torch.arange(1, num_ddim_timesteps + 1) * skip - 1


def grid_timesteps(index: Tensor, num_train_timesteps: int, num_ddim_timesteps: int) -> tuple[Tensor, Tensor]:
    """t_{n+k} and t_n = max(t_{n+k} − k, 0) of grid indices.

    Args:
        index: (B,) int64 in [0, N).
        num_train_timesteps: T.
        num_ddim_timesteps: N.

    Returns:
        ``start_timesteps`` and ``timesteps``, (B,) int64 each.
    """
    grid = ddim_grid(num_train_timesteps, num_ddim_timesteps).to(index.device)
    start_timesteps = grid[index]
    skip = grid_step(num_train_timesteps, num_ddim_timesteps)
    return start_timesteps, (start_timesteps - skip).clamp(min=0)


def ddim_jump(x0: Tensor, eps: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """z_s = √ᾱ_s x̂0 + √(1 − ᾱ_s) ε̂ at s = ``timesteps`` (B,)."""
    alphas, sigmas = alphas_sigmas(schedule, timesteps, x0)
    return alphas * x0 + sigmas * eps


def jump(
    model_output: Tensor,
    latents: Tensor,
    timesteps: Tensor,
    lower: Tensor,
    schedule: Schedule,
    prediction_type: str,
) -> Tensor:
    """F(z_t, t → s) = α_s x̂0 + σ_s ε̂ of a network's output; z_t itself where s = t.

    Args:
        model_output: (B, C, h, w).
        latents: z_t, same shape.
        timesteps: t, (B,) int64.
        lower: s ≤ t, (B,) int64.
        schedule: ᾱ, (T,), or a flow.
        prediction_type: what the network predicts.

    Source: TCD, arXiv 2402.19159, "TCF(1)"; the parametrisation is that of CTM, arXiv 2310.02279.
    """
    origin = (latents, timesteps, schedule, prediction_type)
    end = ddim_jump(predicted_x0(model_output, *origin), predicted_eps(model_output, *origin), lower, schedule)
    return torch.where(per_sample(lower == timesteps, latents), latents, end)


def jump_factors(timesteps: Tensor, lower: Tensor, schedule: Schedule, like: Tensor) -> tuple[Tensor, Tensor]:
    """ρ = σ_s/σ_t and κ = α_s − α_t ρ of a jump z_s = ρ z_t + κ x̂0, (B, 1, ..., 1) each.

    Args:
        timesteps: t > 0, (B,) int64.
        lower: s ≤ t, (B,) int64.
        schedule: ᾱ, (T,), or a flow.
        like: a tensor (B, ...) whose dtype and number of dimensions the result takes.
    """
    alphas, sigmas = alphas_sigmas(schedule, timesteps, like)
    lower_alphas, lower_sigmas = alphas_sigmas(schedule, lower, like)
    ratio = lower_sigmas / sigmas
    return ratio, lower_alphas - alphas * ratio


def guided_ddim_step(
    cond_output: Tensor,
    uncond_output: Tensor,
    latents: Tensor,
    start_timesteps: Tensor,
    timesteps: Tensor,
    guidance_scale: Tensor,
    schedule: Schedule,
    prediction_type: str,
) -> Tensor:
    """One guided DDIM jump of the teacher, z_{n+k} → z_n.

    Guidance c + w(c − u) acts on x0 and on ε **each**, after their separate conversion (docs/method.md, LCD, line 6).
    Of a flow it is the guided Euler step z + (σ_n − σ_{n+k}) (c + w(c − u)) of the velocity.

    Args:
        cond_output: teacher's output on the prompt, (B, C, h, w).
        uncond_output: on the empty prompt, same shape.
        latents: z_{n+k}, same shape.
        start_timesteps: t_{n+k}, (B,) int64.
        timesteps: t_n, (B,) int64.
        guidance_scale: w, (B,).
        schedule: ᾱ, (T,), or a flow.
        prediction_type: of the teacher.
    """
    w = per_sample(guidance_scale.to(latents.dtype), latents)
    origin = (latents, start_timesteps, schedule, prediction_type)
    cond_x0, uncond_x0 = predicted_x0(cond_output, *origin), predicted_x0(uncond_output, *origin)
    cond_eps, uncond_eps = predicted_eps(cond_output, *origin), predicted_eps(uncond_output, *origin)
    x0 = cond_x0 + w * (cond_x0 - uncond_x0)
    eps = cond_eps + w * (cond_eps - uncond_eps)
    return ddim_jump(x0, eps, timesteps, schedule)
