"""Intervals and tests do what they promise: coverage and false positives, by simulation with fixed seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rgbench.judge.verdict import judge
from rgbench.metrics.base import Interval
from rgbench.metrics.fid import Gaussian, Moments
from rgbench.metrics.kid import kid_draws, mmd2_replicates, with_subsets
from rgbench.metrics.prdc import neighbours, scores
from rgbench.metrics.statistics import (
    bootstrap_interval,
    holm,
    jackknife_groups,
    jackknife_interval,
    minimum_detectable_effect,
    paired_t,
    resampled_means,
    t_interval,
    wilson_interval,
)
from rgbench.metrics.vendi import vendi_replicates, vendi_score
from tests.results_maker import make

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


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_wilson_covers_a_share_near_one_too(share):
    wins = np.random.default_rng(2).binomial(100, share, 4 * NUM)
    assert 0.93 <= covered([wilson_interval(float(k), 100) for k in wins], share) <= 0.99


def set_figures(kind: str, x: np.ndarray, y: np.ndarray) -> tuple[float, list[float]]:
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
    """What the figure is on average over sets of this size, the reference fixed: bias at n is not its business."""
    rng = np.random.default_rng(3)
    y = rng.normal(size=(400, DIM))
    values, found = [], []
    for _ in range(NUM):
        value, replicates = set_figures(kind, rng.normal(0.3, 1.2, size=(400, DIM)), y)
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


def test_the_interval_over_training_seeds_covers_and_the_detectable_effect_is_found_four_times_in_five():
    rng = np.random.default_rng(5)
    means = [t_interval(row.tolist()) for row in rng.normal(0.4, 1, size=(4 * NUM, 6))]
    assert np.mean([low <= 0.4 <= high for _, low, high in means]) == about(0.95, 4 * NUM)
    effect = minimum_detectable_effect(1.0, 300)
    draws = rng.normal(effect, 1, size=(4 * NUM, 300))
    found = np.abs(draws.mean(1)) > 1.96 * draws.std(1, ddof=1) / math.sqrt(300)
    assert found.mean() == about(0.8, 4 * NUM)


def test_the_verdict_seldom_errs_on_training_seeds_that_differ_by_luck():
    """Seven exchangeable students, δ from the five that are not compared; six figures of five families."""
    rng = np.random.default_rng(6)
    names = ("hps_aa0", "oracle_mean", "hfer_gap_db", "grid_vae_gap_db", "wavelet_noise_gap", "fd_efflite0")
    two_worse, called, trials = 0, 0, 400
    for _ in range(trials):
        figures = []
        for model in ("rg_lcd-s0", *(f"lcd-s{seed}" for seed in range(6))):
            made = [make(model, name, 5 + rng.normal(), half=0.1) for name in names]
            figures.append({(result.metric.name, result.protocol.id): result for result in made})
        found = judge(figures[0], figures[1], figures[2:])
        assert len(found.families) == 4 and len(found.rewards) == 1
        two_worse += len(found.worse) >= 2
        called += found.over_optimised
    assert two_worse / trials <= 0.05 and called / trials <= 0.01
