"""Intervals and tests of evaluation: against SciPy, textbook values and their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rgbench.metrics.statistics import (
    bootstrap_interval,
    count_wins,
    holm,
    jackknife_groups,
    jackknife_interval,
    jackknife_interval_of_sides,
    jackknife_means,
    paired_t,
    resampled_means,
    student_t_p,
    student_t_quantile,
    t_interval,
    wilson_interval,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 18, 19, 100])
@pytest.mark.parametrize("probability", [0.6, 0.95, 0.975, 0.9995])
def test_t_quantile_equals_scipy(degrees, probability):
    expected = scipy.stats.t.ppf(probability, degrees)
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9)


@given(st.floats(-30, 30), st.integers(1, 60))
def test_t_p_equals_scipy(statistic, degrees):
    assert student_t_p(statistic, degrees) == pytest.approx(2 * scipy.stats.t.sf(abs(statistic), degrees), abs=1e-13)


@pytest.mark.parametrize(("successes", "num"), [(0, 10), (10, 10), (7, 20), (1900, 2048)])
def test_wilson_equals_scipy(successes, num):
    ours = wilson_interval(successes, num)
    theirs = scipy.stats.binomtest(successes, num).proportion_ci(0.95, "wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_jackknife_of_a_mean_is_the_textbook_error():
    """With one sample per group the jackknife error of a mean is s / √n exactly."""
    x = np.random.default_rng(0).standard_normal(20)
    replicates = [np.delete(x, i).mean() for i in range(20)]
    found = jackknife_interval(x.mean(), replicates)
    half = scipy.stats.t.ppf(0.975, 19) * x.std(ddof=1) / np.sqrt(20)
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), rel=1e-9)
    assert jackknife_means(x, jackknife_groups(20)) == pytest.approx(
        [x[jackknife_groups(20) != g].mean() for g in range(20)]
    )
    assert jackknife_means(x[:1], jackknife_groups(1)) == [], "nothing would be left"
    assert jackknife_interval(1.0, [1.0]) is None


def test_variances_add_and_degrees_of_freedom_are_welchs():
    rng = np.random.default_rng(9)
    one, other = rng.normal(size=20), rng.normal(0, 3, size=10)
    found = jackknife_interval_of_sides(5.0, [one.tolist(), other.tolist()])
    v = [19 * one.var(), 9 * other.var()]
    degrees = int(sum(v) ** 2 / (v[0] ** 2 / 19 + v[1] ** 2 / 9))
    assert 9 <= degrees < 28
    assert found.high - 5 == pytest.approx(student_t_quantile(0.975, degrees) * math.sqrt(sum(v)))
    alone = jackknife_interval(5.0, one.tolist())
    assert alone == jackknife_interval_of_sides(5.0, [one.tolist()]) and alone.method.endswith("20 groups")
    still = jackknife_interval_of_sides(5.0, [one.tolist(), [5.0] * 20])
    assert (still.low, still.high) == pytest.approx((alone.low, alone.high)), "a side without spread adds none"
    assert jackknife_interval_of_sides(5.0, [[5.0] * 20, [5.0] * 20]).low == 5.0
    assert jackknife_interval_of_sides(5.0, [one.tolist(), [1.0]]) is None


def test_jackknife_groups_are_balanced_fixed_and_random():
    groups = jackknife_groups(2048)
    sizes = np.bincount(groups)
    assert len(sizes) == 20 and sizes.max() - sizes.min() <= 1
    assert (groups == jackknife_groups(2048)).all()
    assert (np.bincount(groups[3::4], minlength=20) > 10).all(), "every fourth prompt is held out: spread over groups"
    assert sorted(jackknife_groups(3)) == [0, 1, 2]


def test_bootstrap_interval_of_a_mean():
    rows = np.random.default_rng(0).standard_normal(500)
    found = bootstrap_interval(rows)
    half = 1.96 * rows.std() / np.sqrt(500)
    assert found.low == pytest.approx(rows.mean() - half, abs=0.015)
    assert found.high == pytest.approx(rows.mean() + half, abs=0.015)
    assert bootstrap_interval(rows) == found
    assert bootstrap_interval(rows[:1]) is None


def test_models_resampled_together_lose_the_spread_that_both_share():
    rng = np.random.default_rng(0)
    shared = 10 * rng.standard_normal(400)
    a, b = shared + 0.2 + 0.3 * rng.standard_normal(400), shared + 0.3 * rng.standard_normal(400)
    drawn = resampled_means(a) - resampled_means(b)
    assert drawn.shape == (2000,) and drawn.mean() == pytest.approx((a - b).mean(), abs=3e-3)
    assert drawn.std() == pytest.approx((a - b).std() / 20, rel=0.06)
    np.testing.assert_allclose(drawn, resampled_means(a - b), atol=1e-12)
    assert not np.allclose(resampled_means(a), resampled_means(a, seed=1))


def test_strata_are_resampled_by_themselves():
    """A value that is constant within each stratum has no sampling spread at all."""
    a, styles = np.array([1.0] * 10 + [5.0] * 30), ["anime"] * 10 + ["photo"] * 30
    np.testing.assert_allclose(resampled_means(a, styles), 4.0, rtol=1e-12)
    assert resampled_means(a).std() == pytest.approx(a.std() / np.sqrt(40), rel=0.1)
    b = a + np.random.default_rng(1).normal(0, [1.0] * 10 + [3.0] * 30)
    variance = b[:10].var(ddof=1) / 4 + b[10:].var(ddof=1) * 3 / 4  # of the mean within strata (Cochran, 1977, 5.3)
    assert resampled_means(b, styles).std() == pytest.approx(np.sqrt(variance / 40), rel=0.08)
    with pytest.raises(ValueError, match="40 rows but 2 strata"):
        resampled_means(a, ["x", "y"])


def test_ties_are_half_a_win():
    found = count_wins([1, 2, 3, 4], [1, 2, 3, 9])
    assert found.rate == 1.5 / 4 and found.interval == wilson_interval(1.5, 4)


def test_paired_t_and_interval_equal_scipy():
    a, b = np.random.default_rng(1).standard_normal((2, 7))
    assert paired_t(a, b) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, rel=1e-9)
    mean, low, high = t_interval(a)
    theirs = scipy.stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((a.mean(), theirs.low, theirs.high), rel=1e-9)
    assert paired_t([1, 2], [1, 2]) == 1.0 and paired_t([2, 3], [1, 2]) == 0.0


def test_holm_by_hand_and_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_raw_and_bonferroni(p_values):
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, len(p_values) * max(p_values))


@pytest.mark.parametrize("call", [lambda: count_wins([1], [1]), lambda: paired_t([1, 2], [1]), lambda: t_interval([1])])
def test_too_little_data_is_an_error(call):
    with pytest.raises(ValueError, match="at least two"):
        call()
