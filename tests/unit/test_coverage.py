"""Intervals and tests do what they promise: coverage and false positives, by simulation with fixed seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rgbench.metrics.fid import Gaussian, Moments
from rgbench.metrics.kid import kid_draws, mmd2_replicates, with_subsets
from rgbench.metrics.prdc import neighbours, scores
from rgbench.metrics.statistics import (
    bootstrap_interval,
    holm,
    jackknife_groups,
    jackknife_interval,
    jackknife_interval_of_sides,
    paired_t,
    resampled_means,
    t_interval,
    unpaired_bootstrap_interval,
    wilson_interval,
)
from rgbench.metrics.values import Interval
from rgbench.metrics.vendi import vendi_replicates, vendi_score

NUM = 300
DIM = 6


def covered(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([found.low <= truth <= found.high for found in intervals]))


def about(share: float, num: int = NUM):
    """Three standard errors of a simulated share."""
    return pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / num))


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_the_bootstrap_of_a_mean_covers_it(draw):
    rng = np.random.default_rng(0)
    rows = getattr(rng, draw)(size=(NUM, 256))
    truth = {"normal": 0.0, "exponential": 1.0}[draw]
    assert covered([bootstrap_interval(row, seed=i) for i, row in enumerate(rows)], truth) == about(0.95)


@pytest.mark.long
def test_the_paired_bootstrap_covers_the_difference_of_correlated_models():
    rng = np.random.default_rng(1)
    found = []
    for i in range(NUM):
        shared = rng.normal(size=200)
        a, b = shared + rng.normal(0.2, 0.3, 200), shared + rng.normal(0, 0.3, 200)
        drawn = [resampled_means(side, ("x", "y") * 100, seed=i) for side in (a, b)]
        low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
        found.append(Interval(low=low, high=high, level=0.95, method="paired bootstrap"))
    assert covered(found, 0.2) == about(0.95)


def left_out(x: np.ndarray) -> list[np.ndarray]:
    groups = jackknife_groups(len(x))
    return [x[groups != g] for g in range(groups.max() + 1)]


@pytest.mark.parametrize("num_real", [60, 600])
def test_the_jackknife_of_two_samples_covers_a_gap_in_decibels(num_real):
    """What spectral gaps are: a ratio of two mean powers, the samples of different sizes and spreads."""
    rng = np.random.default_rng(7)
    found, apart = [], []
    for _ in range(NUM):
        ours, real = rng.gamma(4, 1.5, 120), rng.gamma(2, 2.0, num_real)

        def gap(x: np.ndarray, y: np.ndarray) -> float:
            return 10 * math.log10(x.mean() / y.mean())

        sides = [[gap(x, real) for x in left_out(ours)], [gap(ours, y) for y in left_out(real)]]
        found.append(jackknife_interval_of_sides(gap(ours, real), sides))
        apart.append(jackknife_interval(gap(ours, real), sides[0]))
    truth = 10 * math.log10(6 / 4)
    assert covered(found, truth) == about(0.95)
    assert num_real > 120 or covered(apart, truth) < 0.8, "the real images' sampling error counts"


def test_the_bootstrap_of_two_samples_covers_the_difference_of_their_means():
    rng = np.random.default_rng(8)
    found = []
    for _ in range(NUM):
        common = rng.normal()  # as pairs would share it; here it is in one sample alone
        ours, real = 3 + common + rng.normal(0, 1, 100), rng.exponential(2, 50)
        found.append(unpaired_bootstrap_interval(ours - common, real))
    assert covered(found, 1.0) == about(0.95)
    assert "each side by itself" in found[0].method
    assert unpaired_bootstrap_interval(np.ones(1), np.ones(9)) is None


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_wilson_covers_a_share_near_one_too(share):
    wins = np.random.default_rng(2).binomial(100, share, 4 * NUM)
    assert 0.93 <= covered([wilson_interval(float(k), 100) for k in wins], share) <= 0.99


def set_values(kind: str, x: np.ndarray, y: np.ndarray) -> tuple[float, list[float]]:
    groups = jackknife_groups(len(x))
    if kind == "frechet":
        gaussian = Gaussian.of_rows(y)
        return gaussian.distance(Moments.of(x)), gaussian.replicates(x.__getitem__, groups)
    if kind == "kid":
        draws = kid_draws(x, y, subsets=25, size=50)
        return float(draws.mean()), with_subsets(mmd2_replicates(x, y, groups), draws)
    if kind == "vendi":
        return vendi_score(x), vendi_replicates(x, groups)
    found, numbers = neighbours(x, y, groups), np.arange(groups.max() + 1)
    parts = [scores(found, groups != g, numbers != g)[kind] for g in numbers]
    return scores(found, groups >= 0, numbers >= 0)[kind], parts


# An image that recall or coverage loses may be replaced by a neighbour in a new set, but not among those left.
CAUTIOUS = ("recall", "coverage")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["frechet", "kid", "vendi", "precision", "density", "recall", "coverage"])
def test_the_jackknife_covers_the_mean_over_repeated_sets(kind):
    """The mean of the value over sets of this size, the reference fixed; the bias at n is another matter."""
    rng = np.random.default_rng(3)
    y = rng.normal(size=(400, DIM))
    values, found = [], []
    for _ in range(NUM):
        value, replicates = set_values(kind, rng.normal(0.3, 1.2, size=(400, DIM)), y)
        values.append(value)
        found.append(jackknife_interval(value, replicates))
    share = covered(found, float(np.mean(values)))
    assert share >= 0.95 if kind in CAUTIOUS else share == about(0.95)


def test_holm_keeps_the_familywise_error_and_the_primary_contrast_its_size():
    """Six training seeds, twelve contrasts, no method different from another."""
    rng = np.random.default_rng(4)
    any_found, primary = 0, 0
    for _ in range(4 * NUM):
        p = [paired_t(rng.normal(size=6).tolist(), rng.normal(size=6).tolist()) for _ in range(12)]
        primary += p[0] < 0.05
        any_found += min(holm(p[1:])) < 0.05
    assert any_found / (4 * NUM) == about(0.05, 4 * NUM) and primary / (4 * NUM) == about(0.05, 4 * NUM)


def test_the_interval_over_training_seeds_covers():
    means = [t_interval(row.tolist()) for row in np.random.default_rng(5).normal(0.4, 1, size=(4 * NUM, 6))]
    assert np.mean([low <= 0.4 <= high for _, low, high in means]) == about(0.95, 4 * NUM)
