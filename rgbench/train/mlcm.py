"""Multistep latent consistency distillation (MLCM): docs/method.md, "MLCM, one step".

    loss = distance(F_θ(z_{n+k}, t_{n+k} → e), F_θ⁻(z_n, t_n → e)),  e the lower edge of t_{n+k}'s segment

| symbol | name | meaning, shape |
|---|---|---|
| M | ``segments`` | into which the M timesteps of the sampler cut the trajectory |
| e | ``lower_edges`` | the largest of 0 and these timesteps below t_{n+k}, (B,) int64 |
| f, f⁻ | ``prediction``, ``target`` | the same network outputs, jumped to 0: what rewards read |

The settings of ``mlcm`` make it TLCM's first stage (arXiv 2406.05768), PCM (2405.18407) or a multistep consistency
model (2403.06807), apart from their edges and the latter's own solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from diffusers import LCMScheduler, TCDScheduler
from torch import Tensor

from rgbench.data.batches import Batch
from rgbench.diffusion.ddim import jump_factors
from rgbench.diffusion.sampling import lcm_timesteps
from rgbench.diffusion.schedule import Schedule, alphas_sigmas
from rgbench.models.pipeline import SEGMENTS_KEY
from rgbench.train.base import StepDraws
from rgbench.train.lcd import LCD, Distillation, Inputs, Networks, Start, distances, start
from rgbench.train.recipe import LCDSection, MLCMRecipe, MLCMSection
from rgbench.train.tcd import distil_jumps


@dataclass(frozen=True)
class MLCMInputs(Inputs):
    """Those of LCD at a stage.

    Attributes:
        segments: M.
    """

    segments: int


class MLCM(LCD):
    """The MLCM trainer; its stage is a function of the step, so that a resume needs nothing more."""

    def prepare(self, batch: Batch, rng: StepDraws) -> MLCMInputs:
        """As LCD, and the number of segments."""
        return MLCMInputs(**vars(super().prepare(batch, rng)), segments=self._own.segments(rng.step))

    def scheduler(self) -> LCMScheduler | TCDScheduler:
        """As LCD, and it says the segments, for rgbench."""
        scheduler = super().scheduler()
        scheduler.register_to_config(**{SEGMENTS_KEY: self._own.stages[-1].segments})
        return scheduler

    def distil(self, inputs: Inputs) -> Distillation:
        """Lines 2–8."""
        return distil(self.networks, self.recipe.lcd, self._own, cast(MLCMInputs, inputs))

    @property
    def _own(self) -> MLCMSection:
        return cast(MLCMRecipe, self.recipe).mlcm


def distil(networks: Networks, settings: LCDSection, own: MLCMSection, inputs: MLCMInputs) -> Distillation:
    """Lines 2–8 of the MLCM step."""
    # 2–4. as LCD, and the edge e
    begin = start(networks, settings, inputs)
    lower = lower_edges(begin.timesteps, inputs.segments, settings.num_ddim_timesteps, len(networks.schedule))

    # 5–8. as TCD, with e for s
    follow = networks.target if own.target == "ema" else networks.student
    measure = partial(distances, settings)
    if own.space == "x0":
        measure = partial(_distances_x0, networks.schedule, settings, own, begin, lower)
    return distil_jumps(networks, settings, inputs, begin, lower, follow, measure)


def lower_edges(timesteps: Tensor, segments: int, num_ddim_timesteps: int, num_train_timesteps: int) -> Tensor:
    """e = max{x in E_M: x < t}, E_M = {0} and the timesteps of a sampler of M steps, (B,) int64.

    Args:
        timesteps: t > 0, (B,) int64.
        segments: M, in [1, N].
        num_ddim_timesteps: N.
        num_train_timesteps: T.
    """
    ends = lcm_timesteps(segments, num_ddim_timesteps, num_train_timesteps).flip(0)
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(timesteps.device)
    return edges[torch.searchsorted(edges, timesteps) - 1]


def _distances_x0(
    schedule: Schedule,
    settings: LCDSection,
    own: MLCMSection,
    begin: Start,
    lower: Tensor,
    jumped: Tensor,
    wanted: Tensor,
) -> Tensor:
    """Line 8 between the x̂0 whose jumps from z_{n+k} end at F and at y: (y − ρ z)/κ, weighted."""
    z = begin.noisy
    ratio, kappa = jump_factors(begin.timesteps, lower, schedule, z)
    losses = distances(settings, (jumped - ratio * z) / kappa, (wanted - ratio * z) / kappa)
    if own.weight == "one":
        return losses
    _, sigmas = alphas_sigmas(schedule, begin.timesteps, losses)
    return losses / sigmas**2  # SNR + 1 = 1/σ²
