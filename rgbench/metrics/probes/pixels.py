"""Pixel statistics, in 8-bit grey levels, and colour drift: what is read from each image by itself.

    total variation      mean |Y(x+1) − Y(x)| + mean |Y(y+1) − Y(y)|          (Rudin et al., 1992)
    Laplacian variance   var of Y(x±1) + Y(y±1) − 4 Y                         (Pech-Pacheco et al., 2000)
    wavelet noise        median |HH| / .6745, HH the finest diagonal Haar band (Donoho and Johnstone, 1994)
    saturation           HSV, (max − min) / max per pixel, 0 where black: mean, and 95th percentile over pixels
    clipped              share of pixels with a channel at 0 or 255
    RMS contrast         standard deviation of the luma over its range        (Peli, 1990)
    colourfulness        √(σ²_rg + σ²_yb) + .3 √(μ²_rg + μ²_yb),  rg = R − G,  yb = (R + G)/2 − B, on 0 to 255
                         (Hasler and Süsstrunk, 2003)

Added noise raises the first three, sharpening the first two, blur lowers them. Smooth content is invisible to HH, so
wavelet noise reads noise almost alone. Reward models like glowing colours; a student that pleases them drifts there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.context import Context
from rgbench.metrics.probes.base import PerImageProbe
from rgbench.metrics.probes.spectrum import luma_chroma
from rgbench.metrics.values import Direction, Family, MetricInfo

GREY_LEVELS = 255
PERCENT = 100
REFERENCE, PIXELS = Direction.REFERENCE, Family.PIXELS
NORMAL_MEDIAN = 0.6745  # median |x| of a standard normal


def total_variation(luma: Tensor) -> Tensor:
    """(B,) of (B, H, W)."""
    return luma.diff(dim=2).abs().mean((1, 2)) + luma.diff(dim=1).abs().mean((1, 2))


def laplacian_variance(luma: Tensor) -> Tensor:
    """(B,) of (B, H, W), over the pixels that have four neighbours."""
    centre = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return (around - 4 * centre).flatten(1).var(1, unbiased=False)


def wavelet_noise(luma: Tensor) -> Tensor:
    """(B,) of (B, H, W): standard deviation of white noise; an odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in luma.shape[1:])
    x = luma[:, :height, :width]
    diagonal = (x[:, ::2, ::2] - x[:, ::2, 1::2] - x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 2
    magnitude = diagonal.abs().flatten(1)
    return magnitude.median(dim=1).values / NORMAL_MEDIAN


class PixelStatistics(PerImageProbe):
    """Total variation, Laplacian variance, wavelet noise.

    Args:
        context: any prompts.
    """

    name = "pixels"
    infos = (
        MetricInfo.of(
            "total_variation", "Total variation", "mean step between neighbours", REFERENCE, PIXELS, "levels"
        ),
        MetricInfo.of(
            "laplacian_variance", "Laplacian variance", "sharpness of edges", REFERENCE, PIXELS, "levels²", 0
        ),
        MetricInfo.of(
            "wavelet_noise", "Wavelet noise σ", "noise; blind to smooth content", REFERENCE, PIXELS, "levels"
        ),
    )

    def __init__(self, context: Context) -> None:
        super().__init__(context, plane="Rec. 601 luma, 0 to 255", wavelet="Haar, finest diagonal band")

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        luma = GREY_LEVELS * luma_chroma(images)[:, 0]
        return torch.stack([total_variation(luma), laplacian_variance(luma), wavelet_noise(luma)])


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

    name = "colour"
    infos = (
        MetricInfo.of("saturation", "Saturation", "mean HSV saturation", REFERENCE, PIXELS, "%", 1),
        MetricInfo.of(
            "saturation_p95", "Saturation, 95th percentile", "of each image's pixels", REFERENCE, PIXELS, "%", 1
        ),
        MetricInfo.of("clipped", "Clipped pixels", "pixels with a channel at 0 or 255", REFERENCE, PIXELS, "%", 1),
        MetricInfo.of("rms_contrast", "RMS contrast", "standard deviation of the luma", REFERENCE, PIXELS, "%", 1),
        MetricInfo.of("colourfulness", "Colourfulness", "spread of opponent colours", REFERENCE, PIXELS, "", 1),
    )

    def __init__(self, context: Context) -> None:
        super().__init__(context, colour="HSV saturation, Rec. 601 luma, sRGB values as they are")

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
