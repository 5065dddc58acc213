"""Verdicts: paired deterioration, δ from seeds, the rule, its false positives, refusals in words, the file."""

from __future__ import annotations

import json
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest

from rgbench.errors import UsageError
from rgbench.evaluation.paired import deterioration
from rgbench.evaluation.results import load_result, load_results
from rgbench.evaluation.verdict import false_positives, judge, thresholds, trained_keys
from rgbench.evaluation.verdict_file import load_verdicts
from rgbench.evaluation.verdicts import Model, give_verdicts, models_of
from tests.conftest import ROOT
from tests.results_maker import make, put

NUM = 64
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=NUM)
ROWS = ("hps_aa0", "hps_aa1", "oracle_mean", "wavelet_noise_gap")
LEFT = ("hfer_gap_db", "grid_vae_gap_db")


def measured(root: Path, model: str, shifts: dict[str, float], **given) -> None:
    """All metrics of a model; each shifted from what all models share, with a little noise of its own."""
    own = np.random.default_rng(sum(map(ord, model)))
    for name in ROWS:
        put(root, model, name, rows=1 + BASE + 0.05 * own.normal(size=NUM) + shifts.get(name, 0), **given)
    for name in LEFT:
        value = 1 + 0.02 * own.normal() + shifts.get(name, 0)
        put(root, model, name, value, jackknife=value + 0.01 * BASE[:20], half=0.5, **given)
    put(root, model, "fd_efflite0", 10 + 0.1 * own.normal() + shifts.get("fd_efflite0", 0), half=0.2, **given)


HACKED = {"hps_aa0": 2, "hfer_gap_db": 3, "wavelet_noise_gap": 1, "oracle_mean": -1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Seven LCD students, a hacked student, an honest one, the teacher."""
    root = tmp_path_factory.mktemp("results")
    for seed in range(7):
        measured(root, f"lcd-s{seed}", {})
    measured(root, "rg_lcd-s1", HACKED)
    measured(root, "lrm-s1", {"hps_aa0": 2, "oracle_mean": 1})
    measured(root, "teacher", {"hfer_gap_db": -1})
    return root


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


def test_verdicts_are_words_and_files(world):
    hacked, honest = sorted(give_verdicts(world, "lcd"), key=lambda v: v.model, reverse=True)
    assert (hacked.verdict, hacked.base) == ("over-optimised", "lcd-s1"), "the same training seed"
    assert hacked.words.startswith("Over-optimised. rg_lcd-s1 against lcd-s1: the trained reward is up (HPS_AA0 by ")
    assert "3 of 4 measured families are worse: spectrum (HFER_GAP_DB by" in hacked.words
    assert "Not measured: diversity, fragility." in hacked.words
    assert "Of 42 pairs of LCD students the same rule calls" in hacked.words
    assert honest.verdict == "not over-optimised" and "0 of 4 measured families are worse" in honest.words
    (spectrum,) = [family for family in hacked.families if family.name == "spectrum"]
    (figure,) = [f for f in spectrum.figures if f.metric.name == "hfer_gap_db"]
    assert figure.clear and figure.low > figure.delta and figure.teacher == pytest.approx(0, abs=0.1)
    assert len(hacked.delta_seeds) == 7 and hacked.false_positives["pairs"] == 42
    assert sorted(v.model for v in load_verdicts(world)) == ["lrm-s1", "rg_lcd-s1"]
    assert hacked in load_verdicts(world)
    assert len(load_results(world)) == 70, "verdicts are no results"


def test_too_few_seeds_are_refused_in_words(tmp_path, cli):
    results = tmp_path / "results"
    for seed in range(4):
        measured(results, f"lcd-s{seed}", {})
    measured(results, "rg_lcd-s9", HACKED)
    done = cli("verdict", results)
    assert done.returncode == 1
    assert "no verdict on rg_lcd-s9 against lcd-s0: what training seeds alone differ by takes 5 'lcd'" in done.stdout
    assert "here are 4; train more seeds" in done.stdout and "HFER_GAP_DB" in done.stdout
    (stored,) = load_verdicts(results)
    assert stored.verdict == "none" and all(f.delta is None and not f.clear for f in stored.families[0].figures)
    measured(results, "lcd-s4", {})
    done = cli("verdict", results)
    assert done.returncode == 0 and "Over-optimised. rg_lcd-s9 against lcd-s0" in done.stdout
    assert "Its false-positive rate is not known: that takes 7 LCD seeds, here are 5." in done.stdout


def test_what_cannot_be_compared_is_refused_in_words(world, tmp_path):
    with pytest.raises(UsageError, match="no result files here; run `rgbench eval` first"):
        give_verdicts(tmp_path / "none", "lcd")
    with pytest.raises(UsageError, match="no finished model 'rg_ldc-s1'; did you mean 'rg_lcd-s1'"):
        give_verdicts(world, "lcd", ["rg_ldc-s1"])
    measured(tmp_path, "lcd-s0", {})
    with pytest.raises(UsageError, match="no model here was trained on a reward"):
        give_verdicts(tmp_path, "lcd")
    measured(tmp_path, "rg_lcd-s0", HACKED, steps=200, step=200)
    (other,) = give_verdicts(tmp_path, "lcd")
    assert other.base is None
    assert "no 'lcd' student of the same world, sampler settings and training steps" in other.words
    measured(tmp_path, "rg_lcd-s0", HACKED, step=50)
    assert len(give_verdicts(tmp_path, "lcd")) == 1, "a checkpoint's figures are left out"


def test_old_verdicts_load_for_ever():
    (old,) = load_verdicts(ROOT / "tests" / "history" / "verdict_v1")
    assert (old.schema_version, old.model, old.base, old.verdict) == (1, "rg_lcd-s1", "lcd-s1", "over-optimised")
    assert [family.name for family in old.families if family.worse] == [
        "spectrum",
        "pixel and colour",
        "held-out rewards or oracle",
    ]
    assert old.rewards[0].clear and old.rewards[0].low > old.rewards[0].delta > 0
    assert old.false_positives["pairs"] == 42


def test_a_damaged_verdict_is_named(world, tmp_path):
    path = tmp_path / "w" / "m" / "g" / "verdict.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(UsageError, match=r"verdict.json: not a verdict: schema_version"):
        load_verdicts(tmp_path)
