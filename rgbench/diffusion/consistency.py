"""Latent consistency functions (LCM, arXiv 2310.04378; boundary scalings of consistency models, arXiv 2303.01469).

    f(z, w, c, t) = c_skip(t) z + c_out(t) x̂0(z, w, c, t)

| symbol | name | meaning, shape |
|---|---|---|
| s | ``timestep_scaling`` | factor on t in the boundary scalings, 10 |
| σ_d | ``SIGMA_DATA`` | standard deviation of the data, 0.5 |
| w | ``guidance_scale`` | LCM form, (B,); a diffusers pipeline's ``guidance_scale`` g embeds w = g − 1 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgbench.diffusion.schedule import FLOW, Schedule, per_sample, predicted_x0

SIGMA_DATA = 0.5  # arXiv 2303.01469, appendix C


def boundary_scalings(timesteps: Tensor, timestep_scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """c_skip = σ_d² / ((s·t)² + σ_d²) and c_out = s·t / √((s·t)² + σ_d²).

    Args:
        timesteps: t, (B,) int64.
        timestep_scaling: s.
        dtype: floating type of the result.

    Returns:
        ``c_skip`` and ``c_out``, (B,); f is the identity at t = 0.
    """
    wide = torch.promote_types(dtype, torch.float32)  # (s·t)² is beyond float16's range from t = 26 on
    scaled = timesteps.to(wide) * timestep_scaling
    norm = scaled**2 + SIGMA_DATA**2
    return (SIGMA_DATA**2 / norm).to(dtype), (scaled / norm.sqrt()).to(dtype)


def guidance_embedding(guidance_scale: Tensor, dim: int) -> Tensor:
    """Sine and cosine of 1000·w at frequencies exp(−i·ln(10⁴)/(d/2 − 1)), the sine half first.

    Args:
        guidance_scale: w in LCM form, (B,), floating.
        dim: d, the student's ``time_cond_proj_dim``; at least 4. An odd d gets a zero column, as in diffusers. 1 for w
            itself, of networks that embed it on their own.

    Returns:
        (B, d) in the dtype of ``guidance_scale``.

    Source: diffusers' ``LatentConsistencyModelPipeline.get_guidance_scale_embedding``; bit-equal in float32.
    """
    if dim == 1:
        return guidance_scale[:, None]
    half, dtype, device = dim // 2, guidance_scale.dtype, guidance_scale.device
    rate = torch.log(torch.tensor(10000.0, dtype=dtype, device=device)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=dtype, device=device) * -rate)
    angles = (guidance_scale * 1000.0)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def consistency_function(
    model_output: Tensor,
    latents: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    prediction_type: str,
    timestep_scaling: float,
) -> Tensor:
    """f = c_skip·z_t + c_out·x̂0; of a flow f = x̂0 = z_t − σ_t v, the identity at t = 0 as it is.

    Args:
        model_output: of the student or its target, (B, C, h, w).
        latents: z_t, same shape.
        timesteps: t, (B,) int64.
        schedule: ᾱ, (T,), or a flow.
        prediction_type: what the network predicts.
        timestep_scaling: s; of no use to a flow.
    """
    if prediction_type == FLOW:
        return predicted_x0(model_output, latents, timesteps, schedule, prediction_type)
    c_skip, c_out = boundary_scalings(timesteps, timestep_scaling, latents.dtype)
    x0 = predicted_x0(model_output, latents, timesteps, schedule, prediction_type)
    return per_sample(c_skip, latents) * latents + per_sample(c_out, latents) * x0


def pseudo_huber(prediction: Tensor, target: Tensor, huber_c: float) -> Tensor:
    """√(d² + c²) − c, elementwise, then the mean of each sample: (B, ...) → (B,). docs/method.md, LCD, line 8."""
    elementwise = ((prediction - target) ** 2 + huber_c**2).sqrt() - huber_c
    return elementwise.flatten(1).mean(1)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """d², then the mean of each sample: (B, ...) → (B,)."""
    return ((prediction - target) ** 2).flatten(1).mean(1)
