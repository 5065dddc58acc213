"""Radial power spectrum: does an image carry the high frequencies that real ones carry?

    Y = 0.299 R + 0.587 G + 0.114 B, Cb = (B − Y) / 1.772, Cr = (R − Y) / 1.402    (Rec. 601)
    P = |DFT(h · (Y − mean Y))|² / (H W Σh²),  h a periodic 2-D Hann window

P is averaged over images before anything is binned, and binned before any logarithm.
ΣP over all frequencies is the (windowed) variance of the image, so P of two image sizes
can be compared. Only half of the plane is computed; its interior columns count twice,
column 0 and (even widths) the Nyquist column once.

    power     P, (H, W//2 + 1) float64      radius  |f| in cycles per pixel, same shape
    weight    how often each cell counts    HFER(c) Σ_{r>c} P / Σ_{r>0} P
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Direction, Measurement, Metric, Quantity
from rgbench.metrics.intervals import NUM_GROUPS, jackknife_groups, jackknife_interval
from rgbench.metrics.reference import from_uint8
from rgbench.worlds.scenes import IMAGE_SIZE

CUTOFF = 0.25  # cycles/pixel: the upper octave
REWARD_NYQUIST = 0.22  # 28 / 64 / 2: what the benchtop's reward model cannot see, rounded as in its documents
SLOPE_BAND = (0.02, 0.35)
OCTAVES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def luma_chroma(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] → float64 Y in [0, 1], Cb and Cr in [−½, ½]."""
    r, g, b = images.double().unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, (b - y) / 1.772, (r - y) / 1.402], 1)


def power_spectrum(planes: Tensor, window: bool = True) -> Tensor:
    """P of each plane.

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
    """Geometry of the half plane of an H × W image."""

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
    """Mean radius and mean power of each radial bin, (K,) each, K = min(H, W) // 2."""
    plane = half_plane(height, width)
    inside = plane.bins >= 0
    bins, weight = plane.bins[inside], plane.weight[inside]
    count = np.bincount(bins, weight, plane.num_bins)
    radius = np.bincount(bins, weight * plane.radius[inside], plane.num_bins) / count
    return radius, np.bincount(bins, weight * power[inside], plane.num_bins) / count


def band_energy(power: np.ndarray, height: int, width: int, low: float, high: float = math.inf) -> float:
    """Σ P over low < r ≤ high, corners included."""
    plane = half_plane(height, width)
    inside = (plane.radius > low) & (plane.radius <= high)
    return float((plane.weight * power)[inside].sum())


def high_frequency_ratio(power: np.ndarray, height: int, width: int, cutoff: float = CUTOFF) -> float:
    """HFER(c), in [0, 1]; NaN for images without any contrast."""
    whole = band_energy(power, height, width, 0)
    return band_energy(power, height, width, cutoff) / whole if whole > 0 else math.nan


def slope(radius: np.ndarray, profile: np.ndarray) -> float:
    """Least squares of ln P against ln f on [.02, .35]; natural images about −2."""
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
    """√mean_k (10 log₁₀ S − 10 log₁₀ S_ref)² in dB; NaN where a bin is empty of power."""
    if not ((profile > 0).all() and (reference > 0).all()):
        return math.nan
    return float(np.sqrt(np.mean((10 * np.log10(profile / reference)) ** 2)))


def octave_gaps(power: np.ndarray, reference: np.ndarray, height: int, width: int) -> dict[str, float]:
    """dB gap per octave below Nyquist: an even rise is contrast, a rise of the last ones noise, a fall blur."""
    gaps = {}
    for low, high in pairwise(OCTAVES):
        pair = [band_energy(p, height, width, low, high) for p in (power, reference)]
        gaps[f"{low:g}-{high:g}"] = ratio_db(*pair)
    return gaps


def gaps(power: np.ndarray, reference: np.ndarray, height: int, width: int) -> dict[str, float]:
    """The scalars of the probe: luma power of images against that of reference images of the same size.

    Returns:
        ``hfer_gap_db``, ``band_gap_db`` (above .25), ``band_gap_reward_nyquist_db`` (above .22),
        ``log_spectral_distance_db``, ``slope_gap``; NaN where undefined.
    """
    radius, profile = radial_profile(power, height, width)
    _, reference_profile = radial_profile(reference, height, width)
    ratios = [high_frequency_ratio(p, height, width) for p in (power, reference)]

    def above(cutoff: float) -> float:
        return ratio_db(*(band_energy(p, height, width, cutoff) for p in (power, reference)))

    return {
        "hfer_gap_db": ratio_db(*ratios),
        "band_gap_db": above(CUTOFF),
        "band_gap_reward_nyquist_db": above(REWARD_NYQUIST),
        "log_spectral_distance_db": log_spectral_distance(profile, reference_profile),
        "slope_gap": slope(radius, profile) - slope(radius, reference_profile),
    }


def _metric(name: str, label: str, direction: Direction, unit: str) -> Metric:
    return Metric(name=name, label=label, direction=direction, unit=unit, family="spectrum", decimals=2)


METRICS = (
    _metric("hfer_gap_db", "HFER gap", "target", "dB"),
    _metric("band_gap_db", "Energy gap > .25", "target", "dB"),
    _metric("slope_gap", "Spectral slope gap", "target", ""),
    _metric("log_spectral_distance_db", "Log-spectral distance", "lower", "dB"),
)


class SpectrumProbe:
    """Spectrum of generated images against real scenes: HFER, energy above .25, slope, log-spectral distance.

    The scenes show what the prompts ask for, so the jackknife leaves out prompts on both
    sides at once: what a prompt's objects do to the spectrum then cancels.

    Args:
        context: needs prompts with scenes.

    Raises:
        UsageError: prompts without scenes, or images of another size than the scenes'.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        context.require("spectrum", 1, IMAGE_SIZE)
        protocol = context.protocol(
            reference=context.reference.fields(),
            planes="Rec. 601 luma, Cb, Cr",
            window="periodic 2-D Hann after the mean is removed",
            cutoff=CUTOFF,
            slope_band=list(SLOPE_BAND),
            jackknife=f"{NUM_GROUPS} groups of prompts, left out on both sides",
        )
        self.quantities = tuple(Quantity(metric, protocol) for metric in METRICS)
        self.groups = jackknife_groups(len(context.prompts))
        side = context.resolution
        self.sums = np.zeros((self.groups.max() + 1, 3, side, side // 2 + 1))

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self._add(self.sums, images, positions)

    def finish(self) -> list[Measurement]:
        reference = self.context.reference.remember("power", self._reference_sums)
        power, reference_power = (sums.sum(0) / len(self.groups) for sums in (self.sums, reference))
        values = self._gaps(power, reference_power)
        replicates = [
            self._gaps(ours, real)
            for ours, real in zip(self._without(self.sums), self._without(reference), strict=True)
        ]
        extra = self._extra(power, reference_power, values)
        return [self._measure(quantity, values, replicates, extra) for quantity in self.quantities]

    def _gaps(self, power: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        return gaps(power[0], reference[0], self.context.resolution, self.context.resolution)

    def _without(self, sums: np.ndarray) -> list[np.ndarray]:
        """Mean power with each group of prompts left out; none where nothing would be left."""
        num, counts = len(self.groups), np.bincount(self.groups)
        return [(sums.sum(0) - part) / (num - n) for part, n in zip(sums, counts, strict=True) if n < num]

    def _measure(
        self, quantity: Quantity, values: dict[str, float], replicates: list[dict[str, float]], extra: dict[str, Any]
    ) -> Measurement:
        name = quantity.metric.name
        drawn = [row[name] for row in replicates]
        defined = math.isfinite(values[name])
        return Measurement(
            quantity=quantity,
            value=values[name] if defined else None,
            interval=jackknife_interval(values[name], drawn) if np.isfinite([values[name], *drawn]).all() else None,
            num_samples=len(self.groups),
            flags=() if defined else ("images without contrast",),
            extra=extra,
        )

    def _reference_sums(self) -> np.ndarray:
        sums = np.zeros_like(self.sums)
        for at in np.array_split(np.arange(len(self.groups)), -(-len(self.groups) // 256)):
            self._add(sums, from_uint8(self.context.reference.images[at]), at)
        return sums

    def _add(self, sums: np.ndarray, images: Tensor, positions: np.ndarray) -> None:
        np.add.at(sums, self.groups[positions], power_spectrum(luma_chroma(images)).cpu().numpy())

    def _extra(self, power: np.ndarray, reference: np.ndarray, values: dict[str, float]) -> dict[str, Any]:
        """Vectors of luma and mean chroma power, octave gaps, and the gap above the reward model's Nyquist limit."""
        size = (self.context.resolution,) * 2
        chroma, chroma_reference = power[1:].mean(0), reference[1:].mean(0)
        radius, profile = radial_profile(power[0], *size)
        found = {
            "octave_gaps_db": octave_gaps(power[0], reference[0], *size),
            "chroma_octave_gaps_db": octave_gaps(chroma, chroma_reference, *size),
            "band_gap_reward_nyquist_db": values["band_gap_reward_nyquist_db"],
            "slope": slope(radius, profile),
            "reference_slope": slope(*radial_profile(reference[0], *size)),
        }
        return {
            "radius": radius.tolist(),
            "power": profile.tolist(),
            "reference_power": radial_profile(reference[0], *size)[1].tolist(),
            "chroma_power": radial_profile(chroma, *size)[1].tolist(),
            "chroma_reference_power": radial_profile(chroma_reference, *size)[1].tolist(),
            **_finite(found),
        }


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """NaN, a figure that does not exist, as None."""
    return {
        key: _finite(value) if isinstance(value, dict) else value if math.isfinite(value) else None
        for key, value in figures.items()
    }
