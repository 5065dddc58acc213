"""Kernel distance: against its definition, its null mean and the jackknife."""

from __future__ import annotations

import numpy as np
import pytest

from rgbench.metrics.kid import kid, kid_draws, mmd2, mmd2_replicates, with_subsets
from rgbench.metrics.statistics import jackknife_groups, jackknife_interval


def normal(num: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim))


def test_definition_by_loops():
    x, y = normal(7, 5, 0), 1 + normal(9, 5, 1)

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(9) for j in range(9) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert mmd2(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-10)


def test_unbiased_under_the_null():
    values = [mmd2(normal(40, 8, 2 * i), normal(40, 8, 2 * i + 1)) for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_subsets_are_seeded_and_small_sets_are_used_whole():
    x, y = normal(60, 6, 0), normal(50, 6, 1) + 0.3
    assert kid(x, y, subsets=3, size=20) == kid(x, y, subsets=3, size=20)
    assert kid(x, y, subsets=3, size=20) != kid(x, y, subsets=3, size=20, seed=1)
    assert kid(x[:50], y, subsets=2, size=500) == mmd2(x[:50], y), "every subset would be the whole"


def test_replicates_leave_out_each_group():
    x, y = normal(45, 6, 0), normal(30, 6, 1) + 0.5
    groups = jackknife_groups(45)
    expected = [mmd2(x[groups != g], y) for g in range(20)]
    np.testing.assert_allclose(mmd2_replicates(x, y, groups), expected, rtol=1e-9)
    assert mmd2_replicates(x[:2], y, np.array([0, 1])) == []


def test_the_interval_knows_of_the_luck_of_the_subsets():
    """Of many images the mean over few subsets is chiefly that: the images alone would be far too sure."""
    y, whole, knowing, naive = normal(200, 3, 10_000), [], [], []
    for i in range(120):
        x = 1.2 * normal(200, 3, i)
        draws = kid_draws(x, y, subsets=20, size=20, seed=i)
        alone = mmd2_replicates(x, y, jackknife_groups(200))
        whole.append(mmd2(x, y))
        for found, replicates in ((knowing, with_subsets(alone, draws)), (naive, alone)):
            found.append(jackknife_interval(float(draws.mean()), replicates))
    truth = np.mean(whole)  # it has no bias
    shares = [np.mean([each.low <= truth <= each.high for each in found]) for found in (knowing, naive)]
    assert shares[0] == pytest.approx(0.95, abs=0.06) and shares[1] < 0.85, shares


def test_subsets_that_are_the_whole_bring_no_luck():
    assert with_subsets([1.0, 2.0, 4.0], np.array([3.0])) == [1.0, 2.0, 4.0]
    assert with_subsets([], np.arange(50.0)) == []
    found = with_subsets([1.0, 1.0], np.array([3.0, 5.0]))
    assert sorted(found) == [0.0, 2.0], "each leaves one of two draws out"
