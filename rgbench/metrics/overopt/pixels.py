"""Pixel statistics: roughness, sharpness and noise of the luma, in 8-bit grey levels.

    total variation      mean |Y(x+1) − Y(x)| + mean |Y(y+1) − Y(y)|          (Rudin et al., 1992)
    Laplacian variance   var of Y(x±1) + Y(y±1) − 4 Y                         (Pech-Pacheco et al., 2000)
    wavelet noise        median |HH| / .6745, HH the finest diagonal Haar band (Donoho and Johnstone, 1994)

Added noise raises all three, sharpening the first two, blur lowers them. Smooth content
is invisible to HH, so the last one reads noise almost alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context
from rgbench.metrics.overopt.per_image import Level, PerImageProbe
from rgbench.metrics.overopt.power import luma_chroma

GREY_LEVELS = 255
NORMAL_MEDIAN = 0.6745  # median |x| of a standard normal
FAMILY = "pixel and colour"
LEVELS = (
    Level("total_variation", "Total variation", "levels", FAMILY, 2),
    Level("laplacian_variance", "Laplacian variance", "levels²", FAMILY, 0),
    Level("wavelet_noise", "Wavelet noise σ", "levels", FAMILY, 2),
)


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

    def __init__(self, context: Context) -> None:
        super().__init__(context, LEVELS, plane="Rec. 601 luma, 0 to 255", wavelet="Haar, finest diagonal band")

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        luma = GREY_LEVELS * luma_chroma(images)[:, 0]
        return torch.stack([total_variation(luma), laplacian_variance(luma), wavelet_noise(luma)])
