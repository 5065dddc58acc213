"""Colour drift: saturation, clipping, contrast and colourfulness.

    saturation       HSV, (max − min) / max per pixel, 0 where black: mean, and 95th percentile over pixels
    clipped          share of pixels with a channel at 0 or 255
    RMS contrast     standard deviation of the luma over its range               (Peli, 1990)
    colourfulness    √(σ²_rg + σ²_yb) + .3 √(μ²_rg + μ²_yb),  rg = R − G,  yb = (R + G)/2 − B, on 0 to 255
                     (Hasler and Süsstrunk, 2003)

Reward models like glowing colours; a student that pleases them drifts there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context
from rgbench.metrics.overopt.per_image import Level, PerImageProbe
from rgbench.metrics.overopt.pixels import FAMILY, GREY_LEVELS
from rgbench.metrics.overopt.power import luma_chroma

PERCENT = 100
LEVELS = (
    Level("saturation", "Saturation", "%", FAMILY, 1),
    Level("saturation_p95", "Saturation, 95th percentile", "%", FAMILY, 1),
    Level("clipped", "Clipped pixels", "%", FAMILY, 1),
    Level("rms_contrast", "RMS contrast", "%", FAMILY, 1),
    Level("colourfulness", "Colourfulness", "", FAMILY, 1),
)


def saturation(images: Tensor) -> Tensor:
    """(B, H, W) HSV saturation in [0, 1] of (B, 3, H, W) images in [0, 1]."""
    high, low = images.amax(1), images.amin(1)
    return torch.where(high > 0, (high - low) / high.clamp(min=torch.finfo(high.dtype).tiny), 0.0)


def upper_percentile(values: Tensor, share: float = 0.95) -> Tensor:
    """(B,) nearest-rank percentile of (B, n); ``torch.quantile`` refuses a batch of large images."""
    return values.kthvalue(math.ceil(share * values.shape[1]), dim=1).values


def clipped_share(images: Tensor) -> Tensor:
    """(B,) share of pixels with a channel at either end of [0, 1]."""
    return ((images <= 0) | (images >= 1)).any(1).double().mean((1, 2))


def rms_contrast(images: Tensor) -> Tensor:
    """(B,) standard deviation of the luma, in [0, ½]."""
    return luma_chroma(images)[:, 0].flatten(1).std(1, unbiased=False)


def colourfulness(images: Tensor) -> Tensor:
    """(B,) M⁽³⁾ of Hasler and Süsstrunk, on 8-bit levels; 0 grey, above 80 vivid."""
    r, g, b = (GREY_LEVELS * images.double()).flatten(2).unbind(1)
    opponents = torch.stack([r - g, (r + g) / 2 - b])
    spread = opponents.var(2, unbiased=False).sum(0).sqrt()
    return spread + 0.3 * opponents.mean(2).square().sum(0).sqrt()


class ColourDrift(PerImageProbe):
    """Saturation, clipped pixels, contrast, colourfulness.

    Args:
        context: any prompts.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context, LEVELS, colour="HSV saturation, Rec. 601 luma, sRGB values as they are")

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        colours = saturation(images.double()).flatten(1)
        return torch.stack(
            [
                PERCENT * colours.mean(1),
                PERCENT * upper_percentile(colours),
                PERCENT * clipped_share(images),
                PERCENT * rms_contrast(images),
                colourfulness(images),
            ]
        )
