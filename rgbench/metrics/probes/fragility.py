"""Fragility and aliasing gain: does the reward rest on fine structure rather than on what the image shows?

Fragility is the mean drop of the reward under five changes that people hardly see, minus the same drop of real images:

    JPEG at quality 75, Gaussian blur σ = 1 pixel, half size and back, a shift by one pixel, noise of σ = 2/255

It is measured on the first 512 images, for each costs six evaluations of the reward model.

Aliasing gain is the reward that comes from frequencies that the reward model cannot see:

    gain           reward without antialiasing in its resize − reward with it, per image
    aliased noise  standard deviation of resize without − resize with antialiasing of Y, in 8-bit grey levels

A resize without a low-pass filter folds what lies above the reward model's Nyquist limit down into its input. A student
that was trained so learns to put structure there, and its gain rises above that of real images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.context import Context
from rgbench.metrics.probes.base import PerImageProbe, Probe, Real
from rgbench.metrics.probes.pixels import GREY_LEVELS
from rgbench.metrics.probes.spectrum import luma_chroma
from rgbench.metrics.rewards import SCALE, shared_reward, through_jpeg
from rgbench.metrics.statistics import NUM_GROUPS, cluster_groups, jackknife_interval, jackknife_means
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol

NUM_IMAGES = 512
BLUR_SIGMA = 1.0  # pixels
BLUR_RADIUS = 4  # pixels
NOISE_SIGMA = 2 / 255


def jpeg(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Through JPEG at quality 75, 4:2:0, and back."""
    return through_jpeg(images)


def blur(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Gaussian, σ = 1 pixel, borders repeated."""
    x = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (x / BLUR_SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    planes = F.pad(images.flatten(0, 1)[:, None], (BLUR_RADIUS,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).reshape(images.shape)


def half_size(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Bicubic with antialiasing to half the size, and bicubic back."""
    height, width = images.shape[-2:]
    small = F.interpolate(images, (max(1, height // 2), max(1, width // 2)), mode="bicubic", antialias=True)
    return F.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def shift(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """One pixel right and down, the borders repeated."""
    height, width = images.shape[-2:]
    return F.pad(images, (1, 0, 1, 0), mode="replicate")[..., :height, :width]


def noise(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """White noise, σ = 2/255, the same for a prompt whatever its batch or model."""
    drawn = torch.stack([torch.randn(images.shape[1:], generator=_generator(prompt)) for prompt in prompts])
    return (images + NOISE_SIGMA * drawn.to(images.device)).clamp(0, 1)


CHANGES = {"jpeg75": jpeg, "blur1": blur, "half_size": half_size, "shift1": shift, "noise2": noise}


def _generator(prompt: Prompt) -> torch.Generator:
    digest = hashlib.sha256(prompt.id.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Fragility(Probe):
    """Mean drop of the reward under five small changes, against real images where there are any.

    Args:
        context: any prompts.

    Raises:
        UsageError: the reward model's folder is incomplete.
    """

    name = "fragility"
    infos = (
        MetricInfo.of(
            "fragility", "Fragility", "reward lost under changes that hardly show", Direction.LOWER, Family.FRAGILITY
        ),
    )
    per_image_state = ("drops",)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.scenes, self.flags = self.compared(reads_prompt=True)
        self.reward = shared_reward(context, antialias=True)
        self.num = min(NUM_IMAGES, len(context.prompts))
        protocol = self.fields(
            self.scenes,
            reward=self.reward.reward.fingerprint(),
            scale=SCALE,
            changes=list(CHANGES),
            images=self.num,
            jackknife=f"{NUM_GROUPS} groups of prompts, left out on both sides",
        )
        self.planned = ((self.name, Protocol.of(self.name, protocol)),)
        self.drops = np.full((len(CHANGES), len(context.prompts)), np.nan)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        inside = np.flatnonzero(positions < self.num)
        if len(inside):
            chosen = images if len(inside) == len(positions) else images[inside]
            self.drops[:, positions[inside]] = self._measure(chosen, [prompts[int(i)] for i in inside])

    def compute(self) -> list[MetricValue]:
        drops = self.drops[:, : self.num]
        extra: dict[str, Any] = {"level": float(drops.mean())}
        if self.scenes:
            real = self.of_real(self.scenes, self.planned[0][1].fields, partial(self._measure_real, self.scenes))
            extra["real"], drops = float(real.mean()), drops - real
        rows, groups = drops.mean(0), cluster_groups(self.context.clusters(self.num))
        left = jackknife_means(rows, groups)
        value, by_change = float(rows.mean()), dict(zip(CHANGES, drops.mean(1).tolist(), strict=True))
        return [
            MetricValue(
                *self.planned[0],
                value=value,
                interval=jackknife_interval(value, left),
                num_images=self.num,
                reference="real" if self.scenes else None,
                flags=self.flags,
                extra={**extra, "drops": by_change, "jackknife": left},
            )
        ]

    def _measure(self, images: Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        """(5, B) drops of the reward."""
        before = self.reward(images, prompts)
        after = [self.reward(change(images, prompts), prompts) for change in CHANGES.values()]
        return torch.stack([before - x for x in after]).cpu().numpy()

    def _measure_real(self, real: Real) -> np.ndarray:
        prompts, drops = self.context.prompts.prompts, np.empty((len(CHANGES), self.num))
        for images, at in real.batches(self.num):
            drops[:, at] = self._measure(images.to(self.context.device), [prompts[i] for i in at])
        return drops


def resize(planes: Tensor, size: int, antialias: bool) -> Tensor:
    """(B, H, W) planes, resized to a longest side of ``size`` by the reward models' bicubic kernel."""
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

    name = "aliasing"
    infos = (
        MetricInfo.of(
            "aliasing_gain",
            "Aliasing gain",
            "reward from what an aliasing resize sees",
            Direction.REFERENCE,
            Family.FRAGILITY,
        ),
        MetricInfo.of(
            "aliased_noise",
            "Aliased noise σ",
            "noise that an aliasing resize folds down from above the reward's Nyquist",
            Direction.REFERENCE,
            Family.SPECTRUM,
            "levels",
        ),
    )
    reads_prompt = ("aliasing_gain",)

    def __init__(self, context: Context) -> None:
        self.plain, self.filtered = (shared_reward(context, antialias) for antialias in (False, True))
        self.size = self.plain.reward.size
        super().__init__(context, reward=self.plain.reward.fingerprint() | {"antialias": "both"}, scale=SCALE)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        noise = GREY_LEVELS * aliased_noise(luma_chroma(images)[:, 0], self.size)
        if not prompts:
            return torch.stack([torch.full_like(noise, torch.nan), noise])
        return torch.stack([self.plain(images, prompts) - self.filtered(images, prompts), noise])

    def compute(self) -> list[MetricValue]:
        gain, noise = super().compute()
        through = white_noise_through(self.context.resolution, self.size)
        return [gain, replace(noise, extra={**noise.extra, "white_noise_std": through})]
