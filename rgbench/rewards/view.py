"""What a reward sees of an image: blurred first, or a random window of it.

Controls of the study of over-optimisation: a reward that never sees high frequencies cannot be pleased by them, and one
that sees another window at each step cannot be pleased by a fixed pattern.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from rgbench.rewards.contract import ScaledReward


class ViewedReward:
    """A reward behind a blur and a crop; its contract is the reward's own.

    Args:
        reward: any reward.
        blur_sigma: of the Gaussian, in pixels of the images; 0 for none. Truncated at 4 σ, borders reflected.
        random_crop: share of each side that a window keeps, or None.
    """

    def __init__(self, reward: ScaledReward, *, blur_sigma: float, random_crop: float | None) -> None:
        self.reward, self.blur_sigma, self.random_crop = reward, blur_sigma, random_crop
        self.name, self.differentiable, self.logit_scale = reward.name, reward.differentiable, reward.logit_scale

    def fingerprint(self) -> dict[str, Any]:
        """The reward's, with blur and crop where there are any."""
        view = {"blur_sigma": self.blur_sigma, "random_crop": self.random_crop}
        return self.reward.fingerprint() | {key: value for key, value in view.items() if value}

    def __call__(self, images: Tensor, prompts: Sequence[str], places: Tensor | None = None) -> Tensor:
        """Scores (B,).

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: B texts.
            places: where each window lies, (B, 2) on the CPU in [0, 1): 0 is the top and left edge, 1 the bottom and
                right. None: the centre, so that a score without draws is reproducible.
        """
        if self.blur_sigma:
            radius = min(math.ceil(4 * self.blur_sigma), min(images.shape[-2:]) - 1)
            images = gaussian_blur(images, [2 * radius + 1] * 2, [self.blur_sigma] * 2)
        if self.random_crop:
            images = crop(images, self.random_crop, places)
        return self.reward(images, prompts)


def crop(images: Tensor, share: float, places: Tensor | None) -> Tensor:
    """One window of each image.

    Args:
        images: (B, C, H, W).
        share: of each side, in (0, 1]; at least one pixel is kept.
        places: (B, 2) in [0, 1), row and column, uniform over all whole-pixel positions; None for the centre.

    Returns:
        (B, C, h, w).
    """
    height, width = (max(round(share * side), 1) for side in images.shape[-2:])
    room = torch.tensor([images.shape[-2] - height, images.shape[-1] - width])
    if places is None:
        top, left = (room // 2).tolist()
        return images[..., top : top + height, left : left + width]
    corners = (places.double() * (room + 1)).long().tolist()
    windows = [
        image[:, top : top + height, left : left + width] for image, (top, left) in zip(images, corners, strict=True)
    ]
    return torch.stack(windows)
