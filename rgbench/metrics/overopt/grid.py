"""Grid peaks: periodic patterns that a decoder or a patch-wise reward model leaves in images.

A pattern that repeats every p pixels has its power on the lattice (i N/p, j N/p). Each
lattice cell of the mean luma spectrum is divided by the median of its ring (the ring's
other cells), which takes out the radial fall that the image content has; the figure is
the mean of these ratios in dB, 0 where nothing repeats.

Periods: 8, the stride of Stable Diffusion's VAE, and the patch of the reward model in
image pixels (14 · 512 / 224 = 32 at 512 pixels).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from rgbench.metrics.contract import Context, Metric
from rgbench.metrics.overopt.grouped import Figures, SpectralProbe, finite
from rgbench.metrics.overopt.power import decibel, half_plane
from rgbench.metrics.overopt.spectrum import reward_geometry

VAE_STRIDE = 8  # pixels


@lru_cache(maxsize=16)
def lattice(size: int, period: float) -> np.ndarray:
    """(size, size//2 + 1) bool: cells at multiples of N/p, without the mean and the corners beyond Nyquist."""
    cells = np.zeros((size, size // 2 + 1), dtype=bool)
    steps = np.arange(-(size // 2), size // 2 + 1)
    on = {round(k * size / period) for k in steps if abs(round(k * size / period)) <= size // 2}
    rows = sorted({k % size for k in on})
    cells[np.ix_(rows, sorted(k for k in on if k >= 0))] = True
    return cells & (half_plane(size, size).bins >= 0)


def peak_ratios(power: np.ndarray, period: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lattice cells over the median of their rings.

    Args:
        power: (N, N//2 + 1) mean power.
        period: p in pixels.

    Returns:
        Row and column of each lattice cell and its ratio, (L,) each; rings without other cells, or without power,
        are left out.
    """
    size = len(power)
    plane, cells = half_plane(size, size), lattice(size, period)
    rows, columns = np.nonzero(cells)
    ratios = np.full(len(rows), np.nan)
    for ring in np.unique(plane.bins[cells]):
        others = power[(plane.bins == ring) & ~cells]
        here = plane.bins[rows, columns] == ring
        if len(others) and (median := float(np.median(others))) > 0:
            ratios[here] = power[rows[here], columns[here]] / median
    known = np.isfinite(ratios)
    return rows[known], columns[known], ratios[known]


def grid_peak_db(power: np.ndarray, period: float) -> float:
    """Mean lattice cell over the median of its ring, in dB; NaN without contrast or without a lattice."""
    rows, columns, ratios = peak_ratios(power, period)
    if not len(ratios):
        return math.nan
    return decibel(float(np.average(ratios, weights=half_plane(len(power), len(power)).weight[rows, columns])))


def axis_peaks_db(power: np.ndarray, period: float) -> dict[str, float]:
    """Peak over ring in dB at k = N/p, 2N/p … on the two axes (the larger of both), by k."""
    rows, columns, ratios = peak_ratios(power, period)
    found: dict[str, float] = {}
    for row, column, ratio in zip(rows, columns, ratios, strict=True):
        if (row == 0) != (column == 0):
            k = str(column or min(row, len(power) - row))
            found[k] = max(found.get(k, -math.inf), decibel(float(ratio)))
    return found


def _metric(name: str, label: str) -> Metric:
    return Metric(name=name, label=label, direction="target", unit="dB", family="spectrum", decimals=2)


AGAINST_REAL = (
    _metric("grid_vae_gap_db", "Grid peaks gap, VAE stride"),
    _metric("grid_patch_gap_db", "Grid peaks gap, reward patch"),
)
LEVELS = (_metric("grid_vae_db", "Grid peaks, VAE stride"), _metric("grid_patch_db", "Grid peaks, reward patch"))


class GridPeaks(SpectralProbe):
    """Peaks at the VAE stride and at the reward model's patch period.

    Args:
        context: any prompts; with real images of the same size, gaps to those.
    """

    def __init__(self, context: Context) -> None:
        input_size, patch = reward_geometry(context)
        self.periods = {"vae": float(VAE_STRIDE), "patch": patch * context.resolution / input_size}
        super().__init__(context, (AGAINST_REAL, LEVELS), planes=1, periods_px=self.periods)

    def figures(self, power: np.ndarray, real: np.ndarray | None) -> Figures:
        ours = {f"grid_{name}_db": grid_peak_db(power[0], period) for name, period in self.periods.items()}
        if real is None:
            return ours
        return {
            f"grid_{name}_gap_db": ours[f"grid_{name}_db"] - grid_peak_db(real[0], period)
            for name, period in self.periods.items()
        }

    def describe(self, power: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
        """Level and peaks by k, of the images and of real ones."""
        found: dict[str, Any] = {}
        for side, mean in (("", power), ("reference_", real)):
            if mean is None:
                continue
            for name, period in self.periods.items():
                found[f"{side}{name}_axis_db"] = finite(axis_peaks_db(mean[0], period))
                found |= finite({f"{side}{name}_level_db": grid_peak_db(mean[0], period)})
        return found
