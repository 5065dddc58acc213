"""Fréchet distance: closed forms, the golden pair, the null law, merging and the jackknife."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgbench.metrics.fid import Gaussian, Moments, frechet_distance, split_half_null
from rgbench.metrics.statistics import jackknife_groups, jackknife_interval


def exact_moments(mean: np.ndarray, covariance: np.ndarray, num: int = 10_000) -> Moments:
    """Moments whose mean and covariance are exactly these."""
    return Moments(num, num * mean, (num - 1) * covariance + num * np.outer(mean, mean))


def normal(num: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim))


def test_isotropic_closed_form_is_80():
    d = 64
    a = exact_moments(np.zeros(d), np.eye(d))
    b = exact_moments(np.full(d, 0.5), 4 * np.eye(d))
    assert frechet_distance(a, b) == pytest.approx(80.0, rel=1e-12)


def test_commuting_covariances_closed_form():
    rng = np.random.default_rng(0)
    s, t = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 3, 12)
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    a = exact_moments(np.zeros(12), rotation * s**2 @ rotation.T)
    b = exact_moments(np.zeros(12), rotation * t**2 @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(((s - t) ** 2).sum(), rel=1e-10)


def test_golden_pair():
    x = torch.randn(1000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = 1.1 * torch.randn(1000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    value = frechet_distance(Moments.of(x.numpy()), Moments.of(y.numpy()))
    assert value == pytest.approx(1.2093111503219944, rel=1e-12)


@pytest.mark.parametrize("dim", [16, 64])
def test_null_law_of_isotropic_features(dim):
    n = 200 * dim
    draws = 400 if dim == 16 else 40
    values = [
        frechet_distance(Moments.of(normal(n, dim, 2 * i)), Moments.of(normal(n, dim, 2 * i + 1))) for i in range(draws)
    ]
    assert np.mean(values) == pytest.approx((dim * (dim + 1) / 4 + dim) * 2 / n, rel=0.02)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 20), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_symmetric_non_negative_and_zero_on_itself(n, m, dim, seed):
    a, b = Moments.of(normal(n, dim, seed)), Moments.of(3 + 2 * normal(m, dim, seed + 1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)
    assert frechet_distance(a, b) >= 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_moments_merge_over_ranks_and_subtract():
    x = normal(300, 8, 0)
    whole = Moments.of(x)
    merged = Moments.of(x[:17]) + Moments.of(x[17:180]) + Moments.of(x[180:])
    assert merged.num == 300
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-10)
    np.testing.assert_allclose((whole - Moments.of(x[:17])).covariance, np.cov(x[17:], rowvar=False), rtol=1e-9)


def test_constant_feature_makes_a_singular_covariance_that_still_works():
    x, y = normal(100, 5, 0), normal(100, 5, 1)
    with_constant = [np.hstack([f, np.full((100, 1), 2.0)]) for f in (x, y)]
    expected = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_distance(*map(Moments.of, with_constant)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("num", "dim"), [(203, 10), (41, 60), (8, 30)])
def test_jackknife_replicates_are_the_distances_without_each_group(num, dim):
    reference = Moments.of(normal(150, dim, 5))
    x = 0.5 + 1.3 * normal(num, dim, 6)
    groups = jackknife_groups(num)
    replicates = Gaussian(reference).replicates(lambda at: x[at], groups)
    expected = [frechet_distance(Moments.of(x[groups != g]), reference) for g in range(min(20, num))]
    np.testing.assert_allclose(replicates, expected, rtol=1e-9)


def test_no_replicates_where_a_group_leaves_fewer_than_two():
    assert Gaussian(Moments.of(normal(50, 4, 0))).replicates(lambda at: normal(2, 4, 1)[at], np.array([0, 1])) == []


def test_jackknife_interval_contains_the_value_and_covers():
    """At d = 16 the interval must cover the distance of the fitted model at that n, mean over repeats."""
    dim, n = 16, 400
    reference = Moments.of(normal(4000, dim, 99))
    values, intervals = [], []
    for i in range(60):
        x = 0.2 + 1.1 * normal(n, dim, 1000 + i)
        values.append(frechet_distance(Moments.of(x), reference))
        replicates = Gaussian(reference).replicates(lambda at, x=x: x[at], jackknife_groups(n))
        intervals.append(jackknife_interval(values[-1], replicates))
        assert intervals[-1].low < values[-1] < intervals[-1].high
    covered = [i.low <= np.mean(values) <= i.high for i in intervals]
    assert np.mean(covered) >= 0.85


def test_split_half_null_follows_the_null_law():
    dim, n = 16, 8000
    assert split_half_null(normal(n, dim, 3)) == pytest.approx((dim * (dim + 1) / 4 + dim) * 4 / n, rel=0.4)


def test_clear_errors():
    with pytest.raises(ValueError, match="at least two samples, not 1"):
        frechet_distance(Moments.of(normal(1, 3, 0)), Moments.of(normal(9, 3, 0)))
    with pytest.raises(ValueError, match="3 and 4 numbers"):
        frechet_distance(Moments.of(normal(9, 3, 0)), Moments.of(normal(9, 4, 0)))


def test_rank_deficient_sides_agree_with_the_nuclear_norm():
    """tr √(Σ_a Σ_b) is the nuclear norm of A Bᵀ for centred rows A, B: exact for n < d."""
    a, b = normal(12, 40, 0), 2 * normal(9, 40, 1)
    ca, cb = (x - x.mean(0) for x in (a, b))
    nuclear = np.linalg.svd(ca @ cb.T / math.sqrt(11 * 8), compute_uv=False).sum()
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + (ca**2).sum() / 11 + (cb**2).sum() / 8 - 2 * nuclear
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("num", "dim"), [(40, 12), (12, 40), (20, 20), (2, 9)])
def test_a_gaussian_of_rows_is_that_of_their_moments(num, dim):
    rows, other = (np.random.default_rng(seed).standard_normal((n, dim)) for seed, n in ((0, num), (1, 60)))
    expected = Gaussian(Moments.of(rows)).distance(Moments.of(1.5 * other))
    assert Gaussian.of_rows(rows).distance(Moments.of(1.5 * other)) == pytest.approx(expected, rel=1e-9)
