"""Intervals of single figures: delete-a-group jackknife, Wilson, bootstrap of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from rgbench.metrics.contract import Interval

LEVEL = 0.95
NUM_GROUPS = 20
NUM_RESAMPLES = 2000
CHUNK_ELEMENTS = 2**20


def jackknife_groups(num: int, groups: int = NUM_GROUPS) -> np.ndarray:
    """(num,) int64: the jackknife group of each position, random and fixed, sizes within one."""
    order = np.random.default_rng(0).permutation(num)
    return order * min(groups, num) // num


def cluster_groups(clusters: np.ndarray) -> np.ndarray:
    """(n,) jackknife group of each of n images, those of one cluster (a prompt) in one group."""
    return jackknife_groups(int(clusters.max()) + 1)[clusters]


def jackknife_interval(value: float, replicates: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Delete-a-group jackknife interval around a figure (Kott, 2001).

    Args:
        value: the figure from all samples.
        replicates: the figure with each of G groups left out.
        level: coverage.

    Returns:
        value ± t(G − 1) · √((G − 1)/G · Σ(θ_g − θ̄)²); None for fewer than two groups.
    """
    return jackknife_interval_of_sides(value, [replicates], level)


def jackknife_interval_of_sides(
    value: float, sides: Sequence[Sequence[float]], level: float = LEVEL
) -> Interval | None:
    """The same around a figure of several independent samples, each left out by itself: variances add.

    Args:
        value: the figure from all samples.
        sides: of each sample, the figure with each of its groups left out and the other samples whole.
        level: coverage.

    Returns:
        value ± t(ν) · √Σv, v the variance of each side, ν = (Σv)² / Σ(v²/(G − 1)) rounded down (Welch, 1947;
        Satterthwaite, 1946); None for fewer than two groups on a side.
    """
    nums = [len(side) for side in sides]
    if min(nums) < 2:
        return None
    deviations = [np.asarray(side, dtype=np.float64) - np.mean(side, dtype=np.float64) for side in sides]
    variances = [(num - 1) / num * float(x @ x) for num, x in zip(nums, deviations, strict=True)]
    total, degrees = math.fsum(variances), min(nums) - 1
    squares = math.fsum(v * v / (num - 1) for v, num in zip(variances, nums, strict=True))
    if len(sides) > 1 and squares > 0:
        degrees = max(degrees, int(total * total / squares))
    half = student_t_quantile(0.5 + level / 2, degrees) * math.sqrt(total)
    apart = "" if len(nums) == 1 else ", each side by itself"
    method = f"delete-a-group jackknife, {' + '.join(map(str, nums))} groups{apart}"
    return Interval(low=value - half, high=value + half, level=level, method=method)


def wilson_interval(successes: float, num: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of a proportion (Wilson, 1927).

    Args:
        successes: in [0, num].
        num: trials, at least 1.
        level: coverage.

    Returns:
        Bounds as shares in [0, 1].
    """
    if num < 1 or not 0 <= successes <= num:
        raise ValueError(f"no proportion: {successes} of {num}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, spread = successes / num, z * z / num
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / num + spread / (4 * num))
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half), level=level, method="Wilson")


def bootstrap_interval(rows: np.ndarray, level: float = LEVEL, seed: int = 0) -> Interval | None:
    """Percentile bootstrap interval of the mean.

    Args:
        rows: (n,) one figure per image.
        level: coverage.
        seed: of the resampling.

    Returns:
        None for fewer than two rows.
    """
    if len(rows) < 2:
        return None
    low, high = np.quantile(bootstrap_means(rows, seed), [0.5 - level / 2, 0.5 + level / 2])
    return Interval(low=float(low), high=float(high), level=level, method=f"bootstrap over images, {NUM_RESAMPLES}")


def unpaired_bootstrap_interval(rows: np.ndarray, others: np.ndarray, level: float = LEVEL) -> Interval | None:
    """Percentile bootstrap interval of the difference of two means, each sample resampled by itself.

    Args:
        rows: (n,) figures of one sample.
        others: (m,) of the one that is subtracted, independent of the first.
        level: coverage.

    Returns:
        None for fewer than two figures on a side.
    """
    if min(len(rows), len(others)) < 2:
        return None
    drawn = bootstrap_means(rows, 0) - bootstrap_means(others, 1)
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    method = f"bootstrap over images, each side by itself, {NUM_RESAMPLES}"
    return Interval(low=float(low), high=float(high), level=level, method=method)


def bootstrap_means(rows: np.ndarray, seed: int) -> np.ndarray:
    """(2000,) means of resamples with replacement, drawn in chunks to keep memory small."""
    rng = np.random.default_rng(seed)
    num = len(rows)
    chunk = max(1, CHUNK_ELEMENTS // num)
    sizes = [min(chunk, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, chunk)]
    return np.concatenate([rows[rng.integers(0, num, (size, num))].mean(1) for size in sizes])


@lru_cache(maxsize=1024)
def student_t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by bisection on the closed form of its distribution (A&S 26.7.3-4).

    Args:
        probability: in (½, 1).
        degrees: degrees of freedom, at least 1.
    """
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(f"no t quantile at {probability} with {degrees} degrees of freedom")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def student_t_p(statistic: float, degrees: int) -> float:
    """Two-sided p of a t statistic, to about 1e-15."""
    return max(0.0, 1 - _t_central(math.atan(abs(statistic) / math.sqrt(degrees)), degrees))


def _t_central(angle: float, degrees: int) -> float:
    """P(|T| < √degrees · tan(angle)): A&S 26.7.3 for odd degrees, 26.7.4 for even ones."""
    cosine, total, term = math.cos(angle), 0.0, 1.0
    odd = degrees % 2
    for k in range(odd, degrees - 1, 2):
        term = (cosine if odd else 1.0) if k == odd else term * cosine * cosine * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
