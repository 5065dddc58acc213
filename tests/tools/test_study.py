"""Studies: declared files, units that several workers share, and what results say, against planted truths."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rgbench.core.config import packaged_recipes
from rgbench.core.errors import ConfigError, Interrupted, UsageError
from rgbench.evaluate.results import load_results
from rgbench.judge.models import result_set
from rgbench.metrics.statistics import holm, paired_t
from tests.conftest import ROOT
from tests.results_maker import make_result
from tools.study import analyse, page, plan, work
from tools.study.__main__ import app
from tools.study.analyse import Measured, best_of, find_hump
from tools.study.plan import Unit, load_study, units_of
from tools.study.plan import plan as make_plan

SHIPPED = [ROOT / "recipes" / "study" / f"{name}.yaml" for name in ("strength", "antialias", "best_of_n")]
DECLARED = """
title: "Tiny"
hypotheses: ["more reward, less gold"]
unit: training seed
test: paired t over common training seeds, two-sided
correction: Holm over the secondary contrasts; the primary contrast stands alone
exclusions: [none]
budget: tiny.
tuning: nothing.
base: lcd
"""


def tiny(path: Path, **fields: Any) -> Path:
    """A study's file; ``fields`` are written as they are."""
    given = {
        "arms": "{lcd: {recipe: lcd, seeds: 0-7}, rg_lcd: {recipe: rg_lcd, seeds: 0-5}}",
        "primary": "{metric: gold, model: rg_lcd, base: lcd, expected: down}",
        "eval": "{num: 8, metrics: [hps, oracle, gold_utility], reads: [hps, gold]}",
    }
    path.write_text(DECLARED + "".join(f"{key}: {value}\n" for key, value in {**given, **fields}.items()))
    return path


# Files


def test_the_shipped_studies_share_their_arms_and_fit_the_budget(tmp_path):
    studies = [load_study(path) for path in SHIPPED]
    units = units_of(studies, tmp_path / "runs", tmp_path / "results")
    assert len({unit.name for unit in units}) == len(units)
    before = re.compile(r"(lcd|rg_lcd-share30|lrm-share30)-s[0-5]")
    left = [unit for unit in units if not before.fullmatch(unit.run) or unit.kind == "draws"]
    assert sum(plan.seconds_of(unit, {}) for unit in left) / 3600 / 2 < 8
    assert max(plan.seconds_of(unit, {}) for unit in units) <= 600
    assert all(seed < 100 for study in studies for arm in study.arms for seed in study.seeds(arm)), "tuning seeds"
    assert not any(name.startswith("study/") for name in packaged_recipes())


def test_the_neighbours_share_their_runs_and_are_measured_at_both_steps(tmp_path):
    studies = [load_study(path) for path in sorted((ROOT / "recipes" / "study").glob("*.yaml"))]
    units = units_of(studies, tmp_path / "runs", tmp_path / "results")
    assert len({unit.name for unit in units}) == len(units)
    of_tcd = [unit.steps for unit in units if unit.run == "lrm_tcd-s6" and unit.kind == "eval"]
    assert of_tcd == [4, 2] and [unit.steps for unit in units if unit.name == "eval rg_mlcm-2-s6"] == [2]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"primary": "{metric: gold, model: lrm, base: lcd, expected: down}"}, "no arm 'lrm'"),
        (
            {"arms": "{lcd: {recipe: lcd, seeds: 0-5}, rg_lcd: {recipe: rg_lcd, set: [reward.blur=1], seeds: 0-5}}"},
            "blur",
        ),
        ({"primary": "{metric: gold, model: rg_lcd, base: best_of_n, expected: down}"}, "needs draws"),
        ({"test": "whatever gives a small p"}, "test"),
        ({"arms": "{lcd: {recipe: lcd, seeds: 0-5}, rg_lcd: {recipe: rg_lcd, seeds: 0-5, along: 6}}"}, "along 6"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(tmp_path, fields, what):
    with pytest.raises(ConfigError, match=what):
        load_study(tiny(tmp_path / "a.yaml", **fields))


def test_an_arm_means_one_recipe_in_all_studies(tmp_path):
    other = "{lcd: {recipe: lcd, seeds: 0-5}, rg_lcd: {recipe: rg_lcd, set: [guidance.share=0.5], seeds: 0-5}}"
    studies = [load_study(tiny(tmp_path / "a.yaml")), load_study(tiny(tmp_path / "b.yaml", arms=other))]
    with pytest.raises(UsageError, match="another recipe for rg_lcd-s0"):
        units_of(studies, tmp_path, tmp_path)


OTHER_STEPS = "{lcd: {recipe: lcd, seeds: 0-1, steps: [2]}, rg_lcd: {recipe: rg_lcd, seeds: 0-1, steps: [2]}}"


def test_images_of_other_steps_are_units_of_their_own(tmp_path):
    units = units_of([load_study(tiny(tmp_path / "a.yaml", arms=OTHER_STEPS))], tmp_path / "runs", tmp_path / "results")
    (own, few) = (unit for unit in units if unit.kind == "eval" and unit.run == "lcd-s0")
    assert few.name == "eval lcd-s0 at 2 steps" and few.words[-2:] == ("--steps", "2") and "--steps" not in own.words
    make_result(tmp_path / "results", "lcd-s0", values={"hps": 1.0, "gold_utility": 1.0})
    assert own.is_done() and not few.is_done()
    two = {"steps": 2}
    make_result(tmp_path / "results", "lcd-s0", values={"hps": 1.0, "gold_utility": 1.0}, sampling=two)
    assert few.is_done()


def test_each_number_of_steps_has_a_line_and_a_verdict_of_its_own(tmp_path):
    made(tmp_path / "results", {"lcd": [0.8, 0.8], "rg_lcd": [0.7, 0.7]})
    for seed in (0, 1):
        make_result(
            tmp_path / "results",
            f"rg_lcd-s{seed}",
            values={"hps": 70.0 + seed, "oracle_all": 10.0},
            sampling={"steps": 2},
            recipe_sha256="rg_lcd",
        )
    text = reported(tmp_path, arms=OTHER_STEPS)
    assert "| rg_lcd | 4 | 2 of 2 | 83.4" in text and "| rg_lcd | 2 | 2 of 2 | 70.5" in text
    assert "- lcd at 2 steps: everything of seeds 0, 1" in text and "- lcd: " not in text
    measured = Measured.of(load_study(tmp_path / "a.yaml"), load_results(tmp_path / "results"))
    assert measured.values("rg_lcd", "hps") == {0: 83.0, 1: 83.81}
    assert measured.verdict("rg_lcd") != measured.verdict("rg_lcd", 2)


def test_the_teacher_of_the_arms_stands_in_their_table(tmp_path):
    """That of another world does not, nor a value of another protocol."""
    made(tmp_path / "results", {"lcd": [0.8, 0.8], "rg_lcd": [0.7, 0.7]})
    fifty = {"sampler": "ddim", "steps": 50}
    make_result(tmp_path / "results", "teacher", values={"hps": 75.5, "oracle_all": 62.0}, sampling=fifty)
    make_result(tmp_path / "results", "teacher", values={"hps": 66.6}, sampling=fifty, world="other")
    text = reported(tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| teacher")]
    assert row.startswith("| teacher | 50 | — | 75.50 |") and "66.6" not in text
    make_result(tmp_path / "results", "teacher", values={"hps": 99.9}, sampling=fifty, protocol={"num_prompts": 3})
    assert row in reported(tmp_path)


def test_results_that_are_there_are_not_made_again(tmp_path):
    units = units_of([load_study(tiny(tmp_path / "a.yaml"))], tmp_path / "runs", tmp_path / "results")
    make_result(tmp_path / "results", "lcd-s0", values={"hps": 1.0, "gold_utility": 1.0})
    make_result(tmp_path / "results", "lcd-s1", values={"hps": 1.0})
    found = make_plan(units, [])
    assert {unit.run for unit in units} - {unit.run for unit in found.left} == {"lcd-s0"}
    assert {"train lcd-s1", "eval lcd-s1"} <= {unit.name for unit in found.left}, "half of what is read is not there"


# Workers


@dataclass(frozen=True)
class Task(Unit):
    """A unit that a short Python program does: it makes a file at ``place``."""

    def is_done(self) -> bool:
        return self.place.exists()


def task(folder: Path, name: str, code: str = "", needs: tuple[str, ...] = ()) -> Task:
    begun = f"open({str(folder / 'begun')!r}, 'a').write({name!r} + chr(10))"
    end = f"open({str(folder / name)!r}, 'w').close()"
    words = ("-c", "\n".join([begun, code, end]))
    return Task(f"eval {name}", "eval", name, words, folder / name, ("lcd",), needs)


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """Units run Python without its site packages; workers look often."""
    monkeypatch.setattr(work, "PROGRAM", (sys.executable, "-S"))
    monkeypatch.setattr(work, "LOOK_SEC", 0.05)


def do(units: list[Task], folder: Path, retry: bool = False) -> plan.Plan:
    return work.work(units, folder / "locks", folder / "records", retry, lambda line: None)


def begun(folder: Path) -> list[str]:
    return (folder / "begun").read_text().split() if (folder / "begun").exists() else []


def started(units: list[Task], folder: Path) -> multiprocessing.Process:
    worker = multiprocessing.get_context("fork").Process(target=do, args=(units, folder))
    worker.start()
    return worker


def until(reached: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.01)


def test_workers_share_the_units_and_do_none_twice(tmp_path):
    units = [task(tmp_path, f"u{i}", "import time; time.sleep(0.05)") for i in range(8)]
    workers = [started(units, tmp_path) for _ in range(3)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(begun(tmp_path)) == sorted(unit.run for unit in units)
    records = work.read_records(tmp_path / "records").units
    assert {record.status for record in records.values()} == {"finished"} and len(records) == len(units)


def test_what_a_unit_needs_comes_first(tmp_path):
    first = task(tmp_path, "train")
    do([task(tmp_path, "later", needs=(first.name,)), first], tmp_path)
    assert begun(tmp_path) == ["train", "later"]


def test_a_failed_unit_is_listed_and_left_alone(tmp_path):
    bad = task(tmp_path, "bad", f"raise SystemExit({str(tmp_path)!r} + ' has no disk left')")
    units = [bad, task(tmp_path, "waits", needs=(bad.name,)), task(tmp_path, "good")]
    found = do(units, tmp_path)
    assert [unit.run for unit in found.failed] == ["bad", "waits"] and [unit.run for unit in found.done] == ["good"]
    record = work.read_records(tmp_path / "records").units["eval bad"]
    assert record.status == "failed" and record.error.endswith("has no disk left")
    assert any("eval bad: failed" in line for line in work.describe(found, {}, 2))
    do(units, tmp_path)
    assert begun(tmp_path).count("bad") == 1, "not tried again"
    do(units, tmp_path, retry=True)
    assert begun(tmp_path).count("bad") == 2, "but once, when asked for"


def test_a_unit_that_leaves_nothing_has_failed(tmp_path):
    empty = task(tmp_path, "empty", "raise SystemExit(0)")
    found = do([empty], tmp_path)
    assert [unit.run for unit in found.failed] == ["empty"]
    assert "not all of it is in" in work.read_records(tmp_path / "records").units["eval empty"].error


def test_a_killed_worker_loses_its_unit_alone(tmp_path):
    pid, gate = tmp_path / "pid", tmp_path / "gate"
    code = f"""
import os, time
open({str(pid)!r}, "w").write(str(os.getpid()))
while not os.path.exists({str(gate)!r}):
    time.sleep(0.01)
"""
    units = [task(tmp_path, "first"), task(tmp_path, "slow", code), task(tmp_path, "last")]
    worker = started(units, tmp_path)
    until(lambda: pid.exists() and pid.read_text())
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join(60)
    lock = tmp_path / "locks" / "eval-slow.lock"
    with work.locked(lock, wait=True):  # as long as its process lives, the unit is taken
        until(lambda: not is_running(int(pid.read_text())))  # it ends with its worker; files are closed before
    gate.touch()
    do(units, tmp_path)
    assert begun(tmp_path) == ["first", "slow", "slow", "last"]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_stopped_worker_stops_its_unit_and_keeps_its_time(tmp_path):
    again = tmp_path / "again"
    slow = task(tmp_path, "slow", f"import os, time; time.sleep(0.2 if os.path.exists({str(again)!r}) else 60)")
    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(Interrupted) as caught:
            begins = lambda line: signal.setitimer(signal.ITIMER_REAL, 0.3)  # noqa: E731
            work.work([slow], tmp_path / "locks", tmp_path / "records", False, begins)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert caught.value.exit_code == 75
    before = work.read_records(tmp_path / "records").units["eval slow"]
    assert before.status == "stopped" and before.wall_sec >= 0.2
    again.touch()
    do([slow], tmp_path)
    after = work.read_records(tmp_path / "records").units["eval slow"]
    assert after.status == "finished" and after.wall_sec >= before.wall_sec + 0.2


def test_the_time_left_comes_from_what_was_measured(tmp_path):
    units = [task(tmp_path, f"u{i}") for i in range(3)]
    lines = work.describe(make_plan(units, []), {"eval": [3600.0, 7200.0]}, workers=2)
    assert lines[-1] == "0 units done, 3 left, 0 failed: 4.5 h of one thread, 2.2 h with 2"


# What results say


def curve(peak: float, noise: float, seed: int, num: int = 6) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Strengths, rewards and golds of a parabola over the reward, with luck that all arms of a seed share and own."""
    rng = np.random.default_rng(seed)
    strengths = [0.0, 0.15, 0.3, 0.5, 0.75]
    rewards = np.arange(5.0)[:, None] + 0.1 * rng.standard_normal((5, num))
    golds = 0.8 - 0.01 * (rewards - peak) ** 2 + noise * (rng.standard_normal(num) + rng.standard_normal((5, num)))
    return strengths, rewards, golds


def test_a_planted_hump_is_found_where_it_is():
    found = find_hump(*curve(peak=2.0, noise=0.004, seed=0))
    assert found.is_shown and found.strengths[found.peak] == 0.3 and found.places[2] > 0.9
    assert found.reward[1] < 2 < found.reward[2] or abs(found.reward[0] - 2) < 0.1
    for value, low, high in (found.rise, found.fall):
        assert low < 0.04 < high and abs(value - 0.04) < 0.01


def test_without_a_hump_none_is_shown():
    rising = [find_hump(*curve(peak=4.0, noise=0.004, seed=s)) for s in range(20)]
    assert not any(found.is_shown for found in rising) and all(found.peak >= 3 for found in rising)
    rng = np.random.default_rng(0)
    flat = [find_hump([0, 1, 2, 3, 4], np.ones((5, 6)), rng.standard_normal((5, 6))) for _ in range(300)]
    assert sum(found.is_shown for found in flat) / 300 <= 0.05
    picked = np.mean([found.golds[found.peak] - found.golds[0] for found in flat])
    crossed = np.mean([found.rise[0] for found in flat])
    assert abs(crossed) < 0.1 < picked, "the seeds that choose an arm do not say what it reaches"


def test_a_hump_takes_three_arms_and_seeds():
    with pytest.raises(ValueError, match="no hump"):
        find_hump([0, 1, 2], np.ones((3, 2)), np.ones((3, 2)))


def test_the_best_of_n_by_hand():
    rewards, golds = np.array([[1.0, 3.0, 2.0], [5.0, 5.5, 9.0]]), np.array([[0.0, 1.0, 5.0], [1.0, 1.0, 4.0]])
    found = best_of(rewards, golds)
    # subsets of two, prompt 1: {1,3} → 3/1, {1,2} → 2/5, {3,2} → 3/1; prompt 2: {5,5.5} → 5.5/1, twice 9/4
    two = np.array([(3 + 2 + 3) / 3, (5.5 + 9 + 9) / 3]), np.array([(1 + 5 + 1) / 3, (1 + 4 + 4) / 3])
    for each, pair, scores in zip((found.rewards, found.golds), two, (rewards, golds), strict=True):
        picked = scores[[0, 1], [1, 2]].mean()
        assert each == pytest.approx([0, pair.mean() - scores.mean(), picked - scores.mean()])
    middle = found.rewards[1:].mean()
    assert found.at(middle) == pytest.approx((found.golds[1:].mean(), 2.5))
    assert found.at(99.0) == (found.golds[2], 3) and found.at(-1.0) == (0, 1)


GOLDS = {"lcd": [0.80, 0.82, 0.79, 0.81, 0.80, 0.83, 0.81, 0.80], "rg_lcd": [0.70, 0.73, 0.68, 0.72, 0.69, 0.71]}


def made(root: Path, golds: dict[str, list[float]] = GOLDS) -> None:
    for arm, values in golds.items():
        for seed, gold in enumerate(values):
            reward = 80 + 0.01 * seed + (3 + 0.8 * (seed % 3) if arm != "lcd" else 0)
            own = {"hps": reward, "hps_no_antialias": reward, "oracle_all": 100 * gold}
            make_result(
                root, f"{arm}-s{seed}", "rg_lcd" if arm != "lcd" else "lcd", seed, values=own, recipe_sha256=arm
            )


def test_contrasts_pair_seeds_and_correct_the_secondary_ones(tmp_path):
    reward = "{metric: hps, model: rg_lcd, base: lcd, expected: down}"
    secondary = f"[{reward}, {reward.replace('hps', 'fd_efflite0')}]"
    study = load_study(tiny(tmp_path / "a.yaml", secondary=secondary))
    made(tmp_path / "results")
    measured = Measured.of(study, load_results(tmp_path / "results"))
    primary, reward, missing = analyse.run_contrasts(measured)
    p = paired_t([100 * x for x in GOLDS["rg_lcd"]], [100 * x for x in GOLDS["lcd"][:6]])
    assert primary.seeds == (0, 1, 2, 3, 4, 5) and primary.says == "as expected"
    assert primary.value == pytest.approx(100 * np.mean(np.subtract(GOLDS["rg_lcd"], GOLDS["lcd"][:6])))
    assert primary.adjusted == primary.p == pytest.approx(p)
    assert reward.p is not None and reward.p > 1e-6
    assert reward.says == "the opposite" and reward.adjusted == pytest.approx(holm([reward.p, 1.0])[0])
    assert missing.says == "missing" and missing.value is None


def test_an_interaction_is_a_difference_of_differences(tmp_path):
    arms = f"{{{', '.join(f'{name}: {{recipe: lcd, seeds: 0-5}}' for name in ('lcd', 'rg_lcd', 'a', 'b'))}}}"
    primary = "{metric: gold, model: rg_lcd, base: lcd, minus: [a, b], expected: either}"
    study = load_study(tiny(tmp_path / "a.yaml", arms=arms, primary=primary))
    golds = {**GOLDS, "a": [0.5] * 5, "b": [0.4, 0.4, 0.4, 0.4, 0.3]}
    made(tmp_path / "results", golds)
    (found,) = analyse.run_contrasts(Measured.of(study, load_results(tmp_path / "results")))
    wanted = np.array(GOLDS["rg_lcd"][:5]) - GOLDS["lcd"][:5] - (np.array(golds["a"]) - golds["b"])
    assert found.value == pytest.approx(100 * wanted.mean()) and found.p is None and found.says == "no test"


def test_a_value_measured_twice_is_refused(tmp_path):
    study = load_study(tiny(tmp_path / "a.yaml"))
    make_result(tmp_path, "lcd-s0", values={"hps": 1.0}, weights="one")
    make_result(tmp_path, "lcd-s0", values={"hps": 2.0}, weights="two")
    with pytest.raises(UsageError, match="lcd-s0: hps of the same images was measured twice"):
        Measured.of(study, load_results(tmp_path))
    other = load_study(
        tiny(tmp_path / "b.yaml", arms="{lcd: {recipe: lcd, seeds: 1-2}, rg_lcd: {recipe: rg_lcd, seeds: 1-2}}")
    )
    make_result(tmp_path, "lcd-s1", values={"hps": 1.0})
    make_result(tmp_path, "lcd-s2", values={"hps": 1.0}, protocol={"prompts": {"num": 8, "sha256": "others"}})
    with pytest.raises(UsageError, match="hps was measured under two protocols"):
        Measured.of(other, load_results(tmp_path))


def test_seeds_of_lcd_that_nothing_is_compared_with_show_the_rules_errors(tmp_path):
    study = load_study(tiny(tmp_path / "a.yaml"))
    made(tmp_path)
    found = Measured.of(study, load_results(tmp_path))
    assert found.errors().keys() == {6, 7} and "over-optimised" not in found.errors().values()
    made(tmp_path / "hacked", {**GOLDS, "lcd": GOLDS["lcd"][:6]})
    make_result(tmp_path / "hacked", "lcd-s6", "lcd", 6, values={"hps": 99.0, "oracle_all": 30.0}, recipe_sha256="lcd")
    hacked = Measured.of(study, load_results(tmp_path / "hacked"))
    assert hacked.errors() == {6: "over-optimised"}, "one that is hacked would be called so"


def best_of_results(root: Path) -> None:
    """LCD with three images of each of eight prompts; a student that gains half of what the best of three gains."""
    rng = np.random.default_rng(0)
    for seed in range(6):
        rewards, golds = rng.standard_normal((3, 8)), rng.standard_normal((3, 8))
        one = {"hps": rewards[0], "oracle_all": golds[0]}
        make_result(root, f"lcd-s{seed}", "lcd", seed, rows=one, recipe_sha256="lcd", weights=f"w{seed}")
        draws = {"hps": rewards.T.ravel(), "oracle_all": golds.T.ravel()}
        make_result(
            plan.draws_beside(root),
            f"lcd-s{seed}",
            "lcd",
            seed,
            rows=draws,
            recipe_sha256="lcd",
            weights=f"w{seed}",
            per_prompt=3,
            protocol={"seeds": [0, 1, 2]},
        )
        gain = best_of(rewards.T, golds.T).rewards[2] / 2
        student = {"hps": rewards[0] + gain, "oracle_all": golds[0] - 1}
        make_result(root, f"rg_lcd-s{seed}", "rg_lcd", seed, rows=student, recipe_sha256="rg_lcd")


def test_a_student_is_held_against_the_best_of_n_at_its_reward(tmp_path):
    fields = {
        "primary": "{metric: gold, model: rg_lcd, base: best_of_n, expected: down}",
        "draws": "{num: 8, seeds: 0-2, metrics: [hps, oracle], reads: [hps, gold]}",
        "arms": "{lcd: {recipe: lcd, seeds: 0-5}, rg_lcd: {recipe: rg_lcd, seeds: 0-5}}",
    }
    study = load_study(tiny(tmp_path / "a.yaml", **fields))
    best_of_results(tmp_path / "results")
    found = (load_results(folder) for folder in (tmp_path / "results", plan.draws_beside(tmp_path / "results")))
    measured = Measured.of(study, *found)
    assert len(measured.set.find("lcd")[0].results) == 6, "draws are no second result of a seed"
    matched = analyse.match_best_of_n(measured, "rg_lcd")
    for seed, choice in analyse.choices(measured).items():
        assert matched[seed].reward == pytest.approx(choice.rewards[2] / 2) and matched[seed].gold == pytest.approx(-1)
        assert matched[seed].best_gold == pytest.approx(choice.at(choice.rewards[2] / 2)[0])
        assert 1 < matched[seed].n < 3 and not matched[seed].is_beyond
    (found,) = analyse.run_contrasts(measured)
    assert found.value == pytest.approx(np.mean([each.gold - each.best_gold for each in matched.values()]))


# The page


PAGE = "# Tiny\n\n<!-- a: begin -->\nstale\n<!-- a: end -->\n\nby hand\n\n<!-- cost: begin -->\n<!-- cost: end -->\n"


def reported(folder: Path, **fields: Any) -> str:
    study, place = tiny(folder / "a.yaml", **fields), folder / "page.md"
    place.write_text(PAGE)
    page.write_page([study], folder / "results", folder / "records", place)
    return place.read_text()


def test_the_page_says_what_came_and_what_is_missing(tmp_path):
    made(tmp_path / "results")
    name = tmp_path / "results" / "benchtop" / "rg_lcd-s5"
    name.rename(tmp_path / "gone")
    curves = "[{name: direct, arms: {0: lcd, 0.3: rg_lcd}}]"
    text = reported(tmp_path, curves=curves)
    assert "stale" not in text and "by hand" in text and "more reward, less gold" in text
    assert "- rg_lcd: everything of seeds 5" in text and "Too few results for a hump" in text
    assert "| primary | rg_lcd − lcd, Oracle, all right | 5 |" in text.replace("All right", "Oracle, all right")
    assert "| rg_lcd | 4 | 5 of 6 | 83.66" in text and "0 of 2 called over-optimised" in text
    assert "](page/a.svg)" in text
    before = (tmp_path / "page" / "a.svg").read_bytes()
    assert reported(tmp_path, curves=curves) == text and (tmp_path / "page" / "a.svg").read_bytes() == before


def test_a_page_counts_the_units_of_its_own_studies(tmp_path):
    cost = {"status": "finished", "wall_sec": 7200, "cpu_sec": 3600, "pays": "lcd", "command": "", "ended": ""}
    (tmp_path / "records").mkdir()
    kept = {"schema_version": 1, "units": {"train lcd-s0": cost, "train tcd-s0": cost}}
    (tmp_path / "records" / "units.json").write_text(json.dumps(kept))
    assert "1.0 h of CPU in 1 units" in reported(tmp_path)


def test_a_page_without_results_says_so(tmp_path):
    text = reported(tmp_path)
    assert "missing" in text and "- lcd: everything of seeds 0, 1, 2, 3, 4, 5, 6, 7" in text and ".svg" not in text
    with pytest.raises(UsageError, match="lacks the markers <!-- b: begin"):
        page.write_page([tiny(tmp_path / "b.yaml")], tmp_path / "results", tmp_path, tmp_path / "page.md")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_study_from_its_file_to_its_page(tmp_path, monkeypatch, fork_server):
    """Two arms, two seeds, two steps: trained, measured, drawn, reported; nothing is done again."""
    monkeypatch.setattr(work, "PROGRAM", (str(fork_server.folder / "rgbench"),))
    monkeypatch.chdir(tmp_path)
    fields = {
        "arms": "{lcd: {recipe: lcd, seeds: 0-1, along: 1}, rg_lcd: {recipe: rg_lcd, seeds: 0-1}}",
        "common": "[train.steps=2, train.batch_size=2, train.sample_every=0, train.save_every=1]",
        "eval": "{num: 16, metrics: [hps, oracle, gold_utility, spectrum], reads: [hps, gold, band_db]}",
        "along": "{num: 8, metrics: [hps, gold_utility], reads: [hps, gold], set: [train.keep_checkpoints=2]}",
        "draws": "{num: 8, seeds: 0-1, metrics: [hps, gold_utility], reads: [hps, gold]}",
    }
    tiny(Path("a.yaml"), **fields)
    Path("page.md").write_text(PAGE)
    runner = CliRunner()
    dry = runner.invoke(app, ["run", "a.yaml", "--dry-run"])
    assert dry.exit_code == 0 and "0 units done, 11 left, 0 failed" in dry.output
    done = runner.invoke(app, ["run", "a.yaml"])
    assert done.exit_code == 0, (done.output, [log.read_text()[-2000:] for log in Path("runs/.units").glob("*.log")])
    assert "11 units done, 0 left, 0 failed" in done.output
    files = {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()}
    runner.invoke(app, ["run", "a.yaml"])
    assert files == {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()}
    assert {len(model.results) for model in result_set(load_results(Path("results"))).models} == {2}
    shown = runner.invoke(app, ["report", "a.yaml", "--page", "page.md"])
    assert shown.exit_code == 0, shown.output
    text = Path("page.md").read_text()
    assert "LCD, best of 2" in text and "No unit failed" in text and "11 units" in text
    assert json.loads(Path("results/study/units.json").read_text())["units"]["train lcd-s0"]["wall_sec"] > 0
