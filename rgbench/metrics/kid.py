"""Kernel distance: unbiased MMD² with the cubic polynomial kernel (Bińkowski et al., 2018, arXiv 1801.01401, eq. 4).

    k(x, y) = (x·y / d + 1)³
    MMD² = Σ_{i≠j} k(x_i, x_j) / m(m − 1) + Σ_{i≠j} k(y_i, y_j) / n(n − 1) − 2 Σ_{ij} k(x_i, y_j) / mn

Unlike the Fréchet distance it has no bias at small n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.intervals import cluster_groups, jackknife_interval

NUM_SUBSETS = 50
SUBSET_SIZE = 500
FAMILY = "set distance"
SCALE = 1000
MIN_IMAGES = 2
CHUNK = 4096

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(m, n) kernel values of (m, d) and (n, d) float64 features."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD² between (m, d) and (n, d) float64 features, m and n ≥ 2; may be below zero."""
    return _unbiased(_off_diagonal(x), len(x), _off_diagonal(y), len(y), float(polynomial_kernel(x, y).sum()))


def kid(x: np.ndarray, y: np.ndarray, subsets: int = NUM_SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> float:
    """Mean MMD² over random subsets of both sides, drawn without replacement as torch-fidelity draws them.

    Args:
        x: (m, d) features, m ≥ 2; may be a memory map.
        y: (n, d), n ≥ 2, likewise.
        subsets: how many.
        size: samples of each, at most; smaller sets are used whole.
        seed: of the drawing.
    """
    size = min(size, len(x), len(y))
    rng = np.random.RandomState(seed)
    draws = []
    for _ in range(subsets):
        first = _wide(x[rng.choice(len(x), size, replace=False)])
        draws.append(mmd2(first, _wide(y[rng.choice(len(y), size, replace=False)])))
    return float(np.mean(draws))


def mmd2_replicates(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> list[float]:
    """MMD² of the whole sets with each group of ``x`` left out, from sums of the kernel over pairs of groups.

    Args:
        x: (m, d) features; may be a memory map.
        y: (n, d), held fixed, likewise.
        groups: (m,) group of each row of ``x``.

    Returns:
        One figure per group; none unless each leaves two rows.
    """
    num = groups.max() + 1
    if len(groups) - np.bincount(groups).max() < 2:
        return []
    parts = [np.flatnonzero(groups == g) for g in range(num)]
    within = np.array([[kernel_sum(x[a], x[b]) for b in parts] for a in parts])
    diagonal = np.array([_diagonal(_wide(x[part])) for part in parts])
    cross = np.array([kernel_sum(x[part], y) for part in parts])
    off_y = kernel_sum(y, y) - _diagonal_sum(y)
    out = []
    for g in range(num):
        keep = np.arange(num) != g
        off_x = float(within[np.ix_(keep, keep)].sum() - diagonal[keep].sum())
        out.append(_unbiased(off_x, len(x) - len(parts[g]), off_y, len(y), float(cross[keep].sum())))
    return out


def kernel_sum(x: np.ndarray, y: np.ndarray, kernel: Kernel = polynomial_kernel) -> float:
    """Sum of a kernel over all pairs, in blocks."""
    blocks = ((i, j) for i in range(0, len(x), CHUNK) for j in range(0, len(y), CHUNK))
    sums = (kernel(_wide(x[i : i + CHUNK]), _wide(y[j : j + CHUNK])).sum() for i, j in blocks)
    return float(sum(sums))


def _diagonal_sum(x: np.ndarray) -> float:
    return sum(_diagonal(_wide(x[i : i + CHUNK])) for i in range(0, len(x), CHUNK))


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def _unbiased(off_x: float, m: int, off_y: float, n: int, cross: float) -> float:
    return off_x / (m * (m - 1)) + off_y / (n * (n - 1)) - 2 * cross / (m * n)


def _off_diagonal(x: np.ndarray) -> float:
    return float(polynomial_kernel(x, x).sum()) - _diagonal(x)


def _diagonal(x: np.ndarray) -> float:
    return float((((x * x).sum(1) / x.shape[1] + 1) ** 3).sum())


class KernelDistance:
    """Kernel distance to real images, × 1000, with jackknife interval; KID on Inception features.

    Args:
        context: with a reference that suits the prompts.

    Raises:
        UsageError: prompts without scenes where the reference is of scenes, or fewer than 2.
    """

    gathers_per_image = ()  # but the features, which all set metrics share

    def __init__(self, context: Context) -> None:
        self.context, network = context, context.features.network
        context.features.reference.require("kid", MIN_IMAGES)
        context.require_images("kid", MIN_IMAGES)
        name = f"kd{network.suffix}" if network.suffix else "kid"
        metric = Metric(
            name=name, label=f"{network.label('KD')} ×{SCALE}", direction="lower", unit="", family=FAMILY, decimals=2
        )
        size = min(SUBSET_SIZE, len(context.prompts), len(context.features.reference))
        subsets = {"num": NUM_SUBSETS, "size": size, "seed": 0}
        self.quantities = (Quantity(metric, context.set_protocol(subsets=subsets)),)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.context.see(images, positions)

    def finish(self) -> list[Measurement]:
        num, y = len(self.context.prompts), self.context.features.reference_rows()
        x = self.context.rows.everything()
        value = SCALE * kid(x, y)
        replicates = [SCALE * v for v in mmd2_replicates(x, y, cluster_groups(self.context.clusters(num)))]
        interval = jackknife_interval(value, replicates)
        extra = {"jackknife": replicates}
        return [Measurement(self.quantities[0], value, interval, num, self.context.departures, extra=extra)]
