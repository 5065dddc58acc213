"""Kernel distance: unbiased MMD² with the cubic polynomial kernel (Bińkowski et al., 2018, arXiv 1801.01401, eq. 4).

    k(x, y) = (x·y / d + 1)³
    MMD² = Σ_{i≠j} k(x_i, x_j) / m(m − 1) + Σ_{i≠j} k(y_i, y_j) / n(n − 1) − 2 Σ_{ij} k(x_i, y_j) / mn

It has no bias at small n, unlike the Fréchet distance. On Inception features it is called KID, on EfficientNet-Lite0's
KD-EffLite0; both are shown × 1000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rgbench.core.progress import Track, untracked
from rgbench.metrics.base import SetMetric
from rgbench.metrics.context import Context
from rgbench.metrics.statistics import cluster_groups, jackknife_groups, jackknife_interval
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol

NUM_SUBSETS = 50
SUBSET_SIZE = 500
SCALE = 1000
MIN_IMAGES = 2
CHUNK = 4096
DISTANCE = Direction.LOWER, Family.SET_DISTANCE

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(m, n) kernel values of (m, d) and (n, d) float64 features."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD² between (m, d) and (n, d) float64 features, m and n ≥ 2; may be below zero."""
    return _unbiased(off_diagonal_sum(x), len(x), off_diagonal_sum(y), len(y), kernel_sum(x, y))


def kid_draws(
    x: np.ndarray,
    y: np.ndarray,
    subsets: int = NUM_SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
    track: Track = untracked,
) -> np.ndarray:
    """MMD² of each of some random subsets of both sides, drawn without replacement as torch-fidelity draws them.

    Args:
        x: (m, d) features, m ≥ 2; may be a memory map.
        y: (n, d), n ≥ 2, likewise.
        subsets: how many.
        size: samples of each, at most; smaller sets are used whole.
        seed: of the drawing.
        track: shows progress.

    Returns:
        (subsets,) values, whose mean is :func:`kid`; a single one where every subset would be the whole set.
    """
    size = min(size, len(x), len(y))
    if size == len(x) == len(y):
        return np.array([mmd2(_float64(x), _float64(y))])
    rng = np.random.RandomState(seed)
    draws = []
    for _ in track(range(subsets), "kernel distance", "subsets"):
        first = _float64(x[rng.choice(len(x), size, replace=False)])
        draws.append(mmd2(first, _float64(y[rng.choice(len(y), size, replace=False)])))
    return np.array(draws)


def kid(x: np.ndarray, y: np.ndarray, subsets: int = NUM_SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> float:
    """Mean MMD² over random subsets; the arguments are those of :func:`kid_draws`."""
    return float(kid_draws(x, y, subsets, size, seed).mean())


def mmd2_replicates(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray, off_y: float | None = None, track: Track = untracked
) -> list[float]:
    """MMD² of the whole sets with each group of ``x`` left out, from sums of the kernel over pairs of groups.

    Args:
        x: (m, d) features; may be a memory map.
        y: (n, d), held fixed, likewise.
        groups: (m,) group of each row of ``x``.
        off_y: :func:`off_diagonal_sum` of ``y``, where it is known already.
        track: shows progress.

    Returns:
        One value per group; none unless each leaves two rows.
    """
    num = groups.max() + 1
    if len(groups) - np.bincount(groups).max() < 2:
        return []
    parts = [np.flatnonzero(groups == g) for g in range(num)]
    within = pair_sums(x, parts, polynomial_kernel, track)
    diagonal = np.array([_diagonal(_float64(x[part])) for part in parts])
    cross = np.array([kernel_sum(x[part], y) for part in track(parts, "kernel: generated and real")])
    off_y = off_diagonal_sum(y, track) if off_y is None else off_y
    out = []
    for g in range(num):
        keep = np.arange(num) != g
        off_x = float(within[np.ix_(keep, keep)].sum() - diagonal[keep].sum())
        out.append(_unbiased(off_x, len(x) - len(parts[g]), off_y, len(y), float(cross[keep].sum())))
    return out


def with_subsets(replicates: Sequence[float], draws: np.ndarray) -> list[float]:
    """Jackknife replicates that vary with the choice of the subsets too.

    The mean over 50 subsets of 500 estimates the whole sets' MMD²; at 30,000 images its sampling error is larger than
    that of the images. So a second jackknife, over groups of subsets, is added to the first: their variances add up,
    and replicates of two models, which draw the same subsets, can still be subtracted.

    Args:
        replicates: from :func:`mmd2_replicates`.
        draws: from :func:`kid_draws`.
    """
    num = len(replicates)
    if not 2 <= num <= len(draws):
        return list(replicates)
    groups = jackknife_groups(len(draws), num)
    return [found + float(draws[groups != g].mean() - draws.mean()) for g, found in enumerate(replicates)]


def kernel_sum(x: np.ndarray, y: np.ndarray, kernel: Kernel = polynomial_kernel) -> float:
    """Sum of a kernel over all pairs, in blocks."""
    blocks = ((i, j) for i in range(0, len(x), CHUNK) for j in range(0, len(y), CHUNK))
    sums = (kernel(_float64(x[i : i + CHUNK]), _float64(y[j : j + CHUNK])).sum() for i, j in blocks)
    return float(sum(sums))


def self_sum(x: np.ndarray, kernel: Kernel = polynomial_kernel, track: Track = untracked) -> float:
    """Sum of a symmetric kernel over all pairs of one set, from the blocks on and above the diagonal."""
    starts = range(0, len(x), CHUNK)
    blocks = [(i, j) for i in starts for j in starts if i <= j]
    total = 0.0
    for i, j in track(blocks, "kernel: reference", "blocks"):
        found = float(kernel(_float64(x[i : i + CHUNK]), _float64(x[j : j + CHUNK])).sum())
        total += found if i == j else 2 * found
    return total


def off_diagonal_sum(x: np.ndarray, track: Track = untracked) -> float:
    """Σ_{i≠j} k(x_i, x_j) of (n, d) features; may be a memory map."""
    diagonal = sum(_diagonal(_float64(x[i : i + CHUNK])) for i in range(0, len(x), CHUNK))
    return self_sum(x, track=track) - diagonal


def pair_sums(x: np.ndarray, parts: Sequence[np.ndarray], kernel: Kernel, track: Track = untracked) -> np.ndarray:
    """(G, G) sums of a symmetric kernel over the pairs of each two groups of rows."""
    within = np.zeros((len(parts), len(parts)))
    pairs = [(a, b) for a in range(len(parts)) for b in range(a + 1)]
    for a, b in track(pairs, "kernel: generated", "pairs of groups"):
        within[a, b] = within[b, a] = kernel_sum(x[parts[a]], x[parts[b]], kernel)
    return within


def _float64(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def _unbiased(off_x: float, m: int, off_y: float, n: int, cross: float) -> float:
    return off_x / (m * (m - 1)) + off_y / (n * (n - 1)) - 2 * cross / (m * n)


def _diagonal(x: np.ndarray) -> float:
    return float((((x * x).sum(1) / x.shape[1] + 1) ** 3).sum())


class KernelDistance(SetMetric):
    """Kernel distance to real images, × 1000, with jackknife interval over images and subsets.

    Args:
        context: with a reference that suits the prompts.

    Raises:
        UsageError: prompts without scenes where the reference is of scenes, or fewer than 2.
    """

    name = "kid"
    infos = (
        MetricInfo.of("kid", "KID ×1000", "kernel distance on Inception features; no bias at few images", *DISTANCE),
        MetricInfo.of(
            "kd_efflite0",
            "KD-EffLite0 ×1000",
            "kernel distance on EfficientNet-Lite0 features; no bias at few images",
            *DISTANCE,
        ),
    )
    min_images = MIN_IMAGES

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        suffix = context.features.network.suffix
        name = f"kd{suffix}" if suffix else "kid"
        size = min(SUBSET_SIZE, len(context.prompts), len(context.features.reference))
        subsets = {"num": NUM_SUBSETS, "size": size, "seed": 0}
        self.planned = ((name, Protocol.of(name, context.set_protocol(subsets=subsets))),)

    def compute(self) -> list[MetricValue]:
        num, y, track = len(self.context.prompts), self.context.features.reference_rows(), self.context.track
        x, groups = self.context.rows.everything(), cluster_groups(self.context.clusters(num))
        draws = SCALE * kid_draws(x, y, track=track)
        off_y = self.context.features.remember("kd reference", lambda: off_diagonal_sum(y, track))
        replicates = with_subsets([SCALE * v for v in mmd2_replicates(x, y, groups, off_y, track)], draws)
        value = float(draws.mean())
        interval = jackknife_interval(value, replicates)
        extra = {"jackknife": replicates}
        return [MetricValue(*self.planned[0], value, interval, num, flags=self.context.departures, extra=extra)]
