"""HPSv2's image preprocessing on tensors (arXiv 2306.09341 and its public code): resize, pad, normalise.

The longest side goes to ``size`` by bicubic interpolation, with or without antialiasing; zeros pad to a square,
centred, the odd pixel right and below; then CLIP's mean and standard deviation. Bicubic overshoot is not clamped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def hps_preprocess(
    images: Tensor,
    size: int,
    antialias: bool,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Images as the reward model takes them.

    An image whose longest side is ``size`` already is not resized but padded all the same (the reference pads only
    what it resizes, and then fails on a batch of non-square images).

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
        new_size = (round(height * scale), round(width * scale))
        images = F.interpolate(images, new_size, mode="bicubic", align_corners=False, antialias=antialias)
        height, width = new_size
    pad_height, pad_width = size - height, size - width
    left, top = pad_width // 2, pad_height // 2
    images = F.pad(images, (left, pad_width - left, top, pad_height - top))
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
