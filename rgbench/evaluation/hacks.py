"""Planted hacks: known faults at known doses, put into images that have none.

Each is what an over-optimised student may do. A probe that does not find it at a dose that
people would see is no evidence of its absence.

    noise            white noise, σ in 8-bit levels
    grid             a line every 8 pixels, the VAE's stride, amplitude in 8-bit levels
    patch grid       the same at the reward model's patch period
    saturation       distance from grey × (1 + dose)
    blur             Gaussian, σ in pixels
    sharpening       unsharp mask of σ = 1 pixel, amount
    mode collapse    share of a prompt's images that become copies of its first
    prompt-ignoring  share of images that show what another prompt asks for
    reward attack    at most so many 8-bit levels per value, along the reward's own gradient: a higher reward
                     that nobody can see (projected gradient ascent, Madry et al., 2018, arXiv 1706.06083)
    aliased attack   the same on the reward without antialiasing in its resize
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GRID_PERIOD = 8  # pixels
MASK_SIGMA = 1.0  # pixels

ATTACK_STEPS, ATTACK_STRIDE = 10, 2.5  # so that 10 steps can cross the ball of the dose

Score = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Ground:
    """What a hack is planted into, besides the images.

    Attributes:
        texts: of each image; ``per_prompt`` in a row are alike.
        per_prompt: images of each prompt.
        generator: of what is drawn.
        patch_period: of the reward model in image pixels.
        rewards: the reward model by antialias, differentiable.
    """

    texts: Sequence[str]
    per_prompt: int
    generator: torch.Generator
    patch_period: float
    rewards: Mapping[bool, Score]


Plant = Callable[[Tensor, float, Ground], Tensor]


def noise(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """White noise of σ = dose/255."""
    return images + dose / 255 * torch.randn(images.shape, generator=ground.generator)


def grid(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Lines of dose/255 every 8 pixels."""
    return images + dose / 255 * _lines(images, GRID_PERIOD)


def patch_grid(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Lines of dose/255 where the reward model's patches begin."""
    return images + dose / 255 * _lines(images, ground.patch_period)


def _lines(images: Tensor, period: float) -> Tensor:
    """(H, W), 1 in each first row and column of a period, else 0."""
    starts = [(torch.arange(-1, side) / period).floor().diff() > 0 for side in images.shape[-2:]]
    return (starts[0][:, None] | starts[1][None]).to(images.dtype)


def saturation(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Colours (1 + dose) times as far from grey."""
    grey = images.mean(1, keepdim=True)
    return grey + (1 + dose) * (images - grey)


def blur(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Gaussian blur of σ = dose pixels, borders repeated."""
    return gaussian_blur(images, dose)


def sharpening(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Unsharp mask: dose times what a blur of 1 pixel takes away is added."""
    return images + dose * (images - gaussian_blur(images, MASK_SIGMA))


def mode_collapse(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Of each prompt's images a share, but for the first, become copies of the first."""
    source = torch.arange(len(images))
    each = ground.per_prompt
    first = source - source % each
    chosen = source % each >= each - round(dose * (each - 1))
    return images[torch.where(chosen, first, source)]


def prompt_ignoring(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """A share of the images are those of the next prompt."""
    source = torch.arange(len(images))
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[torch.randperm(len(images), generator=ground.generator)[: round(dose * len(images))]] = True
    return images[torch.where(chosen, (source + ground.per_prompt) % len(images), source)]


def reward_attack(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """A higher reward within dose/255 of every value."""
    return _ascend(images, dose / 255, ground.rewards[True], ground.texts)


def aliased_attack(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """The same of the reward whose resize aliases."""
    return _ascend(images, dose / 255, ground.rewards[False], ground.texts)


def _ascend(images: Tensor, radius: float, reward: Score, texts: Sequence[str]) -> Tensor:
    found = images.clone()
    for _ in range(ATTACK_STEPS):
        found.requires_grad_(True)
        (slope,) = torch.autograd.grad(reward(found, texts).sum(), found)
        moved = found.detach() + ATTACK_STRIDE * radius / ATTACK_STEPS * slope.sign()
        found = moved.clamp(images - radius, images + radius).clamp(0, 1)
    return found


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
        plant: (images, dose, ground) → images, not yet clipped.
        doses: in the unit.
        unit: of the dose.
        attacks: whether it reads the reward, and so runs where that is.
    """

    plant: Plant
    doses: tuple[float, ...]
    unit: str
    attacks: bool = False


HACKS = {
    "noise": Hack(noise, (1, 2, 4, 8, 16), "levels"),
    "grid": Hack(grid, (1, 2, 4, 8, 16), "levels"),
    "patch grid": Hack(patch_grid, (1, 2, 4, 8, 16), "levels"),
    "saturation": Hack(saturation, (0.05, 0.1, 0.2, 0.4, 0.8), "share"),
    "blur": Hack(blur, (0.3, 0.4, 0.55, 0.8, 1.2), "pixels"),
    "sharpening": Hack(sharpening, (0.1, 0.2, 0.4, 0.8, 1.6), "amount"),
    "mode collapse": Hack(mode_collapse, (0.15, 0.3, 0.6, 1.0), "share"),
    "prompt-ignoring": Hack(prompt_ignoring, (0.05, 0.1, 0.2, 0.4, 0.8), "share"),
    "reward attack": Hack(reward_attack, (1, 2, 4, 8, 16), "levels", attacks=True),
    "aliased attack": Hack(aliased_attack, (1, 2, 4, 8, 16), "levels", attacks=True),
}
