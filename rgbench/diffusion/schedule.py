"""The forward process: z_t = α_t z_0 + σ_t ε (DDPM, arXiv 2006.11239, eq. 4; rectified flow, arXiv 2209.03003).

A schedule is ᾱ of a variance-preserving process, or a :class:`Flow`.

| symbol | name | meaning, shape |
|---|---|---|
| ᾱ | ``schedule`` | cumulative product of 1 − β, (T,) |
| α_t, σ_t | ``alphas``, ``sigmas`` | √ᾱ_t, √(1 − ᾱ_t); of a flow 1 − σ_t, σ_t; at each sample's t, (B, 1, 1, 1) |
| z | ``latents`` | VAE latents × ``scaling_factor``, (B, C, h, w) |
| t | ``timesteps`` | (B,) int64 in [0, T) |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOW = "flow_prediction"  # diffusers' name for a velocity of the straight path, ε − z_0
KINDS = "epsilon, v_prediction or sample, or flow_prediction with a flow"


@dataclass(frozen=True)
class Flow:
    """Straight path z_t = (1 − σ_t) z_0 + σ_t ε, whose velocity ε − z_0 a network of kind :data:`FLOW` predicts.

    Attributes:
        sigmas: σ_t, (T,) ascending from 0 to 1, so that t = 0 is the data itself.
    """

    sigmas: Tensor

    @classmethod
    def shifted(cls, shift: float, num: int = 1000) -> Flow:
        """σ_t = s x/(1 + (s − 1) x) at x = (t + 1)/T, float64, and σ_0 = 0.

        Args:
            shift: s (Esser et al., arXiv 2403.03206, eq. 23); e^μ for a resolution-dependent shift μ.
            num: T.
        """
        x = torch.arange(1, num + 1, dtype=torch.float64) / num
        sigmas = shift * x / (1 + (shift - 1) * x)
        sigmas[0] = 0.0  # what lies below the lowest grid point
        return cls(sigmas)

    def __len__(self) -> int:
        """T."""
        return len(self.sigmas)

    def to(self, device: str | torch.device) -> Flow:
        """The same on a device."""
        return Flow(self.sigmas.to(device))

    def times(self, timesteps: Tensor) -> Tensor:
        """What networks are told of timesteps (B,): 1000 σ_t, in the floating type of ``sigmas``."""
        return 1000 * self.sigmas[timesteps]


Schedule = Tensor | Flow


def is_same(first: Schedule, second: Schedule) -> bool:
    """Whether two schedules add the same noise at every timestep; one of ᾱ and a flow's never do."""
    ours, theirs = (each.sigmas if isinstance(each, Flow) else each for each in (first, second))
    return type(first) is type(second) and torch.equal(ours, theirs)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View per-sample values (B,) so that they broadcast over ``like`` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def alphas_sigmas(schedule: Schedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """α_t = √ᾱ_t and σ_t = √(1 − ᾱ_t), or 1 − σ_t and σ_t of a flow, for each sample.

    Args:
        schedule: ᾱ, (T,), or a flow.
        timesteps: (B,) int64 in [0, T).
        like: a tensor (B, ...) whose dtype and number of dimensions the result takes.

    Returns:
        Two tensors (B, 1, ..., 1) that broadcast over ``like``.
    """
    wide = torch.promote_types(like.dtype, torch.float32)  # 1 − ᾱ of a rounded ᾱ near 1 would be 0 in bfloat16
    if isinstance(schedule, Flow):
        flow_sigmas = per_sample(schedule.sigmas[timesteps].to(wide), like)
        return (1 - flow_sigmas).to(like.dtype), flow_sigmas.to(like.dtype)
    cumprod = per_sample(schedule[timesteps].to(wide), like)
    return cumprod.sqrt().to(like.dtype), (1 - cumprod).sqrt().to(like.dtype)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """z_t = α_t z_0 + σ_t ε.

    Args:
        latents: z_0, (B, C, h, w).
        noise: ε ~ N(0, I), the shape of ``latents``.
        timesteps: t, (B,) int64.
        schedule: ᾱ, (T,), or a flow.
    """
    alphas, sigmas = alphas_sigmas(schedule, timesteps, latents)
    return alphas * latents + sigmas * noise


def predicted_x0(model_output: Tensor, latents: Tensor, timesteps: Tensor, schedule: Schedule, kind: str) -> Tensor:
    """The clean latents that a model output stands for.

    Args:
        model_output: (B, C, h, w).
        latents: z_t that the model was given, same shape.
        timesteps: t, (B,) int64.
        schedule: ᾱ, (T,), or a flow.
        kind: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.

    Raises:
        ValueError: another ``kind``.

    Source: DDIM, arXiv 2010.02502, eq. 12; v: progressive distillation, arXiv 2202.00512, appendix D; flow:
        z_t = z_0 + σ_t (ε − z_0).
    """
    alphas, sigmas = alphas_sigmas(schedule, timesteps, latents)
    if kind == "epsilon":
        return (latents - sigmas * model_output) / alphas
    if kind == "v_prediction":
        return alphas * latents - sigmas * model_output
    if kind == "sample":
        return model_output
    if kind == FLOW:
        return latents - sigmas * model_output
    raise ValueError(f"prediction type {kind!r}: use {KINDS}")


def predicted_eps(model_output: Tensor, latents: Tensor, timesteps: Tensor, schedule: Schedule, kind: str) -> Tensor:
    """The noise that a model output stands for; arguments as in :func:`predicted_x0`."""
    alphas, sigmas = alphas_sigmas(schedule, timesteps, latents)
    if kind == "epsilon":
        return model_output
    if kind == "v_prediction":
        return alphas * model_output + sigmas * latents
    if kind == "sample":
        return (latents - alphas * model_output) / sigmas
    if kind == FLOW:
        return latents + alphas * model_output
    raise ValueError(f"prediction type {kind!r}: use {KINDS}")


def prediction_of(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule, kind: str) -> Tensor:
    """What a model of ``kind`` is to predict at z_t = α_t z_0 + σ_t ε: ε, v = α_t ε − σ_t z_0, z_0 or ε − z_0.

    Args:
        latents: z_0, (B, C, h, w).
        noise: ε, same shape.
        timesteps: t, (B,) int64.
        schedule: ᾱ, (T,), or a flow.
        kind: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.

    Raises:
        ValueError: another ``kind``.
    """
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        alphas, sigmas = alphas_sigmas(schedule, timesteps, latents)
        return alphas * noise - sigmas * latents
    if kind == "sample":
        return latents
    if kind == FLOW:
        return noise - latents
    raise ValueError(f"prediction type {kind!r}: use {KINDS}")


def check_timesteps(timesteps: list[int], num_train_timesteps: int) -> Tensor:
    """Sampling timesteps as a tensor (num_steps,) int64.

    Raises:
        ValueError: a timestep lies outside [0, ``num_train_timesteps``).
    """
    if not timesteps or min(timesteps) < 0 or max(timesteps) >= num_train_timesteps:
        raise ValueError(f"timesteps {timesteps} do not lie in [0, {num_train_timesteps}): take another step count")
    return torch.tensor(timesteps, dtype=torch.int64)
