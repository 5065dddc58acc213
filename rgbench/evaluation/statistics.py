"""Comparisons: between two models the image is the unit, between methods the training seed.

Differences are paired, by prompt and noise seed or by training seed: the spread that both
sides share then cancels, and an unpaired comparison would have to fight it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rgbench.metrics.contract import Interval
from rgbench.metrics.intervals import LEVEL, NUM_RESAMPLES, student_t_p, student_t_quantile, wilson_interval

POWER = 0.8
ALPHA = 0.05


@dataclass(frozen=True)
class PairedDifference:
    """Model a against model b on common images.

    Attributes:
        mean: of a − b.
        interval: of the mean.
        win_rate: share of the images on which a scores higher; ties count half.
        win_interval: of the win rate.
        detectable: the smallest true difference found with probability .8 at this n.
    """

    mean: float
    interval: Interval
    win_rate: float
    win_interval: Interval
    detectable: float


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    strata: Sequence[str] | None = None,
    seed: int = 0,
) -> PairedDifference:
    """Compare per-image scores of two models.

    Args:
        a: scores of one model, one per (prompt, seed).
        b: of the other, in the same order.
        strata: group of each image (a style); each is resampled by itself.
        seed: of the resampling.

    Raises:
        ValueError: unequal lengths, or fewer than two pairs.
    """
    difference = _differences(a, b)
    num = len(difference)
    means = np.array([difference[at].mean() for at in resamples(num, strata, seed)])
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    wins = float((difference > 0).sum() + (difference == 0).sum() / 2)
    return PairedDifference(
        mean=float(difference.mean()),
        interval=Interval(low=float(low), high=float(high), level=LEVEL, method=f"paired bootstrap, {NUM_RESAMPLES}"),
        win_rate=wins / num,
        win_interval=wilson_interval(wins, num),
        detectable=minimum_detectable_effect(float(difference.std(ddof=1)), num),
    )


def resamples(num: int, strata: Sequence[str] | None = None, seed: int = 0) -> Iterator[np.ndarray]:
    """2,000 resamples with replacement of ``num`` positions, the same for the same arguments.

    Args:
        num: positions.
        strata: group of each; each group is resampled by itself, so that its share stays.
        seed: of the drawing.

    Yields:
        (num,) positions.

    Raises:
        ValueError: another number of strata.
    """
    groups = np.zeros(num) if strata is None else np.asarray(strata)
    if len(groups) != num:
        raise ValueError(f"{num} pairs but {len(groups)} strata")
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    rng = np.random.default_rng(seed)
    for _ in range(NUM_RESAMPLES):
        yield np.concatenate([rows[rng.integers(0, len(rows), len(rows))] for rows in members])


def minimum_detectable_effect(deviation: float, num: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest true mean difference that a two-sided test finds with the given probability.

    (z_{1−α/2} + z_power) · deviation / √num; Cohen (1988), normal approximation.

    Args:
        deviation: standard deviation of the paired differences.
        num: pairs.
        alpha: size of the test.
        power: probability of finding it.
    """
    z = NormalDist()
    return (z.inv_cdf(1 - alpha / 2) + z.inv_cdf(power)) * deviation / math.sqrt(num)


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Mean of at least two figures and its t interval: ``(mean, low, high)``.

    Raises:
        ValueError: fewer than two.
    """
    num = len(values)
    if num < 2:
        raise ValueError(f"an interval needs at least two figures, not {num}")
    mean = math.fsum(values) / num
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (num - 1))
    half = student_t_quantile(0.5 + level / 2, num - 1) * deviation / math.sqrt(num)
    return mean, mean - half, mean + half


def paired_t(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the paired t test (Student, 1908).

    Args:
        a: figure of one method per training seed.
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
    """P values adjusted for having looked at all of them (Holm, 1979), in the order given."""
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


def _differences(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> np.ndarray:
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"paired comparison of {len(a)} and {len(b)} figures; give at least two pairs")
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
