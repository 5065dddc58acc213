"""Verdicts as people get them: which students are compared, words, refusals, files, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import load_results
from rgbench.judge.compare import compare_models
from rgbench.judge.verdict import give_verdicts, load_verdicts, models_of
from tests.conftest import ROOT
from tests.results_maker import HACKED, measured, seeds_and_students


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return seeds_and_students(tmp_path_factory.mktemp("results"))


def test_verdicts_are_words_and_files(world):
    hacked, honest = sorted(give_verdicts(world, "lcd"), key=lambda v: v.model, reverse=True)
    assert (hacked.verdict, hacked.base) == ("over-optimised", "lcd-s1"), "the same training seed"
    assert hacked.words.startswith("Over-optimised. rg_lcd-s1 against lcd-s1: the trained reward is up (HPS_AA0 by ")
    assert "3 of 4 measured families are worse: spectrum (HFER_GAP_DB by" in hacked.words
    assert "Not measured: diversity, fragility." in hacked.words
    assert "δ is from 7 LCD seeds. Among them, with δ from those that are not compared, the rule calls" in hacked.words
    assert honest.verdict == "not over-optimised" and "0 of 4 measured families are worse" in honest.words
    assert "Better beyond δ, and nowhere worse: held-out rewards or oracle." in honest.words
    assert [family.name for family in honest.families if family.better] == ["held-out rewards or oracle"]
    (spectrum,) = [family for family in hacked.families if family.name == "spectrum"]
    (figure,) = [f for f in spectrum.figures if f.metric.name == "hfer_gap_db"]
    assert figure.clear and figure.low > figure.delta and figure.teacher == pytest.approx(0, abs=0.1)
    assert figure.delta < figure.detectable < figure.low, "what is found for sure is above what might be"
    assert len(hacked.delta_seeds) == 7 and hacked.false_positives["pairs"] == 42
    low, high = hacked.false_positive_interval
    assert low <= hacked.false_positives["over_optimised"] / 42 <= high and high > 0.4, "seven seeds say little"
    assert f"95 % interval {100 * low:.0f} to {100 * high:.0f} %, for the pairs share seeds" in hacked.words
    assert sorted(v.model for v in load_verdicts(world)) == ["lrm-s1", "rg_lcd-s1"]
    assert hacked in load_verdicts(world)
    assert len(load_results(world)) == 70, "verdicts are no results"


def test_what_got_better_in_a_worse_family_is_said(world, tmp_path):
    for seed in range(5):
        measured(tmp_path, f"lcd-s{seed}", {})
    measured(tmp_path, "rg_lcd-s1", HACKED | {"grid_vae_gap_db": -0.9})
    (found,) = give_verdicts(tmp_path)
    spectrum = found.words.partition("spectrum (")[2].partition(")")[0]
    assert spectrum.startswith("HFER_GAP_DB by") and spectrum.endswith(", though 1 of its 2 figures is better")
    assert [family.better for family in found.families if family.name == "spectrum"] == [False]


def test_the_lcd_students_are_found_by_their_method(tmp_path):
    for seed in (1, 8, 9, 10, 11):
        measured(tmp_path, f"plain-s{seed}", {}, method="lcd")
    measured(tmp_path, "rg_lcd-s1", HACKED)
    (found,) = give_verdicts(tmp_path)
    assert (found.base, found.verdict) == ("plain-s1", "over-optimised")
    assert [name.removeprefix("plain-s") for name in found.delta_seeds] == ["1", "8", "9", "10", "11"]
    for seed in range(5):
        measured(tmp_path, f"other-s{seed}", {}, method="lcd")
    (unsure,) = give_verdicts(tmp_path)
    assert unsure.verdict == "none" and unsure.base is None
    assert unsure.words.endswith("several LCD methods of its settings are here; name one with --base: other, plain")
    (named,) = give_verdicts(tmp_path, "other-s3")
    assert named.base == "other-s3" and len(named.delta_seeds) == 5, "one student is named, δ is from all like it"
    for seed in range(5):
        measured(tmp_path, f"lcd-s{seed}", {})
    (usual,) = give_verdicts(tmp_path)
    assert usual.base == "lcd-s1" and len(usual.delta_seeds) == 5, "the usual name settles it"


def test_models_trained_elsewhere_are_judged_when_their_reward_is_said(tmp_path, cli):
    results = tmp_path / "results"
    for seed in range(5):
        measured(results, f"plain-s{seed}", {}, elsewhere=True)
    measured(results, "tuned-s3", HACKED | {"hps_aa1": 2}, elsewhere=True)
    with pytest.raises(
        UsageError, match=r"of a model trained elsewhere say so: --model NAME --reward|Of a model trained"
    ):
        give_verdicts(results)
    (unknown,) = give_verdicts(results, "plain", ["tuned-s3"])
    assert unknown.verdict == "none" and "of a model trained elsewhere name it: --reward hps_aa1" in unknown.words
    done = cli("verdict", results, "--base", "plain", "--model", "tuned-s3", "--reward", "hps_aa0", "--json")
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)
    assert (said["verdict"], said["base"]) == ("over-optimised", "plain-s3"), "paired by the seed in the name"
    assert [change["metric"]["name"] for change in said["rewards"]] == ["hps_aa0"]
    judged = {figure["metric"]["name"] for family in said["families"] for figure in family["figures"]}
    assert not judged & {"hps_aa0", "hps_aa1"}, "the same weights under another resize are no held-out judge"
    wrong = cli("verdict", results, "--base", "plain", "--model", "tuned-s3", "--reward", "oracle_mean")
    assert wrong.returncode == 2 and "no reward 'oracle_mean' was measured; known: hps_aa0, hps_aa1" in wrong.stderr
    wrong = cli("verdict", results, "--base", "plain", "--reward", "hps_aa0")
    assert wrong.returncode == 2 and "--reward hps_aa0 says what some models were trained on; name them" in wrong.stderr


def test_models_of_one_reward_share_their_false_positive_rate(world, monkeypatch):
    from rgbench.judge import verdict as verdicts

    asked = []
    real = verdicts.false_positives
    monkeypatch.setattr(verdicts, "false_positives", lambda seeds, like: asked.append(like) or real(seeds, like))
    hacked, honest = give_verdicts(world)
    assert len(asked) == 1 and hacked.false_positives == honest.false_positives


def test_a_verdict_tells_where_its_delta_is_from_and_what_it_could_have_found(world, cli):
    done = cli("verdict", world, "--model", "rg_lcd-s1")
    assert done.returncode == 0
    assert "LCD is lcd-s1; δ is from lcd-s0, lcd-s1, lcd-s2, lcd-s3, lcd-s4, lcd-s5, lcd-s6." in done.stdout
    (row,) = [line.split("\t") for line in done.stdout.splitlines() if "\tHFER_GAP_DB" in line]
    (stored,) = [v for v in load_verdicts(world) if v.model == "rg_lcd-s1"]
    figure = next(f for family in stored.families for f in family.figures if f.metric.name == "hfer_gap_db")
    assert row[-3:] == [f"{figure.delta:.2f}", f"{figure.detectable:.2f}", "worse"]


def test_too_few_seeds_are_refused_in_words(tmp_path, cli):
    results = tmp_path / "results"
    for seed in range(4):
        measured(results, f"lcd-s{seed}", {})
    measured(results, "rg_lcd-s9", HACKED)
    done = cli("verdict", results)
    assert done.returncode == 1
    assert "no verdict on rg_lcd-s9 against lcd-s0: what training seeds alone differ by takes 5 students" in done.stdout
    assert "here are 4; train more seeds" in done.stdout and "HFER_GAP_DB" in done.stdout
    (stored,) = load_verdicts(results)
    assert stored.verdict == "none" and all(f.delta is None and not f.clear for f in stored.families[0].figures)
    measured(results, "lcd-s4", {})
    done = cli("verdict", results)
    assert done.returncode == 0 and "Over-optimised. rg_lcd-s9 against lcd-s0" in done.stdout
    assert "δ is from 5 LCD seeds. The rule's false-positive rate is not known: that takes 7 of them." in done.stdout


def test_what_cannot_be_compared_is_refused_in_words(world, tmp_path):
    with pytest.raises(UsageError, match="no result files here; run `rgbench eval` first"):
        give_verdicts(tmp_path / "none")
    with pytest.raises(UsageError, match="no finished model 'rg_ldc-s1'; did you mean 'rg_lcd-s1'"):
        give_verdicts(world, "lcd", ["rg_ldc-s1"])
    measured(tmp_path, "lcd-s0", {})
    with pytest.raises(UsageError, match="no model here is known to be trained on a reward"):
        give_verdicts(tmp_path)
    measured(tmp_path, "rg_lcd-s0", HACKED, steps=200, step=200)
    for base in (None, "lcd"):
        (other,) = give_verdicts(tmp_path, base)
        student = "LCD" if base is None else "'lcd'"
        assert other.base is None
        assert f"no {student} student of its world, sampler settings and training steps is here;" in other.words
        assert other.words.endswith("or name another with --base: lcd")
    measured(tmp_path, "rg_lcd-s0", HACKED, step=50)
    assert len(give_verdicts(tmp_path)) == 1, "a checkpoint's figures are left out"


def test_old_verdicts_load_for_ever():
    (old,) = load_verdicts(ROOT / "tests" / "history" / "verdict_v1")
    assert (old.schema_version, old.model, old.base, old.verdict) == (1, "rg_lcd-s1", "lcd-s1", "over-optimised")
    assert [family.name for family in old.families if family.worse] == [
        "spectrum",
        "pixel and colour",
        "held-out rewards or oracle",
    ]
    assert old.rewards[0].clear and old.rewards[0].low > old.rewards[0].delta > 0
    assert old.rewards[0].detectable is None and old.false_positive_interval is None
    assert old.false_positives["pairs"] == 42


def test_a_damaged_verdict_is_named(world, tmp_path):
    path = tmp_path / "w" / "m" / "g" / "verdict.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(UsageError, match=r"verdict.json: not a verdict: schema_version"):
        load_verdicts(tmp_path)


def test_progress_counts_models(world):
    shown = []

    def track(steps, what, unit):
        shown.append((what, len(steps), unit))
        return steps

    give_verdicts(world, track=track)
    compare_models(models_of(world), "lcd", track)
    assert shown[0][0].endswith(": reading")
    assert shown[1:] == [("verdicts", 2, "models"), ("comparisons", 10, "models")]
