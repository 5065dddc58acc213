"""Two independent samples, generated and real: intervals cover, and two models share the real one's luck."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rgbench.evaluate.results import Result, load_result, write_result
from rgbench.judge.paired import deterioration, difference, has_prompt_targets, is_level
from rgbench.metrics.base import Interval
from rgbench.metrics.statistics import (
    jackknife_groups,
    jackknife_interval,
    jackknife_interval_of_sides,
    student_t_quantile,
    unpaired_bootstrap_interval,
)
from tests.results_maker import make

NUM = 300


def covered(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([found.low <= truth <= found.high for found in intervals]))


def about(share: float, num: int = NUM):
    """Three standard errors of a simulated share."""
    return pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / num))


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
    assert num_real > 120 or covered(apart, truth) < 0.8, "the real images' luck counts"


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
    assert (still.low, still.high) == pytest.approx((alone.low, alone.high)), "a side without luck adds none"
    assert jackknife_interval_of_sides(5.0, [[5.0] * 20, [5.0] * 20]).low == 5.0
    assert jackknife_interval_of_sides(5.0, [one.tolist(), [1.0]]) is None


# Two models against the same real images


def with_extra(result: Result, **extra) -> Result:
    fields = {**result.protocol.fields, "reference": {"kind": "crops", "lossy": False}}
    protocol = result.protocol.model_copy(update={"fields": fields})
    return result.model_copy(update={"extra": {**result.extra, **extra}, "protocol": protocol})


def of_mean(rng: np.random.Generator, prompts: np.ndarray, mean: float, real: np.ndarray, name: str) -> Result:
    rows = mean + prompts + 0.1 * rng.normal(size=len(prompts))
    own = [float(x.mean() - real.mean()) for x in left_out(rows)]
    theirs = [float(rows.mean() - y.mean()) for y in left_out(real)]
    value = float(rows.mean() - real.mean())
    return with_extra(make(name, "hfer_gap_db", value, half=1.0), jackknife=own, jackknife_real=theirs)


def test_a_comparison_covers_whichever_side_of_real_the_models_are_on():
    """|gap| of one model above real and of one below: the real images' luck counts twice, and cancels on one side."""
    rng = np.random.default_rng(10)
    apart, same = [], []
    for _ in range(NUM):
        prompts, real = rng.normal(0, 0.5, 100), rng.normal(0, 2.0, 80)
        above, below, higher = (
            of_mean(rng, prompts, mean, real, name)
            for mean, name in ((2.0, "rg_lcd-s0"), (-2.0, "lcd-s0"), (2.5, "lrm-s0"))
        )
        for found, pair in ((apart, (above, below)), (same, (higher, above))):
            paired = deterioration(*pair)
            assert paired.basis == "jackknife"
            found.append(Interval(low=paired.low, high=paired.high, level=0.95, method=""))
    assert covered(apart, 0.0) == about(0.95) and covered(same, 0.5) == about(0.95)
    widths = [np.mean([found.high - found.low for found in each]) for each in (apart, same)]
    assert widths[0] > 10 * widths[1], "on one side of real, the real images drop out"


def test_replicates_pair_only_with_as_many_real_groups():
    left = {"jackknife": [1.0, 2.0, 3.0], "jackknife_real": [1.0, 2.0]}
    model = with_extra(make("rg_lcd-s0", "hfer_gap_db", 2.0, half=1.0), **left)
    base = with_extra(make("lcd-s0", "hfer_gap_db", 2.0, half=1.0), jackknife=[1.0, 2.0, 3.0])
    assert difference(model, base).basis == "quadrature" and difference(model, model).basis == "jackknife"


def stored(root, name: str, rows: np.ndarray, **extra) -> Result:
    result = with_extra(make(name, "wavelet_noise_gap", rows=rows), **extra)
    columns = {"prompt_id": [f"p/{i}" for i in range(len(rows))], "seed": [0] * len(rows), "group": [""] * len(rows)}
    return load_result(write_result(root, result, {**columns, "value": rows.tolist()}))


def test_rows_against_a_real_mean_share_its_error(tmp_path):
    rng = np.random.default_rng(11)
    above = rng.normal(5, 0.5, 200)
    below = rng.normal(-5, 0.5, 200)
    pairs = {}
    for error in (0.0, 0.4):
        root = tmp_path / str(error)
        pairs[error] = [
            stored(root, name, rows, real_error=error) for name, rows in (("rg_lcd-s0", above), ("lcd-s0", below))
        ]
    linear = [difference(*pairs[error]) for error in pairs]
    assert linear[0].low == pytest.approx(linear[1].low) and linear[0].basis == "images"
    known, unknown = (deterioration(*pairs[error]) for error in pairs)
    halves = [(found.high - found.low) / 2 for found in (known, unknown)]
    assert halves[1] == pytest.approx(math.hypot(halves[0], 2 * 1.96 * 0.4), rel=0.1)
    assert not has_prompt_targets(pairs[0.4][0])


def test_lossy_real_images_are_no_target():
    """A blurred model would look better than a clean one beside photographs that JPEG has blurred."""
    clean, blurred = (make(name, "hfer_gap_db", value, half=0.1) for name, value in (("lcd-s0", 3.0), ("lrm-s0", 0.5)))
    assert not is_level(clean) and deterioration(blurred, clean).value == -2.5
    for lossy, expected in ((True, 2.5), (False, -2.5)):
        fields = {"reference": {"lossy": lossy}}
        sides = [
            x.model_copy(update={"protocol": x.protocol.model_copy(update={"fields": fields})})
            for x in (blurred, clean)
        ]
        assert is_level(sides[0]) == lossy and deterioration(*sides).value == expected
