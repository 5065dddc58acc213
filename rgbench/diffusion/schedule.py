"""The forward process: z_t = α_t z_0 + σ_t ε (DDPM, arXiv 2006.11239, eq. 4).

| symbol | name | meaning, shape |
|---|---|---|
| ᾱ | ``alphas_cumprod`` | cumulative product of 1 − β, (T,) |
| α_t, σ_t | ``alphas``, ``sigmas`` | √ᾱ_t and √(1 − ᾱ_t) at each sample's t, (B, 1, 1, 1) |
| z | ``latents`` | VAE latents × ``scaling_factor``, (B, C, h, w) |
| t | ``timesteps`` | (B,) int64 in [0, T) |
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View per-sample values (B,) so that they broadcast over ``like`` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def alphas_sigmas(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """α_t = √ᾱ_t and σ_t = √(1 − ᾱ_t) for each sample.

    Args:
        alphas_cumprod: ᾱ, (T,).
        timesteps: (B,) int64 in [0, T).
        like: a tensor (B, ...) whose dtype and number of dimensions the result takes.

    Returns:
        Two tensors (B, 1, ..., 1) that broadcast over ``like``.
    """
    wide = torch.promote_types(like.dtype, torch.float32)  # 1 − ᾱ of a rounded ᾱ near 1 would be 0 in bfloat16
    cumprod = per_sample(alphas_cumprod[timesteps].to(wide), like)
    return cumprod.sqrt().to(like.dtype), (1 - cumprod).sqrt().to(like.dtype)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """z_t = α_t z_0 + σ_t ε.

    Args:
        latents: z_0, (B, C, h, w).
        noise: ε ~ N(0, I), the shape of ``latents``.
        timesteps: t, (B,) int64.
        alphas_cumprod: ᾱ, (T,).
    """
    alphas, sigmas = alphas_sigmas(alphas_cumprod, timesteps, latents)
    return alphas * latents + sigmas * noise


def predicted_x0(model_output: Tensor, latents: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, kind: str) -> Tensor:
    """The clean latents that a model output stands for.

    Args:
        model_output: (B, C, h, w).
        latents: z_t that the model was given, same shape.
        timesteps: t, (B,) int64.
        alphas_cumprod: ᾱ, (T,).
        kind: ``epsilon``, ``v_prediction`` or ``sample``.

    Raises:
        ValueError: another ``kind``.

    Source: DDIM, arXiv 2010.02502, eq. 12; v: progressive distillation, arXiv 2202.00512, appendix D.
    """
    alphas, sigmas = alphas_sigmas(alphas_cumprod, timesteps, latents)
    if kind == "epsilon":
        return (latents - sigmas * model_output) / alphas
    if kind == "v_prediction":
        return alphas * latents - sigmas * model_output
    if kind == "sample":
        return model_output
    raise ValueError(f"prediction type {kind!r}: use epsilon, v_prediction or sample")


def predicted_eps(
    model_output: Tensor, latents: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, kind: str
) -> Tensor:
    """The noise that a model output stands for; arguments as in :func:`predicted_x0`."""
    alphas, sigmas = alphas_sigmas(alphas_cumprod, timesteps, latents)
    if kind == "epsilon":
        return model_output
    if kind == "v_prediction":
        return alphas * model_output + sigmas * latents
    if kind == "sample":
        return (latents - alphas * model_output) / sigmas
    raise ValueError(f"prediction type {kind!r}: use epsilon, v_prediction or sample")


def prediction_of(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, kind: str) -> Tensor:
    """What a model of ``kind`` is to predict at z_t = α_t z_0 + σ_t ε: ε, v = α_t ε − σ_t z_0, or z_0.

    Args:
        latents: z_0, (B, C, h, w).
        noise: ε, same shape.
        timesteps: t, (B,) int64.
        alphas_cumprod: ᾱ, (T,).
        kind: ``epsilon``, ``v_prediction`` or ``sample``.

    Raises:
        ValueError: another ``kind``.
    """
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        alphas, sigmas = alphas_sigmas(alphas_cumprod, timesteps, latents)
        return alphas * noise - sigmas * latents
    if kind == "sample":
        return latents
    raise ValueError(f"prediction type {kind!r}: use epsilon, v_prediction or sample")


def check_timesteps(timesteps: list[int], num_train_timesteps: int) -> Tensor:
    """Sampling timesteps as a tensor (num_steps,) int64.

    Raises:
        ValueError: a timestep lies outside [0, ``num_train_timesteps``).
    """
    if not timesteps or min(timesteps) < 0 or max(timesteps) >= num_train_timesteps:
        raise ValueError(f"timesteps {timesteps} do not lie in [0, {num_train_timesteps}): take another step count")
    return torch.tensor(timesteps, dtype=torch.int64)
