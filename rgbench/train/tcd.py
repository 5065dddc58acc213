"""Trajectory consistency distillation (TCD): arXiv 2402.19159; docs/method.md, "TCD, one step".

    loss = distance(F_θ(z_{n+k}, t_{n+k} → s), F_θ⁻(z_n, t_n → s)),  F(z_t, t → s) = α_s x̂0 + σ_s ε̂

| symbol | name | meaning, shape |
|---|---|---|
| s | ``jump_to`` | where both jumps end, a grid point at or below t_n, or 0, (B,) int64 |
| u | ``fraction`` | the draw that decides s, in [0, 1), (B,) |
| f, f⁻ | ``prediction``, ``target`` | the same network outputs, jumped to 0: what rewards read |
| γ | ``sampling.gamma`` | of the sampler alone |

The student is not told s. Its jump is that of CTM (arXiv 2310.02279) and of DDIM (arXiv 2010.02502).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from rgbench.data.batches import Batch
from rgbench.diffusion.ddim import grid_timesteps, jump, jump_factors
from rgbench.diffusion.schedule import Schedule, per_sample
from rgbench.models.families import Denoiser
from rgbench.train.base import StepDraws
from rgbench.train.lcd import LCD, Distillation, Inputs, Networks, Start, call, distances, solve, start
from rgbench.train.recipe import LCDSection, TCDRecipe, TCDSection


@dataclass(frozen=True)
class TCDInputs(Inputs):
    """Those of LCD with the draw of s.

    Attributes:
        fraction: u, (B,).
    """

    fraction: Tensor


class TCD(LCD):
    """The TCD trainer."""

    def prepare(self, batch: Batch, rng: StepDraws) -> TCDInputs:
        """As LCD, and the draw of s from a stream of its own."""
        inputs = super().prepare(batch, rng)
        return TCDInputs(**vars(inputs), fraction=rng.uniform("s", 0.0, 1.0).to(inputs.index.device))

    def distil(self, inputs: Inputs) -> Distillation:
        """Lines 2–8."""
        own = cast(TCDRecipe, self.recipe).tcd
        return distil(self.networks, self.recipe.lcd, own, cast(TCDInputs, inputs))


def distil(networks: Networks, settings: LCDSection, jumps: TCDSection, inputs: TCDInputs) -> Distillation:
    """Lines 2–8 of the TCD step."""
    # 2–4. as LCD, and s
    begin = start(networks, settings, inputs)
    lower = jump_to(jumps, inputs, len(networks.schedule), settings.num_ddim_timesteps)
    # 5–8.
    return distil_jumps(networks, settings, inputs, begin, lower, networks.target, partial(distances, settings))


def distil_jumps(
    networks: Networks,
    settings: LCDSection,
    inputs: Inputs,
    begin: Start,
    lower: Tensor,
    follow: Denoiser,
    measure: Callable[[Tensor, Tensor], Tensor],
) -> Distillation:
    """Lines 5–8 of the TCD step.

    Args:
        networks: of the step.
        settings: of the recipe's solver.
        inputs: the batch with its draws.
        begin: results of lines 2–4.
        lower: s, at or below t_n, (B,) int64.
        follow: the network of line 7.
        measure: line 8, of both jumps.
    """
    schedule, kind, zero = networks.schedule, networks.prediction_type, torch.zeros_like(lower)

    # 5. x̂0 and ε̂ of f_θ at t_{n+k}; jumps f to 0 and F to s
    output = call(networks.student, begin.noisy, begin.timesteps, inputs.prompt_embeds, begin.w_embedding)
    prediction = jump(output, begin.noisy, begin.timesteps, zero, schedule, kind)
    jumped = other_jump(prediction, begin, lower, schedule)

    # 6. guided DDIM of the teacher, as LCD
    previous = solve(networks, settings, inputs, begin)

    with torch.no_grad():
        # 7. the same two jumps of f_θ⁻ from z_n; z_n itself where s = t_n
        output = call(follow, previous, begin.lower, inputs.prompt_embeds, begin.w_embedding)
        wanted, target = (jump(output, previous, begin.lower, end, schedule, kind) for end in (lower, zero))

    # 8. distance of both jumps to s
    losses = measure(jumped, wanted)
    return Distillation(
        begin.timesteps, begin.lower, begin.noisy, begin.w_embedding, prediction, previous, target, losses
    )


def other_jump(prediction: Tensor, begin: Start, lower: Tensor, schedule: Schedule) -> Tensor:
    """F of a network output whose jump to 0 is ``prediction``, and as a function of it: ∂L/∂f balances the reward's.

    Both are linear in x̂0: f = ρ_0 z + κ_0 x̂0 and F = ρ_s z + κ_s x̂0.

    Args:
        prediction: f, (B, C, h, w).
        begin: with z and t > 0.
        lower: s < t, (B,) int64.
        schedule: ᾱ, (T,), or a flow.
    """
    z, zero = begin.noisy, torch.zeros_like(lower)
    (ratio, kappa), (ratio_0, kappa_0) = (jump_factors(begin.timesteps, end, schedule, z) for end in (lower, zero))
    return torch.where(per_sample(lower == 0, z), prediction, ratio * z + kappa / kappa_0 * (prediction - ratio_0 * z))


def jump_to(jumps: TCDSection, inputs: TCDInputs, num_train_timesteps: int, num_ddim_timesteps: int) -> Tensor:
    """s of each sample, (B,) int64: ``uniform`` on 0 and the grid points at or below t_n, ``zero`` or ``next``."""
    index = inputs.index
    if jumps.s == "zero":
        return torch.zeros_like(index)
    if jumps.s == "uniform":
        # a uniform number, since each sample has a bound of its own: index + 1 places
        index = torch.minimum((inputs.fraction * (index + 1)).long(), index)
    return grid_timesteps(index, num_train_timesteps, num_ddim_timesteps)[1]
