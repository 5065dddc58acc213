"""Planted hacks: known faults at known doses, put into images that have none.

Each is what an over-optimised student may do. A probe that does not find it at a dose that
people would see is no evidence of its absence.

    noise            white noise, σ in 8-bit levels
    grid             a line every 8 pixels, amplitude in 8-bit levels
    saturation       distance from grey × (1 + dose)
    blur             Gaussian, σ in pixels
    sharpening       unsharp mask of σ = 1 pixel, amount
    mode collapse    share of a prompt's images that become copies of its first
    prompt-ignoring  share of images that show what another prompt asks for
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GRID_PERIOD = 8  # pixels
MASK_SIGMA = 1.0  # pixels

Plant = Callable[[Tensor, float, int, torch.Generator], Tensor]


def noise(images: Tensor, dose: float, per_prompt: int, generator: torch.Generator) -> Tensor:
    """White noise of σ = dose/255."""
    return images + dose / 255 * torch.randn(images.shape, generator=generator)


def grid(images: Tensor, dose: float, per_prompt: int, generator: torch.Generator) -> Tensor:
    """Lines of dose/255 every 8 pixels."""
    rows, columns = (torch.arange(side) % GRID_PERIOD == 0 for side in images.shape[-2:])
    return images + dose / 255 * (rows[:, None] | columns[None]).to(images.dtype)


def saturation(images: Tensor, dose: float, per_prompt: int, generator: torch.Generator) -> Tensor:
    """Colours (1 + dose) times as far from grey."""
    grey = images.mean(1, keepdim=True)
    return grey + (1 + dose) * (images - grey)


def blur(images: Tensor, dose: float, per_prompt: int, generator: torch.Generator) -> Tensor:
    """Gaussian blur of σ = dose pixels, borders repeated."""
    return gaussian_blur(images, dose)


def sharpening(images: Tensor, dose: float, per_prompt: int, generator: torch.Generator) -> Tensor:
    """Unsharp mask: dose times what a blur of 1 pixel takes away is added."""
    return images + dose * (images - gaussian_blur(images, MASK_SIGMA))


def mode_collapse(images: Tensor, dose: float, per_prompt: int, generator: torch.Generator) -> Tensor:
    """Of each prompt's images a share, but for the first, become copies of the first."""
    source = torch.arange(len(images))
    first = source - source % per_prompt
    chosen = source % per_prompt >= per_prompt - round(dose * (per_prompt - 1))
    return images[torch.where(chosen, first, source)]


def prompt_ignoring(images: Tensor, dose: float, per_prompt: int, generator: torch.Generator) -> Tensor:
    """A share of the images are those of the next prompt."""
    source = torch.arange(len(images))
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[torch.randperm(len(images), generator=generator)[: round(dose * len(images))]] = True
    return images[torch.where(chosen, (source + per_prompt) % len(images), source)]


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian of σ pixels cut at 4 σ, borders repeated; (B, 3, H, W)."""
    radius = max(1, int(np.ceil(4 * sigma)))
    x = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    planes = F.pad(images.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).reshape(images.shape)


@dataclass(frozen=True)
class Hack:
    """A fault and the doses it is planted at, ascending.

    Attributes:
        plant: (images, dose, images per prompt, generator) → images, not yet clipped.
        doses: in the unit.
        unit: of the dose.
    """

    plant: Plant
    doses: tuple[float, ...]
    unit: str


HACKS = {
    "noise": Hack(noise, (1, 2, 4, 8, 16), "levels"),
    "grid": Hack(grid, (1, 2, 4, 8, 16), "levels"),
    "saturation": Hack(saturation, (0.05, 0.1, 0.2, 0.4, 0.8), "share"),
    "blur": Hack(blur, (0.3, 0.4, 0.55, 0.8, 1.2), "pixels"),
    "sharpening": Hack(sharpening, (0.1, 0.2, 0.4, 0.8, 1.6), "amount"),
    "mode collapse": Hack(mode_collapse, (0.15, 0.3, 0.6, 1.0), "share"),
    "prompt-ignoring": Hack(prompt_ignoring, (0.05, 0.1, 0.2, 0.4, 0.8), "share"),
}
