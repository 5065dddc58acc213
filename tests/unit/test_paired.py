"""One comparison, one Delta: over common seeds, else by images, else none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rgbench.core.errors import UsageError
from rgbench.judge.models import ResultSet, load_result_sets, result_set
from rgbench.judge.paired import delta, run_delta, seeds_delta
from rgbench.metrics.statistics import jackknife_groups
from tests.results_maker import make_result

GAIN = np.random.default_rng(0).normal(0.3, 0.2, size=6)
BASE = np.random.default_rng(1).normal(size=64)
NUM = 300


def compare(found: ResultSet, metric: str, model: str = "lrm", base: str = "lcd"):
    (ours,), (theirs,) = found.find(model), found.find(base)
    return delta(ours, theirs, found.column(metric))


def load(root: Path) -> ResultSet:
    (found,) = load_result_sets(root)
    return found


def test_common_seeds_are_compared_by_a_paired_t():
    made = [make_result(None, f"lcd-s{i}", values={"fd_efflite0": 10.0 + i}) for i in range(9)]
    made += [make_result(None, f"lrm-s{i}", values={"fd_efflite0": 10.0 + i - GAIN[i]}) for i in range(6)]
    found = compare(result_set(made), "fd_efflite0")
    known = stats.ttest_1samp(-GAIN, 0)
    assert found.basis == "seeds" and found.num_pairs == 6
    assert found.value == pytest.approx(-GAIN.mean()) and found.better == pytest.approx(GAIN.mean())
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()), rel=1e-6)
    assert (-found.better_high, -found.better_low) == pytest.approx((found.low, found.high))
    assert found.p == pytest.approx(known.pvalue, rel=1e-6) and found.arrow == "▲"


def test_a_difference_to_real_images_is_better_nearer_to_zero():
    made = [make_result(None, f"lcd-s{i}", values={"band_db": -1.0 + 0.01 * i}) for i in range(3)]
    made += [make_result(None, f"lrm-s{i}", values={"band_db": 3.0 + 0.02 * i}) for i in range(3)]
    found = compare(result_set(made), "band_db")
    assert found.value == pytest.approx(4.01) and found.better == pytest.approx(-2.03)
    assert found.is_clear and found.is_worse and found.arrow == "▼"


def test_without_a_good_end_nothing_is_better():
    made = [
        make_result(None, f"{m}-s{i}", values={"band_db": v + i}, reference=None)
        for m, v in (("lcd", 0), ("lrm", 3))
        for i in range(3)
    ]
    found = compare(result_set(made), "band_db")
    assert found.value == 3 and found.better is None and found.arrow == "" and found.is_clear


def test_one_common_seed_is_compared_by_its_images(tmp_path):
    make_result(tmp_path, "lcd-s0", rows={"oracle_all": BASE})
    make_result(tmp_path, "lcd-s1", rows={"oracle_all": BASE + 5})
    make_result(tmp_path, "lrm-s1", rows={"oracle_all": BASE + 5.5})
    found = compare(load(tmp_path), "oracle_all")
    assert found.value == pytest.approx(0.5) and found.basis == "images" and found.num_pairs == 64
    assert found.high - found.low < 1e-9, "what both share cancels" and found.p is None


def test_one_run_is_compared_with_the_spread_of_seeds():
    """A table's own subtraction: the run's value minus the mean of the seeds."""
    luck = np.random.default_rng(3).normal(size=8)
    made = [make_result(None, f"lcd-s{i}", values={"fd_efflite0": 10.0 + luck[i]}) for i in range(8)]
    found = result_set([*made, make_result(None, "lrm-s3", values={"fd_efflite0": 16.0})])
    one, back = compare(found, "fd_efflite0"), compare(found, "fd_efflite0", "lcd", "lrm")
    error = luck.std(ddof=1) * math.sqrt(1 + 1 / 8)
    assert one.basis == "spread" and one.num_pairs == 8 and one.value == pytest.approx(6 - luck.mean())
    assert one.high - one.value == pytest.approx(stats.t.ppf(0.975, 7) * error, rel=1e-6)
    assert one.p == pytest.approx(2 * stats.t.sf(one.value / error, 7), rel=1e-6)
    assert one.better == -one.value and one.is_worse
    assert (back.value, back.low, back.better, back.p) == (-one.value, -one.high, -one.better, one.p)


@pytest.mark.parametrize("num", [3, 6, 10])
def test_what_so_many_seeds_could_have_shown_is_found_four_times_in_five(num):
    """Against the exact power, from the noncentral t."""
    (column,) = result_set([make_result(None, "lcd-s0", values={"hps": 0.0})]).columns
    values = np.arange(num, dtype=float)
    found = seeds_delta(column, values.tolist(), [0.0] * num)
    effect = found.detectable / values.std(ddof=1) * np.sqrt(num)
    critical = stats.t.ppf(0.975, num - 1)
    power = stats.nct.sf(critical, num - 1, effect) + stats.nct.cdf(-critical, num - 1, effect)
    assert 0.76 <= power <= 0.83
    assert seeds_delta(column, [1.0] * num, [1.0] * num).detectable is None, "without a spread nothing is known"


def test_so_it_is_of_so_many_images(tmp_path):
    for name, rows in (("lcd-s0", np.zeros(64)), ("lrm-s0", BASE)):
        make_result(tmp_path, name, rows={"oracle_all": rows})
    effect = compare(load(tmp_path), "oracle_all").detectable
    p = stats.ttest_1samp(effect + BASE.std() * np.random.default_rng(2).normal(size=(3000, 64)), 0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.06)


def test_images_of_one_prompt_are_resampled_together(tmp_path):
    rows = np.repeat(BASE, 4)
    make_result(tmp_path, "lcd-s0", rows={"oracle_all": np.zeros(256)}, per_prompt=4)
    make_result(tmp_path, "lrm-s0", rows={"oracle_all": rows}, per_prompt=4)
    found = compare(load(tmp_path), "oracle_all")
    error = math.sqrt(np.mean([BASE[::2].var(), BASE[1::2].var()]) / 64)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1) and found.num_pairs == 64


def test_a_teacher_meets_every_seed_and_a_run_without_a_seed_their_spread():
    made = [make_result(None, f"lrm-s{i}", values={"hps": 10.0 + i}) for i in range(4)]
    made.append(make_result(None, "teacher", values={"hps": 9.0}, sampling={"steps": 50}))
    found = compare(result_set(made), "hps", base="teacher")
    assert found.value == 2.5 and found.num_pairs == 4 and found.basis == "seeds"
    back = compare(result_set(made), "hps", "teacher", "lrm")
    assert (back.value, back.low, back.better) == (-2.5, -found.high, -found.better)
    made.append(make_result(None, "tuned", "external", values={"hps": 9.0}))
    luck = compare(result_set(made), "hps", "tuned", "lrm")
    assert luck.basis == "spread" and luck.value == -2.5, "its own luck is unknown, so it is one run"
    assert luck.high - luck.low == pytest.approx((found.high - found.low) * math.sqrt(5))


@pytest.mark.parametrize(("half", "basis"), [(0.3, "quadrature"), (0.0, "quadrature")])
def test_without_a_common_seed_means_are_compared(half, basis):
    made = [make_result(None, name, values={"hps": v}, half=half) for name, v in (("lcd-s0", 1.0), ("lrm-s1", 2.0))]
    found = compare(result_set(made), "hps")
    assert found.value == 1 and found.basis == basis and found.num_pairs == 0
    assert found.high == pytest.approx(1 + math.hypot(half, half))
    bare = [make_result(None, name, values={"hps": v}) for name, v in (("lcd-s0", 1.0), ("lrm-s1", 2.0))]
    assert compare(result_set(bare), "hps").basis == "none"


def test_a_missing_value_is_no_difference():
    made = [make_result(None, "lcd-s0", values={"hps": None}), make_result(None, "lrm-s0", values={"hps": 1.0})]
    assert compare(result_set(made), "hps") is None


def test_damaged_rows_are_an_error(tmp_path):
    for name in ("lcd-s0", "lrm-s0"):
        made = make_result(tmp_path, name, rows={"hps": BASE})
    (made.folder / "samples.parquet").unlink()
    with pytest.raises(UsageError, match="samples.parquet"):
        compare(load(tmp_path), "hps")


# Two models against the same real images


def left_out(x: np.ndarray) -> list[np.ndarray]:
    groups = jackknife_groups(len(x))
    return [x[groups != g] for g in range(groups.max() + 1)]


def of_mean(rng: np.random.Generator, prompts: np.ndarray, mean: float, real: np.ndarray, name: str):
    rows = mean + prompts + 0.1 * rng.normal(size=len(prompts))
    own = [float(x.mean() - real.mean()) for x in left_out(rows)]
    theirs = [float(rows.mean() - y.mean()) for y in left_out(real)]
    extra = {"band_db": {"jackknife": own, "jackknife_real": theirs}}
    return make_result(None, name, values={"band_db": float(rows.mean() - real.mean())}, extra=extra, half=1.0)


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
        (column,) = result_set([above]).columns
        for found, pair in ((apart, (above, below)), (same, (higher, above))):
            found.append(run_delta(*pair, column))
            assert found[-1].basis == "jackknife"
    for found, truth in ((apart, 0.0), (same, -0.5)):
        share = np.mean([each.better_low <= truth <= each.better_high for each in found])
        assert share == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / NUM))
    widths = [np.mean([each.better_high - each.better_low for each in found]) for found in (apart, same)]
    assert widths[0] > 10 * widths[1], "on one side of real, the real images drop out"


def test_replicates_pair_only_with_as_many_real_groups():
    left = {"jackknife": [1.0, 2.0, 3.0], "jackknife_real": [1.0, 2.0]}
    model = make_result(None, "lrm-s0", values={"band_db": 2.0}, half=1.0, extra={"band_db": left})
    base = make_result(None, "lcd-s0", values={"band_db": 2.0}, half=1.0, extra={"band_db": {"jackknife": [1, 2, 3.0]}})
    (column,) = result_set([model]).columns
    assert run_delta(model, base, column).basis == "quadrature" and run_delta(model, model, column).basis == "jackknife"


def test_rows_against_a_real_mean_share_its_error(tmp_path):
    rng = np.random.default_rng(11)
    rows = {"lrm-s0": rng.normal(5, 0.5, 200), "lcd-s0": rng.normal(-5, 0.5, 200)}
    found = []
    for error in (0.0, 0.4):
        for name, own in rows.items():
            extra = {"wavelet_noise": {"real_error": error}}
            make_result(tmp_path / str(error), name, rows={"wavelet_noise": own}, extra=extra)
        found.append(compare(load(tmp_path / str(error)), "wavelet_noise"))
    known, unknown = found
    assert known.low == pytest.approx(unknown.low) and known.basis == "images", "the signed change has no such error"
    halves = [(each.better_high - each.better_low) / 2 for each in found]
    assert halves[1] == pytest.approx(math.hypot(halves[0], 2 * 1.96 * 0.4), rel=0.1)
