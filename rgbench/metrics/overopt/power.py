"""Power spectra of images: transform, rings, bands, slope. What all spectral probes share.

    Y = 0.299 R + 0.587 G + 0.114 B, Cb = (B − Y) / 1.772, Cr = (R − Y) / 1.402    (Rec. 601)
    P = |DFT(h · (Y − mean Y))|² / (H W Σh²),  h a periodic 2-D Hann window

P is averaged over images before anything is binned, and binned before any logarithm.
ΣP over all frequencies is the (windowed) variance of the image, so P of two image sizes
can be compared. Only half of the plane is computed; its interior columns count twice,
column 0 and (even widths) the Nyquist column once.

Ring k holds the frequencies whose radius rounds to k/N, N the shorter side, and its radius
is k/N itself. The mean radius of the ring's cells would be exact for a periodic image
without window, but under the Hann window, whose main lobe lifts the lowest rings of a
falling spectrum, k/N reads known slopes with a third of the error
(docs/measure/spectral_slope.py measures both).

    power     P, (H, W//2 + 1) float64      radius  |f| in cycles per pixel, same shape
    weight    how often each cell counts    HFER(c) Σ_{r>c} P / Σ_{r>0} P
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

CUTOFF = 0.25  # cycles/pixel: the upper octave
SLOPE_BAND = (0.02, 0.35)
OCTAVES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def luma_chroma(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] → float64 Y in [0, 1], Cb and Cr in [−½, ½]."""
    r, g, b = images.double().unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, (b - y) / 1.772, (r - y) / 1.402], 1)


def power_spectrum(planes: Tensor, window: bool = True) -> Tensor:
    """P of each plane; without window, Σ weight · P is the plane's variance.

    Args:
        planes: (..., H, W) float64.
        window: Hann before the transform; without it the borders leak into all frequencies.

    Returns:
        (..., H, W//2 + 1) float64.
    """
    height, width = planes.shape[-2:]
    planes = planes - planes.mean((-2, -1), keepdim=True)
    energy = float(height * width)
    if window:
        hann = torch.outer(*(torch.hann_window(n, dtype=planes.dtype, device=planes.device) for n in (height, width)))
        planes, energy = planes * hann, float(hann.square().sum())
    return torch.fft.rfft2(planes).abs().square() / (height * width * energy)


@dataclass(frozen=True)
class Plane:
    """Geometry of the half plane of an H × W image; arrays are (H, W//2 + 1).

    Attributes:
        radius: |f| in cycles per pixel.
        weight: how often each cell counts in the whole plane, 1 or 2.
        bins: ring of each cell, from 0; −1 for none.
        num_bins: min(H, W) // 2.
    """

    radius: np.ndarray
    weight: np.ndarray
    bins: np.ndarray
    num_bins: int


@lru_cache(maxsize=8)
def half_plane(height: int, width: int) -> Plane:
    """Radius, multiplicity and radial bin of each cell.

    Bin k holds the radii that round to k / min(H, W), k up to the Nyquist limit 0.5;
    corners beyond it, and the mean, belong to no bin (−1).
    """
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    weight = np.full(radius.shape, 2.0)
    weight[:, 0] = 1
    if width % 2 == 0:
        weight[:, -1] = 1
    side = min(height, width)
    bins = np.rint(radius * side).astype(np.int64)
    num_bins = side // 2
    bins[(bins < 1) | (bins > num_bins)] = 0
    return Plane(radius, weight, bins - 1, num_bins)


def radial_profile(power: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Radius k / min(H, W) and mean power of each ring, (K,) each, K = min(H, W) // 2."""
    plane = half_plane(height, width)
    inside = plane.bins >= 0
    bins, weight = plane.bins[inside], plane.weight[inside]
    count = np.bincount(bins, weight, plane.num_bins)
    radius = np.arange(1, plane.num_bins + 1) / min(height, width)
    return radius, np.bincount(bins, weight * power[inside], plane.num_bins) / count


def band_energy(power: np.ndarray, height: int, width: int, low: float, high: float = math.inf) -> float:
    """Σ P over low < r ≤ high, corners included.

    Args:
        power: P, (H, W//2 + 1).
        height: H.
        width: W.
        low: in cycles per pixel.
        high: likewise.
    """
    plane = half_plane(height, width)
    inside = (plane.radius > low) & (plane.radius <= high)
    return float((plane.weight * power)[inside].sum())


def high_frequency_ratio(power: np.ndarray, height: int, width: int, cutoff: float = CUTOFF) -> float:
    """HFER(c), in [0, 1]; NaN for images without any contrast."""
    whole = band_energy(power, height, width, 0)
    return band_energy(power, height, width, cutoff) / whole if whole > 0 else math.nan


def slope(radius: np.ndarray, profile: np.ndarray) -> float:
    """Least squares of ln P against ln f on [.02, .35]; natural images about −2.

    Args:
        radius: f of each ring, (K,) in cycles per pixel, as :func:`radial_profile` gives them.
        profile: P of each ring, (K,).

    Returns:
        The exponent; NaN for fewer than two rings there, or one without power.
    """
    inside = (radius >= SLOPE_BAND[0]) & (radius <= SLOPE_BAND[1])
    if inside.sum() < 2 or not (profile[inside] > 0).all():
        return math.nan
    return float(np.polyfit(np.log(radius[inside]), np.log(profile[inside]), 1)[0])


def decibel(ratio: float) -> float:
    """10 log₁₀; NaN where it has none."""
    return 10 * math.log10(ratio) if math.isfinite(ratio) and ratio > 0 else math.nan


def ratio_db(value: float, reference: float) -> float:
    """dB gap of two energies; NaN where one is zero."""
    return decibel(value / reference) if reference > 0 else math.nan


def log_spectral_distance(profile: np.ndarray, reference: np.ndarray) -> float:
    """√mean_k (10 log₁₀ S − 10 log₁₀ S_ref)² in dB of two profiles (K,); NaN where a ring is empty of power."""
    if not ((profile > 0).all() and (reference > 0).all()):
        return math.nan
    return float(np.sqrt(np.mean((10 * np.log10(profile / reference)) ** 2)))


def octave_energies(power: np.ndarray, height: int, width: int) -> dict[str, float]:
    """Σ P of each octave below Nyquist, by name, such as ``0.25-0.5``."""
    return {f"{low:g}-{high:g}": band_energy(power, height, width, low, high) for low, high in pairwise(OCTAVES)}


def octave_gaps(power: np.ndarray, reference: np.ndarray, height: int, width: int) -> dict[str, float]:
    """dB gap per octave below Nyquist: an even rise is contrast, a rise of the last ones noise, a fall blur."""
    theirs = octave_energies(reference, height, width)
    return {band: ratio_db(energy, theirs[band]) for band, energy in octave_energies(power, height, width).items()}
