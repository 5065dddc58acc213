"""Samplers that give diffusers' images: LCM multistep (arXiv 2310.04378), TCD (2402.19159), DDIM (2010.02502), Euler.

Noise comes from one CPU generator per image and is drawn in the order diffusers draws it, so a diffusers pipeline with
the same list of generators gives the same images, and an image does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rgbench.diffusion.consistency import consistency_function, guidance_embedding
from rgbench.diffusion.ddim import ddim_jump, grid_step, jump
from rgbench.diffusion.schedule import Flow, Schedule, alphas_sigmas, check_timesteps, predicted_eps, predicted_x0

UNet = Callable[..., tuple[Tensor, ...]]


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal noise (B, *shape), row i from ``generators[i]``, on the device and in the dtype of ``like``."""
    rows = [torch.randn((1, *shape), generator=g, dtype=like.dtype) for g in generators]
    return torch.cat(rows).to(like.device)


def lcm_timesteps(num_steps: int, original_steps: int, num_train_timesteps: int) -> Tensor:
    """``num_steps`` points of the training grid, evenly spaced from the top, descending (``LCMScheduler``'s).

    Args:
        num_steps: sampling steps, in [1, ``original_steps``].
        original_steps: N of the training grid.
        num_train_timesteps: T.

    Raises:
        ValueError: ``num_steps`` is out of range.
    """
    if not 1 <= num_steps <= original_steps:
        raise ValueError(f"{num_steps} sampling steps of a student trained on {original_steps}: use 1 to that number")
    skip = grid_step(num_train_timesteps, original_steps)
    descending = [skip * n - 1 for n in range(original_steps, 0, -1)]
    chosen = [descending[math.floor(i * (original_steps / num_steps))] for i in range(num_steps)]
    return check_timesteps(chosen, num_train_timesteps)


def flow_grid(num_steps: int, original_steps: int, num_train_timesteps: int = 1000) -> list[float]:
    """``sigmas`` of a call of diffusers' pipelines of flows: (t + 1)/T, before the shift, of :func:`lcm_timesteps`."""
    timesteps = lcm_timesteps(num_steps, original_steps, num_train_timesteps)
    return [(t + 1) / num_train_timesteps for t in timesteps.tolist()]


@torch.no_grad()
def lcm_sample(
    unet: UNet,
    schedule: Schedule,
    prediction_type: str,
    prompt_embeds: Tensor,
    uncond_embeds: Tensor,
    generators: Sequence[torch.Generator],
    *,
    num_steps: int,
    guidance_scale: float,
    latent_shape: Sequence[int],
    original_steps: int,
    timestep_scaling: float,
) -> Tensor:
    """Multistep consistency sampling: predict z_0, add fresh noise down to the next timestep, repeat.

    Args:
        unet: called as diffusers' ``UNet2DConditionModel``; where it has a method ``arranged``, that orders fresh noise
            as the pipeline's own layout of latents does.
        schedule: ᾱ, (T,), or a flow.
        prediction_type: what ``unet`` predicts.
        prompt_embeds: (B, L, D).
        uncond_embeds: of the empty prompt, (B, L, D); read by a student without ``time_cond_proj_dim`` alone.
        generators: B CPU generators; each is advanced.
        num_steps: in [1, ``original_steps``].
        guidance_scale: g in the pipelines' form. A student with ``time_cond_proj_dim`` is given w = g − 1; one without
            is guided, u + g(c − u), where g > 1 (``StableDiffusionPipeline`` with ``LCMScheduler``).
        latent_shape: (C, h, w) of one image.
        original_steps: N of the training grid.
        timestep_scaling: s.

    Returns:
        Latents × ``scaling_factor``, (B, C, h, w).
    """
    timesteps = lcm_timesteps(num_steps, original_steps, len(schedule)).to(prompt_embeds.device)
    latents = draw_noise(generators, latent_shape, prompt_embeds)
    predict = told_model(unet, prompt_embeds, uncond_embeds, guidance_scale)
    for i, t in enumerate(timesteps):
        t_B = t.expand(len(latents))
        output = predict(latents, t)
        latents = consistency_function(output, latents, t_B, schedule, prediction_type, timestep_scaling)
        if i + 1 < num_steps:
            alphas, sigmas = alphas_sigmas(schedule, timesteps[i + 1].expand(len(latents)), latents)
            noise = draw_noise(generators, latent_shape, latents)
            latents = alphas * latents + sigmas * getattr(unet, "arranged", _as_it_is)(noise)
    return latents


@torch.no_grad()
def tcd_sample(
    unet: UNet,
    schedule: Tensor,
    prediction_type: str,
    prompt_embeds: Tensor,
    uncond_embeds: Tensor,
    generators: Sequence[torch.Generator],
    *,
    num_steps: int,
    guidance_scale: float,
    latent_shape: Sequence[int],
    original_steps: int,
    gamma: float,
) -> Tensor:
    """Strategic stochastic sampling: jump to s = ⌊(1 − γ)t'⌋, add noise up to the next timestep t', repeat.

    Args:
        unet: as in :func:`lcm_sample`, and so are all others but ``gamma``.
        schedule: ᾱ, (T,).
        prediction_type: what ``unet`` predicts.
        prompt_embeds: (B, L, D).
        uncond_embeds: (B, L, D).
        generators: B CPU generators; each is advanced.
        num_steps: in [1, ``original_steps``].
        guidance_scale: g in the pipelines' form.
        latent_shape: (C, h, w) of one image.
        original_steps: N of the training grid.
        gamma: γ in [0, 1], diffusers' ``eta``; 0 is deterministic and draws the first noise alone.

    Returns:
        Latents × ``scaling_factor``, (B, C, h, w).

    Source: TCD, arXiv 2402.19159, algorithm 4; diffusers' ``TCDScheduler``, whose last jump ends at t = 0.
    """
    timesteps = lcm_timesteps(num_steps, original_steps, len(schedule)).to(prompt_embeds.device)
    latents = draw_noise(generators, latent_shape, prompt_embeds)
    predict = told_model(unet, prompt_embeds, uncond_embeds, guidance_scale)
    for i, t in enumerate(timesteps):
        below = timesteps[i + 1] if i + 1 < num_steps else torch.zeros_like(t)
        s = torch.floor((1 - gamma) * below).long()  # diffusers' expression, for its rounding
        output, t_B, s_B = predict(latents, t), t.expand(len(latents)), s.expand(len(latents))
        latents = jump(output, latents, t_B, s_B, schedule, prediction_type)
        if gamma > 0 and i + 1 < num_steps:
            ratio = schedule[below] / schedule[s]
            noise = draw_noise(generators, latent_shape, latents)
            latents = ratio.sqrt().to(latents.dtype) * latents + (1 - ratio).sqrt().to(latents.dtype) * noise
    return latents


def told_model(
    unet: UNet, prompt_embeds: Tensor, uncond_embeds: Tensor, guidance_scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """From (z_t, t) to a model's output: told w = g − 1 where it has an embedding of it, else guided.

    Args:
        unet: of a student or a teacher.
        prompt_embeds: (B, L, D).
        uncond_embeds: of the empty prompt, likewise.
        guidance_scale: g in the pipelines' form.
    """
    dim, num = unet.config.time_cond_proj_dim, len(prompt_embeds)  # type: ignore[attr-defined]
    wide = torch.promote_types(prompt_embeds.dtype, torch.float32)  # half types would miss the angle by whole turns
    scales = torch.full((num,), guidance_scale - 1, dtype=wide, device=prompt_embeds.device)
    w_embedding = guidance_embedding(scales, dim).to(prompt_embeds.dtype) if dim else None

    def predict(latents: Tensor, t: Tensor) -> Tensor:
        if w_embedding is None:
            return _guided_output(unet, latents, t, prompt_embeds, uncond_embeds, guidance_scale)
        return unet(latents, t, timestep_cond=w_embedding, encoder_hidden_states=prompt_embeds, return_dict=False)[0]

    return predict


def ddim_timesteps(num_steps: int, num_train_timesteps: int, spacing: str, steps_offset: int) -> Tensor:
    """Descending timesteps of diffusers' ``DDIMScheduler``.

    Args:
        num_steps: sampling steps, in [1, T].
        num_train_timesteps: T.
        spacing: ``leading`` or ``trailing``.
        steps_offset: added to every timestep of ``leading``; 1 in Stable Diffusion's configuration.

    Raises:
        ValueError: another ``spacing``, or timesteps outside [0, T).
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"{num_steps} DDIM steps: use 1 to {num_train_timesteps}")
    if spacing == "leading":
        ratio = num_train_timesteps // num_steps
        return check_timesteps([i * ratio + steps_offset for i in reversed(range(num_steps))], num_train_timesteps)
    if spacing == "trailing":
        # diffusers rounds numpy's arange, whose increment is this difference: it settles ties such as 937.5
        increment = (num_train_timesteps - num_train_timesteps / num_steps) - num_train_timesteps
        chosen = [round(num_train_timesteps + i * increment) - 1 for i in range(num_steps)]
        return check_timesteps(chosen, num_train_timesteps)
    raise ValueError(f"timestep_spacing {spacing!r}: use leading or trailing")


@torch.no_grad()
def ddim_sample(
    unet: UNet,
    schedule: Tensor,
    prediction_type: str,
    prompt_embeds: Tensor,
    uncond_embeds: Tensor,
    generators: Sequence[torch.Generator],
    *,
    num_steps: int,
    guidance_scale: float,
    latent_shape: Sequence[int],
    timestep_spacing: str = "leading",
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
) -> Tensor:
    """Deterministic DDIM (η = 0) with classifier-free guidance in the pipelines' form, u + g(c − u).

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        schedule: ᾱ, (T,).
        prediction_type: what ``unet`` predicts.
        prompt_embeds: (B, L, D).
        uncond_embeds: of the empty prompt, (B, L, D).
        generators: B CPU generators.
        num_steps: sampling steps.
        guidance_scale: g; at 1 or below the prompt's prediction is used alone, as in diffusers.
        latent_shape: (C, h, w) of one image.
        timestep_spacing: ``leading`` or ``trailing``.
        steps_offset: of ``leading``. The three defaults are Stable Diffusion's scheduler configuration.
        set_alpha_to_one: whether ᾱ below t = 0 is 1, instead of ᾱ_0.

    Returns:
        Latents × ``scaling_factor``, (B, C, h, w).
    """
    num_train = len(schedule)
    timesteps = ddim_timesteps(num_steps, num_train, timestep_spacing, steps_offset).to(prompt_embeds.device)
    # The boundary ᾱ is appended at index T, so that a jump below t = 0 is an ordinary jump to T.
    boundary = torch.ones_like(schedule[:1]) if set_alpha_to_one else schedule[:1]
    extended = torch.cat([schedule, boundary])
    latents = draw_noise(generators, latent_shape, prompt_embeds)
    for t in timesteps:
        output = _guided_output(unet, latents, t, prompt_embeds, uncond_embeds, guidance_scale)
        t_B = t.expand(len(latents))
        below = t_B - num_train // num_steps
        x0 = predicted_x0(output, latents, t_B, schedule, prediction_type)
        eps = predicted_eps(output, latents, t_B, schedule, prediction_type)
        latents = ddim_jump(x0, eps, torch.where(below >= 0, below, num_train), extended)
    return latents


def even_timesteps(num_steps: int, num_train_timesteps: int) -> Tensor:
    """Timesteps next to T (1 − i/M) − 1 for i < M, descending: a flow's sampler before its shift.

    Args:
        num_steps: M, in [1, T].
        num_train_timesteps: T.

    Raises:
        ValueError: ``num_steps`` is out of range.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"{num_steps} Euler steps: use 1 to {num_train_timesteps}")
    chosen = [round(num_train_timesteps * n / num_steps) - 1 for n in range(num_steps, 0, -1)]
    return check_timesteps(chosen, num_train_timesteps)


@torch.no_grad()
def euler_sample(
    unet: UNet,
    schedule: Flow,
    prediction_type: str,
    prompt_embeds: Tensor,
    uncond_embeds: Tensor,
    generators: Sequence[torch.Generator],
    *,
    num_steps: int,
    guidance_scale: float,
    latent_shape: Sequence[int],
) -> Tensor:
    """Euler steps of a flow's velocity, guided in the pipelines' form; arguments as of :func:`lcm_sample`.

    Returns:
        Latents × ``scaling_factor``, (B, C, h, w).
    """
    timesteps = even_timesteps(num_steps, len(schedule)).to(prompt_embeds.device)
    latents = draw_noise(generators, latent_shape, prompt_embeds)
    predict = told_model(unet, prompt_embeds, uncond_embeds, guidance_scale)
    for t, below in pairwise([*timesteps, torch.zeros_like(timesteps[0])]):
        ends = (t.expand(len(latents)), below.expand(len(latents)))
        latents = jump(predict(latents, t), latents, *ends, schedule, prediction_type)
    return latents


def _as_it_is(noise: Tensor) -> Tensor:
    return noise


def _guided_output(
    unet: UNet, latents: Tensor, t: Tensor, prompt_embeds: Tensor, uncond_embeds: Tensor, guidance_scale: float
) -> Tensor:
    """u + g(c − u) of one batched call, or c alone where g ≤ 1."""
    if guidance_scale <= 1:
        return unet(latents, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
    embeds = torch.cat([uncond_embeds, prompt_embeds])
    uncond, cond = unet(torch.cat([latents] * 2), t, encoder_hidden_states=embeds, return_dict=False)[0].chunk(2)
    return uncond + guidance_scale * (cond - uncond)
