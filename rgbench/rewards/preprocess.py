"""Image preprocessing of reward models, on tensors: resize, pad or crop, normalise.

Both begin with a bicubic resize, with or without antialiasing. Bicubic overshoot is not clamped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_GEOMETRY = {"resize": "shortest side, on the tensor", "crop": "centre square"}  # as a fingerprint says it


def hps_preprocess(
    images: Tensor,
    size: int,
    antialias: bool,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Images as HPSv2 takes them (arXiv 2306.09341 and its public code): the whole image, padded to a square.

    The longest side goes to ``size``; zeros pad to a square, centred, the odd pixel right and below; then mean and
    standard deviation. An image whose longest side is ``size`` already is not resized but padded all the same (the
    reference pads only what it resizes, and then fails on a batch of non-square images).

    Args:
        images: (B, 3, H, W) in [0, 1], floating.
        size: side of the square, in pixels.
        antialias: low-pass filter before subsampling. Off, frequencies above the reward model's own Nyquist limit
            alias into its input, and gradient flows back into them.
        mean: per channel, subtracted after the padding.
        std: per channel.

    Returns:
        (B, 3, size, size), differentiable.
    """
    height, width = images.shape[-2:]
    longest = max(height, width)
    if longest != size:
        scale = size / float(longest)
        height, width = round(height * scale), round(width * scale)
        images = _resize(images, (height, width), antialias)
    pad_height, pad_width = size - height, size - width
    left, top = pad_width // 2, pad_height // 2
    images = F.pad(images, (left, pad_width - left, top, pad_height - top))
    return normalise(images, mean, std)


def clip_preprocess(
    images: Tensor,
    size: int,
    antialias: bool,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Images as CLIP takes them (arXiv 2103.00020): the centre square, nothing padded.

    The shortest side goes to ``size``, the longest to the whole number below its share; then a centre crop.

    Args:
        images: (B, 3, H, W) in [0, 1], floating.
        size: side of the square, in pixels.
        antialias: as :func:`hps_preprocess`; the original resizes with PIL, which always filters.
        mean: per channel.
        std: per channel.

    Returns:
        (B, 3, size, size), differentiable.
    """
    height, width = images.shape[-2:]
    shortest = min(height, width)
    if shortest != size:
        height, width = int(size * height / shortest), int(size * width / shortest)
        images = _resize(images, (height, width), antialias)
    top, left = (height - size) // 2, (width - size) // 2
    return normalise(images[..., top : top + size, left : left + size], mean, std)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images − mean) / std per channel, (B, 3, H, W)."""
    shape = (1, -1, 1, 1)
    return (images - torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)) / torch.tensor(
        std, dtype=images.dtype, device=images.device
    ).view(shape)


def nyquist(size: int, longest: int) -> float:
    """The highest frequency of an image that a reward model can see, in cycles per image pixel.

    Args:
        size: side that the model reads, in pixels.
        longest: longest side of the image, which is resized to ``size``.
    """
    return min(0.5, size / longest / 2)


def _resize(images: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=antialias)
