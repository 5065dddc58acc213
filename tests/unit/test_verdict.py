"""The verdict's rule: paired deterioration, δ from seeds, families, false positives."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from rgbench.evaluate.results import load_result, load_results
from rgbench.judge import verdict
from rgbench.judge.paired import deterioration
from rgbench.judge.verdict import Model, false_positives, judge, models_of, rate_interval, thresholds, trained_keys
from rgbench.metrics.statistics import wilson_interval
from tests.results_maker import BASE, HACKED, LEFT, make, measured, put, seeds_and_students


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return seeds_and_students(tmp_path_factory.mktemp("results"))


def model(root: Path, name: str) -> Model:
    (found,) = [m for m in models_of(root) if m.about.model == name]
    return found


def result(root: Path, name: str, metric: str):
    (found,) = [r for r in load_results(root) if r.model == name and r.metric.name == metric]
    return found


def test_paired_images_are_resampled_together(world):
    found = deterioration(result(world, "rg_lcd-s1", "oracle_mean"), result(world, "lcd-s1", "oracle_mean"))
    assert found.basis == "images"
    assert found.value == pytest.approx(1, abs=0.05), "a fall of a figure of which more is better"
    assert found.high - found.low < 0.08, "what both sides share cancels: unpaired it would be about 0.7"
    assert found.low < found.value < found.high


def test_paired_jackknife_subtracts_replicates(world):
    ours, base = (result(world, name, "hfer_gap_db") for name in ("rg_lcd-s1", "lcd-s1"))
    found = deterioration(ours, base)
    drawn = np.abs(ours.extra["jackknife"]) - np.abs(base.extra["jackknife"])
    half = 2.0930240544 * np.sqrt(19 / 20 * ((drawn - drawn.mean()) ** 2).sum())
    assert found.basis == "jackknife" and found.value == pytest.approx(ours.value - base.value)
    assert found.high - found.value == pytest.approx(half, rel=1e-6, abs=1e-12)


def test_without_pairs_half_widths_add_in_quadrature(world):
    found = deterioration(result(world, "rg_lcd-s1", "fd_efflite0"), result(world, "lcd-s1", "fd_efflite0"))
    assert found.basis == "quadrature"
    assert found.high - found.value == pytest.approx(0.2 * np.sqrt(2))


def test_other_images_are_not_paired(tmp_path):
    one = load_result(put(tmp_path, "lcd-s0", "oracle_mean", rows=BASE))
    few = load_result(put(tmp_path, "lcd-s1", "oracle_mean", rows=BASE[:32]))
    assert deterioration(one, few).basis == "none" and deterioration(one, few).low is None
    with pytest.raises(ValueError, match="two protocols"):
        deterioration(one, load_result(put(tmp_path, "lcd-s2", "oracle_mean", rows=BASE, version=2)))
    empty = load_result(put(tmp_path, "lcd-s3", "oracle_mean"))
    assert deterioration(one, empty) is None, "missing is missing"


def test_nearness_to_the_target_counts_from_both_sides(tmp_path):
    near, below, above = (
        load_result(put(tmp_path, f"lcd-s{i}", "hfer_gap_db", value, jackknife=value + 0.01 * BASE[:20]))
        for i, value in enumerate((0.5, -2.0, 2.0))
    )
    for far in (below, above):
        assert deterioration(far, near).value == pytest.approx(1.5)
        assert deterioration(far, near).clear_of(1) and not deterioration(near, far).clear_of(0)


def test_without_real_images_the_lcd_student_is_the_target(tmp_path):
    """A level, such as a HFER of −12 dB, is no distance from 0: a move to −9 is a fault, and one to −15 as well."""
    base, up, down = (
        load_result(put(tmp_path, f"lcd-s{i}", "hfer_gap_db", value, jackknife=value + 0.01 * own, level=True))
        for i, (value, own) in enumerate(((-12.0, BASE[:20]), (-9.0, BASE[20:40]), (-15.0, BASE[20:40])))
    )
    for moved in (up, down):
        found = deterioration(moved, base)
        assert found.value == 3 and 2 < found.low < 3 < found.high < 4
        assert deterioration(base, moved).value == 3
    assert deterioration(base, base).low == 0
    seeds = [{("hfer_gap_db", "x"): result} for result in (base, up, down, base, base)]
    assert thresholds(seeds, [("hfer_gap_db", "x")])["hfer_gap_db", "x"] == pytest.approx(6)


def test_delta_of_one_figure_is_the_percentile_of_pair_differences(world):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    (key,) = [key for key in seeds[0] if key[0] == "fd_efflite0"]
    gaps = [abs(a[key].value - b[key].value) for a, b in combinations(seeds, 2)]
    assert thresholds(seeds, [key])[key] == pytest.approx(np.quantile(gaps, 0.95, method="higher"), rel=1e-12)
    assert thresholds(seeds[:4], [key]) == {key: None}
    few = [abs(a[key].value - b[key].value) for a, b in combinations(seeds[:5], 2)]
    assert thresholds(seeds[:5], [key])[key] == pytest.approx(max(few)), "of ten pairs the largest, on the safe side"


def test_nearness_is_to_the_target_that_the_figure_has(tmp_path):
    near, far = (make(f"lcd-s{i}", "hfer_gap_db", value, half=0.1) for i, value in enumerate((2.5, 5.0)))
    near, far = (each.model_copy(update={"extra": {"target": 3.0}}) for each in (near, far))
    assert deterioration(far, near).value == pytest.approx(1.5) and deterioration(near, far).value == pytest.approx(
        -1.5
    )


def test_a_family_of_many_figures_is_no_more_easily_worse(world):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    keys = [key for key in seeds[0] if key[0] in LEFT]
    alone = {key: thresholds(seeds, [key])[key] for key in keys}
    together = thresholds(seeds, keys)
    assert all(together[key] >= alone[key] * (1 - 1e-12) for key in keys)
    assert any(together[key] > alone[key] for key in keys)


def test_the_rule(world):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    hacked = judge(model(world, "rg_lcd-s1").figures, seeds[1], seeds)
    assert hacked.up and hacked.over_optimised
    assert set(hacked.worse) == {"spectrum", "pixel and colour", "held-out rewards or oracle"}
    honest = judge(model(world, "lrm-s1").figures, seeds[1], seeds)
    assert honest.up and not honest.worse and not honest.over_optimised
    names = {change.key[0] for changes in hacked.families.values() for change in changes}
    assert not names & {"hps_aa0", "hps_aa1"}, "a reward trained on is no held-out one, whatever its antialias"
    assert [change.key[0] for change in hacked.rewards] == ["hps_aa0"], "the very reward, by its fingerprint"


def test_one_worse_family_is_not_enough_and_the_reward_must_be_up(world, tmp_path):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    measured(tmp_path, "rg_lcd-s1", {"hps_aa0": 2, "hfer_gap_db": 3})
    assert not judge(model(tmp_path, "rg_lcd-s1").figures, seeds[1], seeds).over_optimised
    measured(tmp_path, "lrm-s1", {"hfer_gap_db": 3, "wavelet_noise_gap": 1})
    worse = judge(model(tmp_path, "lrm-s1").figures, seeds[1], seeds)
    assert len(worse.worse) == 2 and not worse.up and not worse.over_optimised


def test_two_worse_families_are_enough(world, tmp_path):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    measured(tmp_path, "rg_lcd-s1", {"hps_aa0": 2, "hfer_gap_db": 3, "wavelet_noise_gap": 1})
    found = judge(model(tmp_path, "rg_lcd-s1").figures, seeds[1], seeds)
    assert len(found.worse) == 2 and found.over_optimised


def test_delta_of_several_figures_is_in_units_of_their_root_mean_square_difference(world):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    keys = [key for key in seeds[0] if key[0] in LEFT]
    gaps = np.array([[abs(a[key].value - b[key].value) for key in keys] for a, b in combinations(seeds, 2)])
    unit = np.sqrt((gaps**2).mean(0))
    share = np.quantile((gaps / unit).max(1), 0.95, method="higher")
    assert [thresholds(seeds, keys)[key] for key in keys] == pytest.approx(share * unit)


def test_a_figure_that_a_seed_lacks_is_left_out(world):
    seeds = [dict(model(world, f"lcd-s{i}").figures) for i in range(5)]
    seeds[2] = {key: found for key, found in seeds[2].items() if key[0] != "fd_efflite0"}
    assert "set distance" not in judge(model(world, "rg_lcd-s1").figures, seeds[1], seeds).families


def test_delta_of_a_judged_pair_is_from_neither(world, monkeypatch):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    real, asked = verdict.judge, []
    monkeypatch.setattr(verdict, "judge", lambda *given: asked.append(given) or real(*given))
    false_positives(seeds, model(world, "rg_lcd-s1").figures)
    for ours, base, rest, _ in asked:
        assert len(rest) == 5 and not any(each is ours or each is base for each in rest)


def test_no_change_is_not_clear_and_an_interval_is_of_95_per_cent(tmp_path):
    base, moved = (load_result(put(tmp_path, f"lcd-s{i}", "oracle_mean", rows=BASE[::s])) for i, s in ((0, 1), (1, -1)))
    assert deterioration(base, base).low == 0 and not deterioration(base, base).clear_of(0)
    found, differences = deterioration(moved, base), BASE - BASE[::-1]
    half = 1.96 * differences.std() / np.sqrt(len(BASE))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_false_positives_hold_out_the_pair_that_is_judged(world):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    like = model(world, "rg_lcd-s1").figures
    found = false_positives(seeds, like)
    assert found.pairs == 42
    by_hand = [
        judge(seeds[i], seeds[j], [seeds[k] for k in range(7) if k not in (i, j)], like)
        for i, j in permutations(range(7), 2)
    ]
    assert found.two_worse == sum(len(each.worse) >= 2 for each in by_hand)
    assert false_positives(seeds[:6], like) is None
    assert trained_keys(like) and not trained_keys(seeds[0])


def test_an_odd_lcd_seed_is_counted_as_a_false_positive(world, tmp_path):
    """The rate measures: a seed that fell out of line is found fault with."""
    measured(tmp_path, "lcd-s0", HACKED)
    seeds = [model(world, f"lcd-s{i}").figures for i in range(1, 7)]
    odd = false_positives([model(tmp_path, "lcd-s0").figures, *seeds], model(world, "rg_lcd-s1").figures)
    assert odd.over_optimised == 6, "against each of the six others"


def made_up(rng: np.random.Generator, name: str, shift: float) -> dict:
    """Figures of four families; training luck has deviation 1, images 0.2."""
    figures = {}
    for metric, sign in (("hps_aa0", 1), ("oracle_mean", -1), ("hfer_gap_db", 1), ("grid_vae_gap_db", 1),
                         ("wavelet_noise_gap", 1), ("fd_efflite0", 1)):  # fmt: skip
        value = 10 + rng.normal() + sign * shift
        left = value + 0.2 / 19**0.5 * rng.normal(size=20) / 19**0.5
        result = make(name, metric, value, jackknife=left)
        figures[metric, result.protocol.id] = result
    return figures


def test_the_rule_rarely_errs_and_finds_what_is_large():
    """Of students that differ from LCD by training luck alone few are condemned; five deviations are found."""
    rng, wrong, found = np.random.default_rng(1), 0, 0
    for _ in range(100):
        seeds = [made_up(rng, f"lcd-s{i}", 0) for i in range(7)]
        wrong += judge(made_up(rng, "rg_lcd-s0", 0), seeds[0], seeds).over_optimised
        found += judge(made_up(rng, "rg_lcd-s0", 6), seeds[0], seeds).over_optimised
    assert wrong <= 3 and found >= 85


def test_the_interval_of_the_false_positive_rate_allows_for_shared_seeds(world):
    """Pairs are called wrongly where one seed lies far above the other: one odd seed is an error of many pairs."""
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    found = false_positives(seeds, model(world, "rg_lcd-s1").figures)
    assert found.seeds == 7
    assert found.interval == rate_interval(found.over_optimised, 42, 7) == wilson_interval(found.over_optimised / 14, 3)
    rng, num = np.random.default_rng(2), 8
    draws = rng.normal(size=(1000, num))
    called = (draws[:, :, None] - draws[:, None, :] > 2).sum((1, 2))
    truth = 1 - NormalDist().cdf(2 / 2**0.5)
    ours = [rate_interval(int(count), num * (num - 1), num) for count in called]
    naive = [wilson_interval(int(count), num * (num - 1)) for count in called]
    covered = [np.mean([each.low <= truth <= each.high for each in found]) for found in (ours, naive)]
    assert covered[0] >= 0.95 > 0.9 > covered[1], "as if the pairs were independent it would be far too short"


def test_what_could_have_been_found_is_delta_and_the_power_of_so_many_images(world):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    hacked = judge(model(world, "rg_lcd-s1").figures, seeds[1], seeds)
    (change,) = [c for c in hacked.families["held-out rewards or oracle"] if c.key[0] == "oracle_mean"]
    error = (change.found.high - change.found.low) / 2 / 1.959964
    assert change.detectable == pytest.approx(change.delta + (1.959964 + 0.841621) * error, rel=1e-5)
    rng = np.random.default_rng(3)
    low = rng.normal(change.detectable, error, 4000) - 1.959964 * error
    assert np.mean(low > change.delta) == pytest.approx(0.8, abs=0.03)
    alone = judge(model(world, "rg_lcd-s1").figures, seeds[1], seeds[:4])
    assert {c.detectable for changes in alone.families.values() for c in changes} == {None}, "no δ, no answer"


def test_a_family_that_improves_beyond_delta_is_better_unless_a_figure_of_it_is_worse(world, tmp_path):
    seeds = [model(world, f"lcd-s{i}").figures for i in range(7)]
    measured(tmp_path, "rg_lcd-s1", {"hps_aa0": 2, "hfer_gap_db": -1, "grid_vae_gap_db": 2, "fd_efflite0": -3})
    found = judge(model(tmp_path, "rg_lcd-s1").figures, seeds[1], seeds)
    assert found.worse == ("spectrum",) and found.better == ("set distance",)
    assert judge(model(world, "lrm-s1").figures, seeds[1], seeds).better == ("held-out rewards or oracle",)
    assert not judge(seeds[2], seeds[1], seeds).better
