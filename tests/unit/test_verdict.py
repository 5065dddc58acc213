"""The verdict's rule, what it is given and refuses, its words, its file and its command."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import ModelResult, load_result
from rgbench.judge.headroom import FILE as HEADROOM
from rgbench.judge.headroom import Group, Headroom, picks
from rgbench.judge.models import Model, ResultSet, load_result_sets, result_set
from rgbench.judge.paired import delta, seeds_delta, spread_delta
from rgbench.judge.verdict import (
    GOLD,
    NOTHING,
    QUESTIONS,
    REWARD,
    Declared,
    Outcome,
    Verdict,
    amount,
    current_verdicts,
    decide,
    give_verdicts,
    judge,
    judge_set,
    load_verdicts,
    proxy_accuracy,
    run_tests,
    seeds_needed,
)
from rgbench.metrics.values import shipped_infos
from tests.conftest import ROOT
from tests.results_maker import CLEAN, HACKED, HONEST, make_result, make_students, seeds_and_students

UP, DOWN, FLAT = 5.0, -5.0, 0.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return seeds_and_students(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def committed() -> ResultSet:
    (found,) = load_result_sets(ROOT / "results")
    return found


def load(root: Path) -> ResultSet:
    (found,) = load_result_sets(root)
    return found


def one(given: Path | list[ModelResult], name: str, declared: Declared = NOTHING) -> Verdict:
    found = load(given) if isinstance(given, Path) else result_set(given)
    (model,) = found.find(name)
    return judge(found, model, declared)


def columns() -> dict:
    made = result_set([make_result(None, "lcd-s0", values=CLEAN)])
    names = dict(zip([question.name for question in QUESTIONS], CLEAN, strict=True))
    return {question: made.column(metric) for question, metric in names.items()}


# The rule


def six_seeds(**shifts: float):
    """Tests of six seeds that differ by ± .1 around shifts."""
    luck = np.array([-0.1, 0.1, -0.05, 0.05, -0.1, 0.1])
    values = {}
    for question, column in columns().items():
        shift = shifts.get(question.split()[0], 0.0) * (1 if column.metric != "kd_efflite0" else -1)
        base = np.full(6, 50.0 if column.reference is None else -50.0)
        values[question] = seeds_delta(column, (base + shift + luck).tolist(), base.tolist())
    return run_tests(values)


@pytest.mark.parametrize(
    ("reward", "gold", "recall", "headroom", "outcome"),
    [
        (UP, DOWN, FLAT, None, Outcome.OVER_OPTIMISED),
        (UP, DOWN, UP, None, Outcome.OVER_OPTIMISED),
        (UP, UP, FLAT, None, Outcome.ALIGNED),
        (UP, UP, UP, None, Outcome.ALIGNED),
        (UP, UP, DOWN, None, Outcome.PAID_FOR),
        (UP, FLAT, FLAT, None, Outcome.REWARD_WITHOUT_GOLD),
        (UP, FLAT, FLAT, 3.0, Outcome.REWARD_WITHOUT_GOLD),
        (DOWN, DOWN, FLAT, None, Outcome.WORSE),
        (DOWN, FLAT, FLAT, None, Outcome.NO_GAIN),
        (DOWN, UP, FLAT, None, Outcome.NO_GAIN),
        (FLAT, FLAT, DOWN, None, Outcome.NO_GAIN),
        (FLAT, DOWN, FLAT, None, Outcome.NO_GAIN),
    ],
)
def test_outcomes(reward, gold, recall, headroom, outcome):
    tests = six_seeds(trained=reward, gold=gold, recall=recall)
    assert decide(tests, reward_margin=0.2, gold_margin=0.2, headroom=headroom) is outcome


def test_what_is_not_shown_is_undecided():
    tests = six_seeds(trained=UP)
    assert decide(tests, 0.2, 0.01) is Outcome.UNDECIDED, "gold is not shown to be equal"
    assert decide(tests, 0.2, 0.01, headroom=4.0) is Outcome.REWARD_WITHOUT_GOLD, "more than honest images could gain"
    assert decide(tests, 0.2, 0.01, headroom=5.0) is Outcome.UNDECIDED, "the interval reaches down to the headroom"
    assert decide(six_seeds(), 0.01, 0.2) is Outcome.UNDECIDED, "a gain is not excluded"


@pytest.mark.parametrize(("gold", "outcome"), [(0.3, Outcome.ALIGNED), (-0.3, Outcome.OVER_OPTIMISED)])
def test_a_change_of_gold_within_the_luck_of_a_seed_is_none_however_sure(gold, outcome):
    tests = six_seeds(trained=UP, gold=gold)
    assert tests["gold"].says == ("up" if gold > 0 else "down")
    assert decide(tests, 0.2, 0.2) is outcome
    assert decide(tests, 0.2, 0.5) is Outcome.REWARD_WITHOUT_GOLD
    lower = six_seeds(trained=DOWN, gold=gold)
    assert decide(lower, 0.2, 0.2) is (Outcome.NO_GAIN if gold > 0 else Outcome.WORSE)
    assert decide(lower, 0.2, 0.5) is Outcome.NO_GAIN, "in this direction too"


def test_p_values_are_students_and_holms():
    rng = np.random.default_rng(0)
    shown = columns()
    sides = {name: rng.normal(size=(2, 6)) for name in shown}
    found = run_tests({name: seeds_delta(shown[name], *map(list, sides[name])) for name in shown})
    raw = []
    for name, (ours, theirs) in sides.items():
        good = [np.array([shown[name].oriented(x) for x in side]) for side in (ours, theirs)]
        both = name in (REWARD.name, GOLD.name)
        raw.append(stats.ttest_rel(*good, alternative="two-sided" if both else "less").pvalue)
        assert found[name].p == pytest.approx(raw[-1], rel=1e-6)
    order = np.argsort(raw)
    holm = np.maximum.accumulate(np.minimum(1, np.array(raw)[order] * np.arange(6, 0, -1)))
    assert [list(found.values())[i].adjusted for i in order] == pytest.approx(holm.tolist(), rel=1e-6)


def test_one_run_is_adjusted_by_bonferroni():
    shown = columns()
    luck = np.random.default_rng(1).normal(size=8)
    found = run_tests({name: spread_delta(shown[name], 3.0, luck.tolist()) for name in shown}, one_run=True)
    z = (3.0 - luck.mean()) / (luck.std(ddof=1) * np.sqrt(1 + 1 / 8))
    assert found[REWARD.name].adjusted == pytest.approx(6 * 2 * stats.t.sf(z, 7), rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(-100, 100), min_size=6, max_size=6), min_size=12, max_size=12),
    st.lists(st.sampled_from([0.0, 1.0, 30.0, 1000.0]), min_size=2, max_size=2),
)
def test_never_is_each_worse_than_the_other(values, margins):
    shown = columns()
    sides = {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(shown)}
    one_way = run_tests({name: seeds_delta(shown[name], *side) for name, side in sides.items()})
    back = run_tests({name: seeds_delta(shown[name], *side[::-1]) for name, side in sides.items()})
    never_both(one_way, back, decide(one_way, *margins), decide(back, *margins))


BAD = (Outcome.OVER_OPTIMISED, Outcome.WORSE, Outcome.REWARD_WITHOUT_GOLD)


def never_both(one_way, back, first: Outcome, second: Outcome) -> None:
    for name in one_way.keys() & back.keys():
        assert not (one_way[name].says in ("worse", "down") and back[name].says in ("worse", "down"))
    assert not (first in BAD and second in BAD) and not (first is second is Outcome.ALIGNED)


def test_nor_is_it_among_the_committed_results(committed):
    """Every pair of students at one sampler setting: methods, and single runs against the seeds of another."""
    students = [model for model in committed.models if model.method != "teacher"]
    runs = [model.run(name) for model in students for name in model.names[:3] if len(model.results) > 1]
    names = ("hps", "gold_utility", "kd_efflite0", "recall_efflite0", "band_db", "saturation")
    shown = dict(zip([q.name for q in QUESTIONS], map(committed.column, names), strict=True))

    def tested(model: Model, base: Model):
        found = {name: delta(model, base, column) for name, column in shown.items()}
        found = {name: each for name, each in found.items() if each is not None}
        few = any(each.p is None for each in found.values()) or not {"trained reward", "gold"} <= found.keys()
        return None if few else run_tests(found, one_run=len(model.results) == 1)

    compared = 0
    for model, base in permutations([*students, *runs], 2):
        one_way, back = tested(model, base), tested(base, model)
        if one_way is not None and back is not None:
            never_both(one_way, back, decide(one_way, 0.1, 0.015), decide(back, 0.1, 0.015))
            compared += 1
    assert compared >= 60


# Verdicts on results

LCD = make_students(None, "lcd", {}, range(12))


def test_methods_of_six_seeds():
    made = [*LCD[:7], *make_students(None, "rg_lcd", HACKED), *make_students(None, "lrm", HONEST)]
    hacked, honest = one(made, "rg_lcd"), one(made, "lrm")
    assert (hacked.outcome, hacked.rule, hacked.num_seeds) == (Outcome.OVER_OPTIMISED, "method", 6)
    assert (honest.outcome, honest.base) == (Outcome.ALIGNED, "lcd, 7 seeds")
    says = {found.question: found.says for found in hacked.findings}
    assert says == {
        "trained reward": "up",
        "gold": "down",
        "set distance": "worse",
        "recall": "",
        "energy above .25": "worse",
        "saturation": "",
    }
    assert [found.metric for found in hacked.findings][:2] == ["hps", "oracle_all"]


def test_a_finding_is_the_comparison_that_is_shown_everywhere():
    results = result_set([*LCD, *make_students(None, "rg_lcd", HACKED)])
    (model,), (base,) = results.find("rg_lcd"), results.find("lcd")
    for found in judge(results, model).findings:
        shown = delta(model, base, results.column(found.metric))
        assert (found.change, found.low, found.high, found.better) == (shown.value, shown.low, shown.high, shown.better)
        assert found.model - found.base == pytest.approx(found.change)
        assert f"{found.change:+.{shown.column.decimals}f}".replace("-", "−") in amount(shown)


def test_another_declared_metric_worse_is_a_price():
    found = one([*LCD, *make_students(None, "lrm", HONEST | {"recall_efflite0": -0.2})], "lrm")
    assert found.outcome is Outcome.PAID_FOR and "Also worse: Recall −0.2" in found.words


def test_more_than_the_headroom_is_reward_without_gold():
    made = [*LCD[:6], *make_students(None, "rg_lcd", {"hps": 6.0})]
    honest = one(made, "rg_lcd", Declared(headroom=8.0))
    assert "Gold is called equal within" in honest.words, "within the headroom gold must be shown to be equal"
    found = one(made, "rg_lcd", Declared(headroom=3.0))
    assert found.outcome is Outcome.REWARD_WITHOUT_GOLD
    assert "Better images alone could gain 3.00 (--headroom)." in found.words


def test_the_headroom_is_read_beside_the_base(tmp_path):
    """The largest of its seeds, of this reward; what is declared goes before."""
    make_students(tmp_path, "lcd", {})
    make_students(tmp_path, "rg_lcd", {"hps": 6.0})
    assert one(tmp_path, "rg_lcd").headroom is None
    (base,) = load(tmp_path).find("lcd")
    fields = load(tmp_path).column("hps").reward_fields
    of_another = {**fields, "weights_sha256": "0" * 64}
    folders = [base.results[seed].folder for seed in range(4)]
    for folder, gain, own in zip(folders, (1.0, 3.0, 9.0), (fields, fields, of_another), strict=False):
        (folder / HEADROOM).write_text(headroom(folder, gain, own).model_dump_json())
    (folders[3] / HEADROOM).write_text(headroom(folders[3], 9.0, fields, "pickscore").model_dump_json())
    found = one(tmp_path, "rg_lcd")
    assert found.headroom == 3.0 and found.headroom_from == "headroom.json of lcd-s1"
    assert found.outcome is Outcome.REWARD_WITHOUT_GOLD
    assert "Better images alone could gain 3.00 (headroom.json of lcd-s1)." in found.words
    assert one(tmp_path, "rg_lcd", Declared(headroom=8.0)).headroom_from == "--headroom"
    shutil.copy(folders[1] / HEADROOM, folders[0])
    assert "headroom.json: of benchtop/lcd-s1/" in one(tmp_path, "rg_lcd").words, "another model's"
    (folders[0] / HEADROOM).write_text("{}")
    assert "run rgbench headroom" in one(tmp_path, "rg_lcd").words


def headroom(folder, gain, fields, reward="hps") -> Headroom:
    """Of a result, two prompts of two images that a reward tells apart by a gain over a random pick."""
    head = load_result(folder).head
    scores = {reward: np.array([[0, 2 * gain]] * 2), "oracle_all": np.array([[0, 100.0]] * 2)}
    group = Group(name="", num_prompts=2, picks=picks(scores, [reward, "oracle_all"]), links=())
    names = {"world": head.world, "model": head.model, "generation": head.generation.id, "prompts": "0"}
    return Headroom(
        **names, num_prompts=2, samples=2, reward=reward, reward_fields=fields, gold="oracle_all", groups=(group,)
    )


def test_other_metrics_describe_and_never_say_worse():
    made = [*LCD, *make_students(None, "lrm", HONEST)]
    more = [make_result(None, each.head.model, values={"fragility": len(made) - i}) for i, each in enumerate(made)]
    whole = [replace(each, values=(*each.values, *other.values)) for each, other in zip(made, more, strict=True)]
    assert one(whole, "lrm").outcome is one(made, "lrm").outcome is Outcome.ALIGNED


def test_what_the_gain_went_to_by_image(tmp_path):
    right = np.array([100.0] * 40 + [0.0] * 24)
    reward = np.random.default_rng(0).normal(size=64)
    changed = np.where(np.arange(64) < 8, 0.0, right)  # 8 images lose gold, and gain 2 of the reward; others 1
    for seed in range(6):
        make_result(tmp_path, f"lcd-s{seed}", rows={"hps": reward + 0.01 * seed, "oracle_all": right})
        gain = np.where(np.arange(64) < 8, 2.0, 1.0) + 0.002 * seed**2
        make_result(tmp_path, f"rg_lcd-s{seed}", rows={"hps": reward + gain, "oracle_all": changed})
    went_to = one(tmp_path, "rg_lcd").went_to
    assert {kind: share.images for kind, share in went_to.items()} == {
        "right → right": 0.5,
        "right → wrong": 0.125,
        "wrong → right": 0.0,
        "wrong → wrong": 0.375,
    }
    assert went_to["right → wrong"].gain == pytest.approx(went_to["right → right"].gain + 1)
    assert went_to["wrong → right"].gain is None


def test_right_and_wrong_are_the_oracles_where_gold_is_a_utility(tmp_path):
    right, changed = np.repeat([100.0, 0.0], 32), np.repeat([100.0, 0.0], [24, 40])
    rng = np.random.default_rng(0)
    for seed in range(6):
        luck = rng.normal(size=(4, 64))
        lcd = {"hps": luck[0], "oracle_all": right, "gold_utility": 0.5 + luck[1] / 100}
        make_result(tmp_path, f"lcd-s{seed}", rows=lcd)
        tuned = {"hps": 9 + luck[2], "oracle_all": changed, "gold_utility": 0.6 + luck[3] / 100}
        make_result(tmp_path, f"rg_lcd-s{seed}", rows=tuned)
    found = one(tmp_path, "rg_lcd")
    assert found.findings[1].metric == "gold_utility" and found.outcome is Outcome.ALIGNED
    assert found.went_to["right → wrong"].images == 0.125


def test_the_committed_study_is_judged(committed):
    found = {verdict.model: verdict for verdict in judge_set(committed.only(["rg_lcd", "lrm"]))}
    assert list(found) == ["rg_lcd, 6 seeds", "lrm, 6 seeds"]
    assert [verdict.outcome for verdict in found.values()] == [Outcome.PAID_FOR, Outcome.ALIGNED]
    for verdict, worse in zip(found.values(), (["saturation"], []), strict=True):
        says = {each.question: each.says for each in verdict.findings}
        assert verdict.rule == "method" and says["trained reward"] == says["gold"] == "up"
        assert [question for question, each in says.items() if each == "worse"] == worse
    assert "right to wrong (11%) the reward changed by −1.31" in found["lrm, 6 seeds"].words


def test_runs_of_few_seeds_are_judged_one_by_one():
    made = make_students(None, "rg_lcd", {"hps": 9.0, "oracle_all": -30.0}, range(2))
    found = judge_set(result_set([*LCD, *made]))
    assert [(v.model, v.rule, v.outcome) for v in found] == [
        ("rg_lcd-s0", "run", Outcome.OVER_OPTIMISED),
        ("rg_lcd-s1", "run", Outcome.OVER_OPTIMISED),
    ]
    assert all("This is one run of the method: its own luck is not in this." in v.words for v in found)


def test_a_run_without_a_seed_is_no_method():
    made = [*make_students(None, "plain", {}, method="external"), make_result(None, "tuned", "external", values=CLEAN)]
    found = one(made, "tuned", Declared(base="plain", reward="hps"))
    assert (found.rule, found.num_seeds) == ("run", 6)


def test_a_proxy_at_chance_is_no_test_of_lrm(tmp_path):
    rng = np.random.default_rng(0)
    make_students(tmp_path, "lcd", {})
    for name, level in (("lrm", 0.5), ("other", 0.7)):
        for seed in range(6):
            rows = [{"step": i, "pair_accuracy": level + 0.02 * rng.normal()} for i in range(40)]
            make_students(tmp_path, name, HACKED, [seed], method="lrm", log=rows)
    found = {v.method: v for v in judge_set(load(tmp_path))}
    assert found["lrm"].outcome is Outcome.NO_TEST and "no better than chance" in found["lrm"].words
    assert found["other"].outcome is Outcome.OVER_OPTIMISED
    (model,) = load(tmp_path).find("other")
    assert proxy_accuracy(model).low == pytest.approx(0.7, abs=0.02)
    make_students(
        tmp_path,
        "lone",
        HACKED,
        [0],
        method="lrm",
        log=[{"step": i, "fidelity/pair_accuracy": 0.4 + i % 2 / 5} for i in range(9)],
    )
    assert one(tmp_path, "lone").outcome is Outcome.NO_TEST, "one run: over its logged rows"


@pytest.mark.parametrize("name", ["pickscore", "hpsv3"])
def test_held_out_rewards_count(tmp_path, name):
    """Without an oracle, one named beforehand is gold."""
    rng = np.random.default_rng(2)
    for seed in range(6):
        for model, gain, loss in (("lcd", 0, 0), ("rg_lcd", 5, -2)):
            rows = {"hps": 20 + gain + rng.normal(size=32), name: 20 + loss + 0.1 * rng.normal(size=32)}
            make_result(tmp_path, f"{model}-s{seed}", rows=rows)
    without = one(tmp_path, "rg_lcd")
    assert without.outcome is Outcome.UNDECIDED and "--gold METRIC" in without.decides
    found = one(tmp_path, "rg_lcd", Declared(gold=name))
    assert found.outcome is Outcome.OVER_OPTIMISED and found.findings[1].metric == name
    assert set(found.missing) == {"set distance", "recall", "energy above .25", "saturation"}
    assert not found.went_to, "right and wrong are not said of images"


def test_an_undecided_verdict_says_what_would_decide_it(tmp_path):
    rng = np.random.default_rng(5)
    for seed in range(6):
        for model, gain in (("lcd", 0.0), ("rg_lcd", 5.0)):
            values = {"hps": 20 + gain + 0.1 * rng.normal(), "oracle_all": 80 + rng.normal() + 0.3 * gain}
            make_result(tmp_path, f"{model}-s{seed}", values=values)
    found = one(tmp_path, "rg_lcd")
    assert found.outcome is Outcome.UNDECIDED and "common seeds, by Oracle, all right" in found.decides


def test_as_many_seeds_as_are_said_would_decide():
    (column,) = result_set([make_result(None, "lcd-s0", values={"oracle_all": 1.0})]).columns
    rng = np.random.default_rng(0)
    found = seeds_delta(column, [1.0, -1.0, 2.0, 0.0, 1.5, 0.5], [0.0] * 6)
    num = seeds_needed(found, margin=0.0, num_tests=6)
    deviation = (found.high - found.low) / 2 / stats.t.ppf(0.975, 5) * np.sqrt(6)
    draws = rng.normal(found.value, deviation, size=(4000, num))
    p = stats.ttest_1samp(draws, 0, axis=1).pvalue
    assert np.mean(p < 0.05 / 6) == pytest.approx(0.8, abs=0.05)
    assert seeds_needed(seeds_delta(column, [0.0, 1, 0, 1, 0, -2], [0.0] * 6), 0.0, 6) is None


def test_set_distance_is_the_kernels_below_two_images_a_feature(tmp_path):
    """``num_images`` of made-up values is 8."""
    for features, metric in ((5, "kd_efflite0"), (4, "fd_efflite0")):
        root = tmp_path / metric
        for seed in range(6):
            for model, gain in (("lcd", 0), ("lrm", 5)):
                values = {"hps": 1.0 + gain + 0.01 * seed, "oracle_all": 50.0 + gain + 0.01 * seed**2}
                values |= {"kd_efflite0": 5.0 + seed, "fd_efflite0": 9.0 + seed}
                extra = {"fd_efflite0": {"num_features": features}}
                make_result(root, f"{model}-s{seed}", values=values, extra=extra)
        assert [f.metric for f in one(root, "lrm").findings if f.question == "set distance"] == [metric]


def test_what_may_be_declared_is_what_metrics_report():
    names = {name for question in QUESTIONS for name in question.metrics} - {"gold_utility"}  # of worlds to come
    assert names <= shipped_infos().keys()


# Bad input


HACKS = make_students(None, "rg_lcd", HACKED)


def test_without_a_base_of_equal_budget_the_way_is_said():
    longer = make_students(None, "lcd", {}, range(1), steps=50, step=50)
    assert "lcd: trained for 50 steps, not 100" in one([*longer, *HACKS], "rg_lcd").words
    found = one([*make_students(None, "lcd", {}, range(1), sampling={"steps": 2}), *HACKS], "rg_lcd")
    assert found.outcome is Outcome.UNDECIDED and "sampled with LCM, 2 steps, g 5, not LCM, 4 steps" in found.words


def test_too_few_seeds_say_how_many_are_needed():
    found = judge_set(result_set([*LCD[:2], *HACKS[:2]]))
    assert {v.outcome for v in found} == {Outcome.UNDECIDED} and len(found) == 2
    needed = "6 training seeds in common with lcd, and here are 1; one run takes 3 of lcd, and here are 2"
    assert needed in found[0].decides


def test_a_seed_with_two_results_is_named_with_the_remedy():
    again = make_result(None, "lcd-s1", values={"hps": 1.0, "oracle_all": 1.0}, weights="of another machine")
    found = one([*LCD, again, *HACKS], "rg_lcd")
    assert found.outcome is Outcome.UNDECIDED and "lcd-s1 has two results of one training seed" in found.decides
    assert "rgbench rm" in found.decides and "train more seeds" not in found.decides


def test_the_trained_reward_must_be_measured():
    made = [make_result(None, f"{m}-s{i}", values={"oracle_all": 1.0 + i}) for m in ("lcd", "rg_lcd") for i in range(6)]
    assert "evaluate both with --metric hps" in one(made, "rg_lcd").decides


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"gold": "oracle_al"}, "--gold oracle_al: no such metric was measured; did you mean 'oracle_all'"),
        ({"gold": "hps"}, "--gold hps: is declared already, as trained reward"),
        ({"gold": "kd_efflite0"}, "--gold kd_efflite0: is declared already, as set distance"),
        ({"base": "lcf"}, "no finished model 'lcf'; did you mean 'lcd'"),
        ({"headroom": 1.0}, "name them with --model"),
    ],
)
def test_wrong_declarations_are_errors(world, declared, message):
    with pytest.raises(UsageError, match=message):
        give_verdicts(world, (), Declared(**declared))


def test_the_same_weights_under_another_resize_are_not_gold():
    values = {"hps": 1.0, "hps_no_antialias": 2.0}
    made = [make_result(None, f"{model}-s{i}", values=values) for model in ("lcd", "rg_lcd") for i in range(6)]
    assert "--gold hps: is declared already" in one(made, "rg_lcd", Declared(gold="hps")).words


def test_a_metric_measured_twice_names_both_protocols():
    again = [make_result(None, r.head.model, values={"recall_efflite0": 0.5}, protocol={"version": 2}) for r in LCD]
    twice = [replace(r, values=(*r.values, *again[0].values)) for r in (*LCD, *HACKS)]
    found = one(twice, "rg_lcd")
    assert "recall_efflite0 was measured twice, as recall_efflite0-8-" in found.missing["recall"]
    assert found.outcome is Outcome.OVER_OPTIMISED


def test_energies_without_real_images_are_not_tested():
    made = [each for name in ("lcd", "rg_lcd") for each in make_students(None, name, HACKED, reference=None)]
    assert "no real images" in one(made, "rg_lcd").missing["energy above .25"]


def test_models_of_two_worlds_do_not_compare(tmp_path):
    make_students(tmp_path, "lcd", {}, range(1), world="full-size")
    make_students(tmp_path, "rg_lcd", HACKED, range(1))
    with pytest.raises(UsageError, match="rg_lcd is of world benchtop and lcd of full-size, which do not compare"):
        give_verdicts(tmp_path, ["rg_lcd"], Declared(base="lcd"))


def test_nothing_to_judge_says_how_to_declare(tmp_path):
    with pytest.raises(UsageError, match="rgbench eval"):
        give_verdicts(tmp_path)
    make_students(tmp_path, "lcd", {}, range(1))
    with pytest.raises(UsageError, match="--model NAME --reward METRIC --base NAME"):
        give_verdicts(tmp_path)
    with pytest.raises(UsageError, match="no finished model 'lcf'; did you mean 'lcd'"):
        give_verdicts(tmp_path, ["lcf"])


# Files and the command


def test_models_trained_elsewhere_are_judged_by_what_is_declared(tmp_path, cli):
    make_students(tmp_path, "plain", {}, method="external")
    make_students(tmp_path, "tuned", HACKED, method="external")
    done = cli("verdict", tmp_path, "--model", "tuned", "--reward", "hps", "--base", "plain", "--json")
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)
    assert (said["outcome"], said["base"]) == ("over-optimised", "plain, 6 seeds")
    (again,) = current_verdicts(tmp_path, load(tmp_path))
    assert again.outcome is Outcome.OVER_OPTIMISED, "what was declared is kept"
    assert load_verdicts(tmp_path, "benchtop").declared == {"tuned": Declared(reward="hps", base="plain")}
    done = cli("verdict", tmp_path, "--model", "tuned", "--reward", "oracle_all", "--base", "plain")
    assert done.returncode == 2 and "no such reward was measured; known: hps" in done.stderr


def test_verdicts_are_stored_by_world_and_read_again(world):
    given = give_verdicts(world)
    assert list(load_verdicts(world, "benchtop").verdicts) == given == current_verdicts(world, load(world))
    assert [v.method for v in give_verdicts(world, ["lrm"])] == ["lrm"]
    assert len(load_verdicts(world, "benchtop").verdicts) == 2


def test_a_stale_verdict_is_judged_again_and_named(tmp_path, caplog):
    seeds_and_students(tmp_path)
    (before, _) = give_verdicts(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert current_verdicts(tmp_path, load(tmp_path))[0] == before and not caplog.records
        make_result(tmp_path, "rg_lcd-s0", values={"fragility": 1.0})
        current_verdicts(tmp_path, load(tmp_path))
        assert not caplog.records, "a metric that is not declared changes nothing"
        make_students(tmp_path, "rg_lcd", {"oracle_all": 15.0}, [0])
        (after, _) = current_verdicts(tmp_path, load(tmp_path))
    changed = {name for name in after.used if after.used[name] != before.used[name]}
    assert len(changed) == 1 and next(iter(changed)).startswith("rg_lcd-s0/")
    assert "stale for rg_lcd, 6 seeds" in caplog.text


def test_old_and_damaged_verdicts_do_not_stand_in_the_way(tmp_path):
    old = load_verdicts(ROOT / "tests" / "history" / "verdict_v1", "benchtop")
    assert not old.verdicts, "those of the older rule lie in each model's folder, and are judged anew"
    path = tmp_path / "benchtop" / "verdict.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(UsageError, match=r"verdict.json: not verdicts: schema_version"):
        load_verdicts(tmp_path, "benchtop")


def test_the_command_shows_the_outcome_first(world, cli, tmp_path):
    done = cli("verdict", world, "--model", "rg_lcd")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "rg_lcd, 6 seeds: OVER-OPTIMISED" and lines[1].startswith("trained reward\tHPS\t")
    assert lines[-1].startswith("rg_lcd against lcd (6 common seeds): over-optimised.")
    make_students(tmp_path, "lcd", {}, range(2))
    make_students(tmp_path, "rg_lcd", HACKED, range(1))
    assert cli("verdict", tmp_path).returncode == 1, "undecided"


def test_the_how_to_tells_the_rule_in_200_words_and_its_example_is_true(committed):
    page = (ROOT / "docs" / "how-to" / "judge-over-optimisation.md").read_text()
    rule = page.partition("## The rule\n")[2].partition("\n## ")[0]
    assert len(rule.replace("|", " ").split()) < 200
    (model,), (base,) = committed.find("lrm"), committed.find("lcd")
    gold, reward = committed.column("gold_utility"), committed.column("hps")
    gains = [model.result(gold, seed).value - base.result(gold, seed).value for seed in model.results]
    mean, deviation = np.mean(gains), np.std(gains, ddof=1)
    t = mean / (deviation / np.sqrt(6))
    assert ", ".join(f"+{gain:.3f}" for gain in gains) in rule
    assert f"mean {mean:.4f}, s {deviation:.4f}, t = {mean:.4f}/({deviation:.4f}/√6) = {t:.1f}" in rule
    assert f"p = {2 * stats.t.sf(t, 5):.1e}".replace("e-0", "e-") in rule
    assert f"rose by {delta(model, base, reward).value:.2f}" in rule
    found = {each.question: each for each in judge(committed, model).findings}
    assert [each.question for each in sorted(found.values(), key=lambda each: each.p)[1:3]] == ["gold", "saturation"]
    assert found["gold"].adjusted == pytest.approx(5 * found["gold"].p)
    saturation = found["saturation"]
    assert f"(p = {saturation.p:.3f}, third, times 4)" in rule and saturation.says == ""
    assert saturation.adjusted == pytest.approx(4 * saturation.p) and judge(committed, model).outcome is Outcome.ALIGNED
