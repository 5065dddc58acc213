"""Simulated human preferences: which of two images suits a prompt better.

Utility of an image = share of the caption's attributes that are right − λ · strength of its degradation. Choices follow
Bradley–Terry on the difference, and a share of them is flipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rgbench.benchtop.scenes import COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, Scenes, is_heldout

NOISE = 0.25  # standard deviation of the strongest noise


@dataclass(frozen=True)
class PreferenceConfig:
    """Parameters of the simulated annotators."""

    degradation_weight: float = 0.8  # λ
    sharpness: float = 12.0  # Bradley–Terry scale on the utility difference
    flip_rate: float = 0.05


def change_attributes(scenes: Scenes, num_wrong: Tensor, order: Tensor, steps: Tensor) -> Scenes:
    """Change some attributes of scenes to another value.

    The object count stays; no held-out combination is made from a scene without one.

    Args:
        scenes: B scenes.
        num_wrong: (B,) attributes to change.
        order: (B, 7) numbers in [0, 1): the attributes with the smallest change.
        steps: (B, 8) numbers in [0, 1): to which value (two layouts, then three attributes of each object).
    """
    layout, shape, colour, size = (x.clone() for x in (scenes.layout, scenes.shape, scenes.colour, scenes.size))
    two = scenes.count == 2
    valid = torch.ones(len(scenes), 7, dtype=torch.bool)
    valid[:, 4:] = two[:, None]
    ranks = order.masked_fill(~valid, 2.0).argsort(1).argsort(1)
    change = (ranks < num_wrong[:, None]) & valid

    def other(values: Tensor, n: int, where: Tensor, draw: int) -> Tensor:
        step = 1 + (steps[:, draw] * (n - 1)).long()
        return torch.where(where, (values + step) % n, values)

    single_layout = other(layout, len(POSITIONS), change[:, 0], 0)
    pair_layout = len(POSITIONS) + other(layout - len(POSITIONS), len(RELATIONS), change[:, 0], 1)
    layout = torch.where(two, pair_layout, single_layout)
    for slot in (0, 1):
        column = 1 + 3 * slot
        was = (shape[:, slot].clone(), colour[:, slot].clone())
        allowed = ~is_heldout(*was)
        new = other(was[0], len(SHAPES), change[:, column], column + 1)
        clash = allowed & ~change[:, column + 1] & is_heldout(new, was[1])
        shape[:, slot] = torch.where(clash, _next_but(new, was[0], len(SHAPES)), new)
        new = other(was[1], len(COLOURS), change[:, column + 1], column + 2)
        clash = allowed & is_heldout(shape[:, slot], new)
        colour[:, slot] = torch.where(clash, _next_but(new, was[1], len(COLOURS)), new)
        size[:, slot] = other(size[:, slot], len(SIZES), change[:, column + 2], column + 3)
    for x in (shape, colour, size):
        x[~two, 1] = -1
    return Scenes(layout, shape, colour, size)


def _next_but(values: Tensor, skipped: Tensor, n: int) -> Tensor:
    """The next value modulo n that is not ``skipped``."""
    following = (values + 1) % n
    return torch.where(following == skipped, (following + 1) % n, following)


def utility(right: Tensor, degradation: Tensor, config: PreferenceConfig) -> Tensor:
    """Utility (B,) of images with a share of attributes right and a degradation in [0, 1]."""
    return right - config.degradation_weight * degradation


def preference(difference: Tensor, config: PreferenceConfig) -> Tensor:
    """Probability (B,) that the first image of each pair is preferred, flips included, given utility differences."""
    return config.flip_rate + (1 - 2 * config.flip_rate) * torch.sigmoid(config.sharpness * difference)


def choose(difference: Tensor, config: PreferenceConfig, generator: torch.Generator) -> Tensor:
    """Whether the first image of each pair is preferred, (B,) bool, given utility differences."""
    p = torch.sigmoid(config.sharpness * difference)
    first = torch.rand(p.shape, generator=generator) < p
    flip = torch.rand(p.shape, generator=generator) < config.flip_rate
    return first ^ flip


def convolve_each(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve image b with kernel b, reflecting at the border; kernels (B, k, k)."""
    b, c, h, w = images.shape
    k = kernels.shape[-1]
    padded = F.pad(images, (k // 2,) * 4, mode="reflect").reshape(1, b * c, h + k - 1, w + k - 1)
    return F.conv2d(padded, kernels.repeat_interleave(c, 0)[:, None], groups=b * c).reshape(b, c, h, w)


def blur(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur, sigma up to 2.5 pixels."""
    x = torch.arange(-6, 7, dtype=torch.float32)
    g = torch.exp(-0.5 * (x[None] / (0.2 + 2.3 * strength[:, None])) ** 2)
    g = g / g.sum(1, keepdim=True)
    return convolve_each(images, g[:, :, None] * g[:, None])


def noise(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise, white or coloured between channels, standard deviation up to 0.25."""
    return images + NOISE * strength[:, None, None, None] * torch.randn(images.shape, generator=generator)


def fade(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Loss of contrast and saturation, by up to 80 %."""
    s = 0.8 * strength[:, None, None, None]
    grey = images.mean(1, keepdim=True)
    return (1 - s) * images + s * (0.5 * grey + 0.5 * grey.mean((-2, -1), keepdim=True))


def oversaturate(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast and saturation pushed up to three times, with clipping."""
    s = 1 + 2 * strength[:, None, None, None]
    grey = images.mean(1, keepdim=True)
    return ((grey - 0.4) * s.sqrt() + 0.4) + (images - grey) * s


TRAINED_DEGRADATIONS = (blur, noise, fade, oversaturate)


def degrade_as(images: Tensor, kind: Tensor, strength: Tensor, normal: Callable[[np.ndarray], Tensor]) -> Tensor:
    """Each image under a given one of the trained degradations, clamped to [0, 1].

    Args:
        images: (B, 3, H, W) in [0, 1].
        kind: (B,) numbers in [0, 1), spread evenly over the kinds.
        strength: (B,) in [0, 1]; 0 leaves the image as it is.
        normal: from the rows that get noise to as many standard normal numbers as these have.
    """
    unused, out = torch.Generator(), images.clone()
    chosen = (kind * len(TRAINED_DEGRADATIONS)).long()
    for k, function in enumerate(TRAINED_DEGRADATIONS):
        rows = (chosen == k) & (strength > 0)
        if rows.any():
            if function is noise:
                field = normal(np.flatnonzero(rows.numpy())).view_as(images[rows])
                out[rows] = images[rows] + NOISE * strength[rows, None, None, None] * field
            else:
                out[rows] = function(images[rows], strength[rows], unused)
    return out.clamp(0, 1)
