"""Aliasing gain: how much of the reward comes from frequencies that the reward model cannot see.

    gain           reward without antialiasing in its resize − reward with it, per image
    aliased noise  standard deviation of resize_aa0(Y) − resize_aa1(Y), in 8-bit levels: what folds down

A resize without a low-pass filter folds what lies above the reward model's Nyquist limit
down into its input. A student that was trained so learns to put structure there, and its
gain rises above that of real images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Measurement
from rgbench.metrics.overopt.per_image import Level, PerImageProbe
from rgbench.metrics.overopt.pixels import GREY_LEVELS
from rgbench.metrics.overopt.power import luma_chroma
from rgbench.metrics.overopt.rewards import SCALE, shared_reward

LEVELS = (
    Level("aliasing_gain", "Aliasing gain", "", "fragility", 2, reads_prompt=True),
    Level("aliased_noise", "Aliased noise σ", "levels", "spectrum", 2),
)


def resize(planes: Tensor, size: int, antialias: bool) -> Tensor:
    """(B, H, W) planes with their longest side brought to ``size`` by the reward models' bicubic kernel."""
    scale = size / max(planes.shape[1:])
    new = [round(side * scale) for side in planes.shape[1:]]
    return F.interpolate(planes[:, None], new, mode="bicubic", align_corners=False, antialias=antialias)[:, 0]


def aliased_noise(luma: Tensor, size: int) -> Tensor:
    """(B,) standard deviation of what only the resize without antialiasing lets through, in units of (B, H, W)."""
    difference = resize(luma, size, antialias=False) - resize(luma, size, antialias=True)
    return difference.flatten(1).std(1, unbiased=False)


def white_noise_through(side: int, size: int) -> dict[str, float]:
    """Standard deviation that unit white noise keeps through the resize with and without antialiasing."""
    noise = torch.randn(16, side, side, generator=torch.Generator().manual_seed(0))
    return {f"aa{int(aa)}": float(resize(noise, size, antialias=aa).std()) for aa in (True, False)}


class AliasingGain(PerImageProbe):
    """Reward with antialiasing off minus on, and the noise that folds down.

    Args:
        context: any prompts.

    Raises:
        UsageError: the reward model's folder is incomplete.
    """

    def __init__(self, context: Context) -> None:
        self.plain, self.filtered = (shared_reward(context, antialias) for antialias in (False, True))
        self.size = self.plain.reward.size
        super().__init__(context, LEVELS, reward=self.plain.reward.fingerprint() | {"antialias": "both"}, scale=SCALE)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        noise = GREY_LEVELS * aliased_noise(luma_chroma(images)[:, 0], self.size)
        if not prompts:
            return torch.stack([torch.full_like(noise, torch.nan), noise])
        return torch.stack([self.plain(images, prompts) - self.filtered(images, prompts), noise])

    def finish(self) -> list[Measurement]:
        kept: dict[str, Any] = {"white_noise_std": white_noise_through(self.context.resolution, self.size)}
        return [replace(found, extra={**found.extra, **kept}) for found in super().finish()]
