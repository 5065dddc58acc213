"""Each model in words: its verdict, true signs, and what happened along training."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rgbench.judge.models import ResultSet, load_result_sets
from rgbench.judge.trajectory import TrainingRun
from rgbench.judge.verdict import judge_set
from rgbench.report.page import Album, training_data
from rgbench.report.plots import axes_of
from rgbench.report.tables import all_tables
from rgbench.report.words import Reading, gold_of, proxy_words, readings, runs_along
from tests.history.plausible import write_model
from tests.results_maker import HACKED, HONEST, make_result, make_students

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"
FEW = ("hps", "oracle_mean", "fd_efflite0", "hfer_db")


def read(root: Path) -> ResultSet:
    (found,) = load_result_sets(root)
    return found


def words(results: ResultSet) -> dict[str, Reading]:
    """By the model's name."""
    return {reading.title.split(" against ")[0]: reading for reading in readings(results, judge_set(results))}


def test_each_student_is_read_by_its_verdict(tmp_path):
    make_students(tmp_path, "lcd", {}, range(7))
    make_students(tmp_path, "rg_lcd", HACKED)
    make_students(tmp_path, "lrm", HONEST)
    results = read(tmp_path)
    found = words(results)
    for reading, verdict in zip(found.values(), judge_set(results), strict=True):
        assert (reading.label, reading.words) == (verdict.outcome, verdict.words)
    assert found["RG-LCD"].title == "RG-LCD against LCD"
    assert (found["RG-LCD"].label, found["RG-LCD"].tone) == ("over-optimised", "worse")
    assert found["LRM"].tone != "worse"
    assert re.fullmatch(
        r"The student learned to please the reward model: .* \(▲ HPS \+[\d.]+ ± [\d.]+, ▼ Oracle, all right −[\d.]+ ± "
        r"[\d.]+ points\)\.",
        found["RG-LCD"].answer,
    )


def test_runs_that_disagree_are_counted(tmp_path):
    make_students(tmp_path, "lcd", {}, range(7))
    make_students(tmp_path, "rg_lcd", HACKED, range(2))
    make_students(tmp_path, "rg_lcd", HONEST, [2])
    results = read(tmp_path)
    (found,) = words(results).values()
    outcomes = [verdict.outcome for verdict in judge_set(results)]
    most = max(outcomes, key=outcomes.count)
    assert len(outcomes) == 3 and found.label == f"{most} ({outcomes.count(most)} of 3 runs)"
    assert all(verdict.words in found.words for verdict in judge_set(results))


def test_a_verdict_is_on_one_sampler_setting(tmp_path):
    for sampling in ({}, {"steps": 2}):
        make_students(tmp_path, "lcd", {}, sampling=sampling)
        make_students(tmp_path, "rg_lcd", {} if sampling else HACKED, sampling=sampling)
    found = words(read(tmp_path))
    assert found["RG-LCD, LCM, 4 steps, g 5"].label == "over-optimised"
    assert found["RG-LCD, LCM, 2 steps, g 5"].label not in ("over-optimised", "undecided (1 of 2 runs)")


def test_without_a_verdict_the_changes_stand_alone():
    """The old results hold one LCD run."""
    found = words(read(HISTORY))
    assert {name: (each.label, each.tone) for name, each in found.items()} == {
        "RG-LCD": ("no verdict yet", "none"),
        "LRM": ("no verdict yet", "none"),
    }
    assert found["RG-LCD"].answer.endswith(
        "For a verdict train 2 more seeds of LCD and evaluate them alike: "
        "for s in 1 2; do rgbench train lcd seed=$s; done."
    )
    facts = found["RG-LCD"].facts
    assert facts[0] == "HPS (trained on, †): ▲ +2.60 ± 0.10, 26.80 → 29.40."
    assert "FD-EffLite0, n = 2048: ▼ +17.0 ± 2.6, 24.0 → 41.0." in facts
    assert any(fact.startswith("HFER gap: ▼ +6.1") and fact.endswith("dB, further from real.") for fact in facts)
    assert not any("Oracle" in fact for fact in found["LRM"].facts), "undefined"


def test_a_reward_that_rose_says_on_how_many_prompts(tmp_path):
    for method in ("lcd", "rg_lcd"):
        for seed in range(7):
            write_model(tmp_path, method, seed, metrics=("hps", "oracle_all"), num=8)
    (found,) = words(read(tmp_path)).values()
    assert re.fullmatch(
        r"HPS \(trained on, †\): ▲ \+2\.\d+ ± [\d.]+, [\d.]+ → [\d.]+, higher on 100 % \[100, 100\] of the prompts\.",
        found.facts[0],
    )


def test_of_each_family_one_metric_is_told(tmp_path):
    for method in ("lcd", "rg_lcd"):
        write_model(tmp_path, method, 0, num=8)
    (found,) = words(read(tmp_path)).values()
    assert [fact.split(":")[0] for fact in found.facts] == [
        *("HPS (trained on, †)", "HPS, no antialias (trained on, †)"),
        *("Oracle, all right", "FD-EffLite0", "Energy > .25 gap"),
    ]


def test_no_baseline_is_explained(tmp_path):
    write_model(tmp_path, "lrm", 0, metrics=("hps",))
    (found,) = words(read(tmp_path)).values()
    assert found.tone == "none" and "no LCD student" in found.words and found.facts == ()


def test_without_lcd_the_teacher_is_compared_with_and_the_command_of_a_verdict_given(tmp_path):
    write_model(tmp_path, "teacher", None, metrics=("hps", "oracle_all"), num=8)
    write_model(tmp_path, "lrm", 0, metrics=("hps", "oracle_all"), num=8, training=(10, 10))
    (found,) = words(read(tmp_path)).values()
    assert (found.title, found.label) == ("LRM against Teacher", "no verdict yet")
    assert found.answer.startswith("HPS (trained on, †): ▲ +1.") and "Oracle, all right: ▼ −4.7 ± 0.1" in found.answer
    assert found.answer.endswith("for s in 0 1 2; do rgbench train lcd train.steps=10 seed=$s; done.")
    assert "Compared with the teacher: no LCD student" in found.words


def test_a_named_base_is_what_everything_is_compared_with(tmp_path):
    for method in ("teacher", "lcd", "rg_lcd"):
        write_model(tmp_path, method, None if method == "teacher" else 0, metrics=("hps", "oracle_all"), num=8)
    results = replace(read(tmp_path), base="teacher")
    assert [reading.title for reading in readings(results, [])] == ["RG-LCD against Teacher"]


def test_a_model_that_was_trained_on_no_reward_gets_no_verdict(tmp_path):
    make_result(tmp_path, "lcd-s0", values={"oracle_all": 90.0}, half=1.0)
    make_result(tmp_path, "mine", "external", values={"oracle_all": 80.0}, half=1.0)
    (found,) = words(read(tmp_path)).values()
    assert (found.title, found.label, found.words) == ("mine against LCD", "not trained on a reward", "")
    assert found.facts == ("Oracle, all right: ▼ −10.0 ± 1.4, 90.0 → 80.0 %.",)


# Along training


def follow(root: Path, method: str = "rg_lcd", steps: tuple[int, ...] = (50, 100, 150, 200, 250), **how) -> None:
    for step in steps:
        write_model(root, method, 0, metrics=FEW, num=32, training=(step, 250), **how)


@pytest.fixture(scope="module")
def along(tmp_path_factory: pytest.TempPathFactory) -> ResultSet:
    root = tmp_path_factory.mktemp("along")
    for method in ("lcd", "rg_lcd", "lrm"):
        follow(root, method)
    write_model(root, "teacher", None, metrics=FEW, num=32)
    return read(root)


def run(results: ResultSet, name: str) -> TrainingRun:
    return next(found for found in runs_along(results) if found.name == name)


def test_checkpoints_are_no_models_but_points_that_end_in_the_finished_one(along):
    assert [model.method for model in along.models] == ["teacher", "lcd", "rg_lcd", "lrm"]
    found = run(along, "rg_lcd-s0")
    assert list(found.points) == [50, 100, 150, 200, 250]
    reward = along.column("hps")
    assert found.curve(reward)[250] == along.models[2].value(reward).value


def test_gold_is_what_the_run_was_not_trained_on(along):
    found = run(along, "rg_lcd-s0")
    assert (found.proxy.metric, gold_of(found).metric) == ("hps", "oracle_mean")
    assert run(along, "lcd-s0").proxy is None


def test_words_tell_the_hack_step_or_that_there_is_none(along):
    found = {name: reading.facts[-1] for name, reading in words(along).items()}
    lrm = run(along, "lrm-s0")
    hack = lrm.hack(gold_of(lrm))
    assert found["LRM"].startswith(f"Along training, lrm-s0: hack step {hack.step}")
    assert re.search(r"to step 250: Oracle, mean ▼ −[\d.]+ ± <?[\d.]+, HPS ▲ \+[\d.]+ ± ", found["LRM"])
    assert found.keys() == {"RG-LCD", "LRM"}


def test_a_run_without_a_hack_step_says_so(tmp_path):
    follow(tmp_path, steps=(100, 250))
    (found,) = words(read(tmp_path)).values()
    assert found.facts[-1] == (
        "Along training, rg_lcd-s0, 2 steps evaluated: at none does Oracle, mean clearly peak while HPS still rises."
    )


def test_a_curve_takes_the_protocol_of_most_steps_and_tables_say_nothing_of_it(tmp_path):
    follow(tmp_path, "lcd", steps=(50, 100), protocol_num=512)
    follow(tmp_path, "lcd", steps=(250,))
    results = read(tmp_path)
    (found,) = runs_along(results)
    gold = gold_of(found)
    assert (gold.label, list(found.curve(gold))) == ("Oracle, mean, n = 512", [50, 100])
    assert [(c.metric, c.label) for c in axes_of(results)] == [("hps", "HPS, n = 512"), (gold.metric, gold.label)]
    drawn = training_data(results, Album(0))
    assert drawn["steps"] == [50, 100] and all(len(metric) == 2 for run in drawn["runs"] for metric in run["values"])
    assert not any("512" in text for table in all_tables(results, ()) for text in table.notes)


def test_a_fall_that_the_verdict_does_not_find_says_so(tmp_path):
    make_students(tmp_path, "lcd", {}, range(7))
    make_students(tmp_path, "lrm", HONEST | {"recall_efflite0": -0.1})
    results = read(tmp_path)
    (verdict,) = judge_set(results)
    missed = [each.model_copy(update={"says": ""}) for each in verdict.findings]
    for found, says in ((verdict, False), (verdict.model_copy(update={"findings": missed}), True)):
        (fact,) = [fact for fact in readings(results, [found])[0].facts if fact.startswith("Recall: ▼ −0.100")]
        assert ("not significant" in fact) is says


def test_checkpoints_of_another_sampler_belong_to_no_model(tmp_path):
    follow(tmp_path, steps=(50, 100))
    write_model(tmp_path, "rg_lcd", 0, metrics=FEW, num=32, steps=2, training=(250, 250))
    assert runs_along(read(tmp_path)) == ()


def test_what_the_latent_proxy_is_worth_is_told(tmp_path):
    log = [{"step": step, "pair_accuracy": 0.52 + 0.001 * (step % 3)} for step in range(40)]
    write_model(tmp_path, "lrm", 0, metrics=("hps",), num=4, log=log)
    (found,) = words(read(tmp_path)).values()
    assert re.fullmatch(
        r"The latent proxy orders pairs better than chance: 52\.\d to 52\.\d % of .*, where 50 % is chance\.",
        found.facts[-1],
    )
    (model,) = read(tmp_path).models
    assert proxy_words(model) == found.facts[-1]


def test_a_proxy_at_chance_is_said_to_be_no_better(tmp_path):
    log = [{"step": step, "pair_accuracy": 0.5 + 0.01 * (-1) ** step} for step in range(40)]
    write_model(tmp_path, "lrm", 0, metrics=("hps",), num=4, log=log)
    (model,) = read(tmp_path).models
    assert proxy_words(model).startswith("The latent proxy orders pairs no better than chance: 49.")
