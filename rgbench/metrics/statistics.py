"""Intervals of single values, and comparisons in pairs.

Images, or prompts with all their seeds, are resampled for the interval of one model's value: by delete-a-group
jackknife or bootstrap. Between two models the prompt is the unit, between methods the training seed. Differences are
paired, by prompt and noise seed or by training seed, so that the spread that both sides share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from rgbench.metrics.values import Interval

LEVEL = 0.95  # confidence
NUM_GROUPS = 20
NUM_RESAMPLES = 2000
CHUNK_ELEMENTS = 2**20
POWER = 0.8
ALPHA = 0.05


def jackknife_groups(num: int, groups: int = NUM_GROUPS) -> np.ndarray:
    """(num,) int64 jackknife group of each position: random but fixed, of sizes that differ by one at most."""
    order = np.random.default_rng(0).permutation(num)
    return order * min(groups, num) // num


def cluster_groups(clusters: np.ndarray) -> np.ndarray:
    """(n,) jackknife group of each of n images; those of one cluster (a prompt) share a group."""
    return jackknife_groups(int(clusters.max()) + 1)[clusters]


def jackknife_means(rows: np.ndarray, groups: np.ndarray) -> list[float]:
    """Mean of (n,) rows with each group left out; none where nothing would be left."""
    return [float(rows[groups != g].mean()) for g in np.unique(groups) if (groups != g).any()]


def jackknife_interval(value: float, replicates: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Delete-a-group jackknife interval around a value (Kott, 2001).

    Args:
        value: from all samples.
        replicates: the value with each of G groups left out.
        level: confidence.

    Returns:
        value ± t(G − 1) · √((G − 1)/G · Σ(θ_g − θ̄)²); None for fewer than two groups.
    """
    return jackknife_interval_of_sides(value, [replicates], level)


def jackknife_interval_of_sides(
    value: float, sides: Sequence[Sequence[float]], level: float = LEVEL
) -> Interval | None:
    """The same around a value of several independent samples, each left out by itself: variances add.

    Args:
        value: from all samples.
        sides: for each sample, the value with each of its groups left out and the other samples whole.
        level: confidence.

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
        level: confidence.

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
        rows: (n,) one value per image.
        level: confidence.
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
        rows: (n,) values of one sample.
        others: (m,) of the one that is subtracted, independent of the first.
        level: confidence.

    Returns:
        None for fewer than two values on a side.
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


@dataclass(frozen=True)
class Wins:
    """How often one model is better than another on common prompts.

    Attributes:
        rate: share of the pairs on which it is; ties count half.
        interval: of the rate.
    """

    rate: float
    interval: Interval


def count_wins(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Wins:
    """Compare scores, of which more is better, pair by pair.

    Args:
        a: scores of one model, one per prompt.
        b: of the other, in the same order.

    Raises:
        ValueError: unequal lengths, or fewer than two pairs.
    """
    difference = _differences(a, b)
    won = float((difference > 0).sum() + (difference == 0).sum() / 2)
    return Wins(won / len(difference), wilson_interval(won, len(difference)))


def resampled_means(rows: np.ndarray, strata: Sequence[str] | None = None, seed: int = 0) -> np.ndarray:
    """(2000,) means of resamples of (n,) rows, with the same positions for the same strata and seed.

    Two models' resampled means over the same prompts, subtracted, are thus a paired bootstrap.

    Args:
        rows: one value per prompt.
        strata: group of each (a style); each group is resampled by itself and keeps its share.
        seed: of the drawing.

    Raises:
        ValueError: another number of strata.
    """
    num = len(rows)
    groups = ("",) * num if strata is None else tuple(strata)
    if len(groups) != num:
        raise ValueError(f"{num} rows but {len(groups)} strata")
    counts = _counts(groups, seed)
    chunk = max(1, CHUNK_ELEMENTS // num)
    sums = [counts[at : at + chunk].astype(np.float64) @ rows for at in range(0, len(counts), chunk)]
    return np.concatenate(sums) / num


@lru_cache(maxsize=2)
def _counts(groups: tuple[str, ...], seed: int) -> np.ndarray:
    """(2000, n) uint8: how often each resample has each position; the same for all values of a protocol.

    A count above 255 would need a position drawn 256 times where once is expected.
    """
    names = np.asarray(groups)
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    rng = np.random.default_rng(seed)
    counts = np.empty((NUM_RESAMPLES, len(groups)), dtype=np.uint8)
    for resample in counts:
        for rows in members:
            resample[rows] = np.bincount(rng.integers(0, len(rows), len(rows)), minlength=len(rows))
    return counts


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Mean of at least two values and its t interval: ``(mean, low, high)``.

    Raises:
        ValueError: fewer than two.
    """
    num = len(values)
    if num < 2:
        raise ValueError(f"an interval needs at least two values, not {num}")
    mean = math.fsum(values) / num
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (num - 1))
    half = student_t_quantile(0.5 + level / 2, num - 1) * deviation / math.sqrt(num)
    return mean, mean - half, mean + half


def paired_t(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the paired t test (Student, 1908).

    Args:
        a: value of one method per training seed.
        b: of the other, for the same seeds.

    Raises:
        ValueError: unequal lengths, or fewer than two pairs.
    """
    difference = _differences(a, b)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    mean = float(difference.mean())
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return student_t_p(mean / error, len(difference) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for multiple comparisons (Holm, 1979), in the order given."""
    num = len(p_values)
    adjusted = [0.0] * num
    highest = 0.0
    for rank, i in enumerate(sorted(range(num), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (num - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def detection_auc(faulty: Sequence[float] | np.ndarray, sound: Sequence[float] | np.ndarray) -> float:
    """Probability that a faulty sample scores above a sound one; ties count half (Mann and Whitney, 1947).

    Args:
        faulty: scores that should be high.
        sound: scores that should be low.

    Raises:
        ValueError: no score on one side.
    """
    if not len(faulty) or not len(sound):
        raise ValueError(f"no detection among {len(faulty)} faulty and {len(sound)} sound samples")
    difference = np.subtract.outer(np.asarray(faulty, dtype=np.float64), np.asarray(sound, dtype=np.float64))
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def kl_best_of(n: int) -> float:
    """The most, in nats, that choosing the best of n moves a distribution."""
    return math.log(n) - (n - 1) / n


def _differences(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> np.ndarray:
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"paired comparison of {len(a)} and {len(b)} values; give at least two pairs")
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
