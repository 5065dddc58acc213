"""Kernel distance: unbiased MMD² with the cubic polynomial kernel (Bińkowski et al., 2018, arXiv 1801.01401, eq. 4).

    k(x, y) = (x·y / d + 1)³
    MMD² = Σ_{i≠j} k(x_i, x_j) / m(m − 1) + Σ_{i≠j} k(y_i, y_j) / n(n − 1) − 2 Σ_{ij} k(x_i, y_j) / mn

Unlike the Fréchet distance it has no bias at small n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.features import EFFLITE0_FEATURES, FeatureRows
from rgbench.metrics.intervals import jackknife_groups, jackknife_interval

NUM_SUBSETS = 50
SUBSET_SIZE = 500
METRIC = Metric(
    name="kd_efflite0", label="KD-EffLite0 ×1000", direction="lower", unit="", family="set distance", decimals=2
)
SCALE = 1000
MIN_IMAGES = 2


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(m, n) kernel values of (m, d) and (n, d) float64 features."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD² between (m, d) and (n, d) float64 features, m and n ≥ 2; may be below zero."""
    return _unbiased(_off_diagonal(x), len(x), _off_diagonal(y), len(y), float(polynomial_kernel(x, y).sum()))


def kid(x: np.ndarray, y: np.ndarray, subsets: int = NUM_SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> float:
    """Mean MMD² over random subsets of both sides, drawn without replacement as torch-fidelity draws them.

    Args:
        x: (m, d) float64 features, m ≥ 2.
        y: (n, d), n ≥ 2.
        subsets: how many.
        size: samples of each, at most; smaller sets are used whole.
        seed: of the drawing.
    """
    size = min(size, len(x), len(y))
    rng = np.random.RandomState(seed)
    draws = []
    for _ in range(subsets):
        first = x[rng.choice(len(x), size, replace=False)]
        draws.append(mmd2(first, y[rng.choice(len(y), size, replace=False)]))
    return float(np.mean(draws))


def mmd2_replicates(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> list[float]:
    """MMD² of the whole sets with each group of ``x`` left out, from sums of the kernel over pairs of groups.

    Args:
        x: (m, d) float64 features.
        y: (n, d), held fixed.
        groups: (m,) group of each row of ``x``.

    Returns:
        One figure per group; none unless each leaves two rows.
    """
    num = groups.max() + 1
    if len(groups) - np.bincount(groups).max() < 2:
        return []
    parts = [x[groups == g] for g in range(num)]
    within = np.array([[float(polynomial_kernel(a, b).sum()) for b in parts] for a in parts])
    diagonal = np.array([_diagonal(part) for part in parts])
    cross = np.array([float(polynomial_kernel(part, y).sum()) for part in parts])
    off_y = _off_diagonal(y)
    out = []
    for g in range(num):
        keep = np.arange(num) != g
        off_x = float(within[np.ix_(keep, keep)].sum() - diagonal[keep].sum())
        out.append(_unbiased(off_x, len(x) - len(parts[g]), off_y, len(y), float(cross[keep].sum())))
    return out


def _unbiased(off_x: float, m: int, off_y: float, n: int, cross: float) -> float:
    return off_x / (m * (m - 1)) + off_y / (n * (n - 1)) - 2 * cross / (m * n)


def _off_diagonal(x: np.ndarray) -> float:
    return float(polynomial_kernel(x, x).sum()) - _diagonal(x)


def _diagonal(x: np.ndarray) -> float:
    return float((((x * x).sum(1) / x.shape[1] + 1) ** 3).sum())


class KernelDistance:
    """Kernel distance to real scenes on EfficientNet-Lite0 features, × 1000, with jackknife interval.

    Args:
        context: needs prompts with scenes.

    Raises:
        UsageError: prompts without scenes, or fewer than 2.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        context.require("kid", MIN_IMAGES)
        subsets = {"num": NUM_SUBSETS, "size": min(SUBSET_SIZE, len(context.prompts)), "seed": 0}
        self.quantities = (Quantity(METRIC, context.protocol(**context.features.fields(), subsets=subsets)),)
        self.rows = FeatureRows(len(context.prompts), EFFLITE0_FEATURES)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.rows.put(positions, self.context.features(images))

    def finish(self) -> list[Measurement]:
        num = len(self.context.prompts)
        x = self.rows.take(np.arange(num))
        y = self.context.features.reference_rows().astype(np.float64)
        value = SCALE * kid(x, y)
        replicates = [SCALE * v for v in mmd2_replicates(x, y, jackknife_groups(num))]
        return [Measurement(self.quantities[0], value, jackknife_interval(value, replicates), num)]
