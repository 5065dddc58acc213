"""Curves from results: hack step, best-of-n equivalence, Pareto front."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rgbench.core.errors import UsageError
from rgbench.data.prompts import benchtop_prompts, load_prompts, without_copy
from rgbench.evaluate.results import Result, load_results
from rgbench.judge.paired import deterioration
from rgbench.judge.trajectory import (
    equivalent_n,
    expected_maxima,
    find_hack,
    gold_curves,
    kl_best_of,
    pareto_front,
    pareto_points,
)
from tests.results_maker import make, put

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=48)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Of each test, alone or after others."""
    RNG.bit_generator.state = START


def test_expected_maximum_is_the_mean_over_all_subsets():
    scores = RNG.normal(size=(2, 7))
    found = expected_maxima(scores)
    for n in range(1, 8):
        by_hand = [np.mean([max(chosen) for chosen in combinations(row, n)]) for row in scores]
        np.testing.assert_allclose(found[:, n - 1], by_hand, rtol=1e-12)


def test_expected_maximum_of_normals_is_the_known_one():
    found = expected_maxima(RNG.normal(size=(4000, 64))).mean(0)
    for n, known in ((1, 0.0), (4, 1.0294), (16, 1.7660), (64, 2.3437)):
        assert found[n - 1] == pytest.approx(known, abs=0.03)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_equivalent_n_finds_the_n_that_made_the_reward(n):
    draws = RNG.normal(size=(3000, 32))
    best = RNG.normal(size=(3000, n)).max(1)
    found = equivalent_n(draws, best)
    assert found.n is not None and abs(found.n - n) <= 1 + n // 8
    assert found.low <= n <= found.high + 1
    assert found.kl == kl_best_of(found.n) == pytest.approx(math.log(found.n) - (found.n - 1) / found.n)


def test_a_reward_out_of_reach_is_censored():
    found = equivalent_n(RNG.normal(size=(50, 8)), np.full(50, 9.0))
    assert found.n is None and found.kl is None and str(found) == "> 8" and found.high is None
    assert str(equivalent_n(np.zeros((5, 8)), np.full(5, -1.0))) == "1"
    with pytest.raises(ValueError, match="5 and 4 prompts"):
        equivalent_n(np.zeros((5, 8)), np.zeros(4))


def test_the_front_is_what_nothing_beats():
    rewards, distances = [3, 2, 1, 3, 2], [3, 1, 2, 4, 1]
    assert pareto_front(rewards, distances) == [True, True, False, False, True], "equals share the front"


def checkpoints(root, model: str, gold: dict[int, float]) -> None:
    for step, shift in gold.items():
        given = {"step": step, "steps": max(gold)}
        put(root, model, "oracle_mean", rows=BASE + shift + 0.01 * RNG.normal(size=48), **given)
        put(root, model, "hps_aa0", rows=BASE + step / 10 + 0.01 * RNG.normal(size=48), **given)


def test_the_hack_step_is_where_gold_peaks_while_the_reward_rises(tmp_path, cli):
    results = tmp_path / "results"
    checkpoints(results, "rg_lcd-s0", {10: 0.0, 20: 1.0, 30: 0.4, 40: 0.2})
    checkpoints(results, "lrm-s0", {10: 0.0, 20: 0.5, 30: 1.0})
    checkpoints(results, "lrm-s1", {10: 0.0, 20: 1.0, 30: 0.9})
    loose = np.where(np.arange(48) // 2 % 2, 0.8, -0.8)
    put(results, "lrm-s1", "oracle_mean", rows=BASE + 0.9 + loose, step=30, steps=30)
    curves = {curve.model: curve for curve in gold_curves(load_results(results))}
    hacked = curves["rg_lcd-s0"]
    assert (hacked.peak, hacked.hack.step, hacked.hack.last) == (20, 20, 40) and hacked.steps == (10, 20, 30, 40)
    assert (hacked.hack.first, hacked.hack.end) == (20, 20) and not hacked.hack.censored
    assert hacked.hack.loss.value == pytest.approx(0.8, abs=0.02) and hacked.hack.loss.basis == "images"
    assert hacked.hack.gain.value == pytest.approx(2, abs=0.02)
    assert (hacked.gold[0], hacked.proxy[0]) == ("oracle_mean", "hps_aa0")
    assert curves["lrm-s0"].hack is None and curves["lrm-s0"].peak == 30
    assert curves["lrm-s1"].hack is None, "a fall that the interval does not part from none"
    done = cli("probes", "gold", results)
    assert "rg_lcd-s0\t20\thps_aa0" in done.stdout and done.stdout.count("hack step") == 1


def curve(metric: str, values: list[float], half: float) -> dict[int, Result]:
    return {i: make("rg_lcd-s0", metric, value, half=half, step=i) for i, value in enumerate(values)}


def test_gold_that_stays_the_same_is_seldom_called_a_hack_though_its_peak_is_picked():
    rng, num_runs, steps = np.random.default_rng(1), 400, 10
    rising = curve("hps_aa0", list(range(steps)), 0.1)
    golds = [curve("oracle_mean", list(rng.normal(size=steps)), 1.96) for _ in range(num_runs)]
    peaks = [max(gold, key=lambda step: gold[step].value) for gold in golds]
    falls = [deterioration(gold[steps - 1], gold[peak]) for gold, peak in zip(golds, peaks, strict=True)]
    assert sum(fall.clear_of(0) for fall in falls) > 0.08 * num_runs, "the 95 % interval of a picked peak is too short"
    assert sum(find_hack(gold, rising) is not None for gold in golds) <= 0.025 * num_runs


def test_the_stretch_around_the_peak_holds_what_is_not_clearly_worse():
    rising = curve("hps_aa0", [0, 1, 2, 3, 4, 5], 0.1)
    hack = find_hack(curve("oracle_mean", [0.0, 9.0, 10.0, 9.5, 9.2, 0.0], 1.0), rising)
    assert (hack.step, hack.first, hack.end, hack.last, hack.censored) == (2, 1, 4, 5, False)
    assert find_hack(curve("oracle_mean", [9.9, 9.0, 10.0, 3.0, 0.0, 9.9], 1.0), rising) is None
    early = find_hack(curve("oracle_mean", [10.0, 9.0, 3.0, 3.0, 2.0, 1.0], 1.0), rising)
    assert (early.step, early.first, early.end, early.censored) == (0, 0, 1, True)


def test_a_reward_that_does_not_clearly_rise_after_golds_peak_is_no_hack():
    falling = curve("oracle_mean", [0.0, 10.0, 5.0, 0.0], 1.0)
    assert find_hack(falling, curve("hps_aa0", [0, 1, 2, 3], 0.1)).step == 1
    assert find_hack(falling, curve("hps_aa0", [0, 3, 2, 1], 0.1)) is None
    assert find_hack(falling, curve("hps_aa0", [0, 1, 2, 3], 3.0)) is None
    two = {step: falling[step] for step in (1, 3)}
    assert find_hack(two, curve("hps_aa0", [0, 1, 2, 3], 0.1)) is None, "of two steps one is always the better"


def test_without_checkpoints_the_way_is_said(tmp_path, cli):
    put(tmp_path, "rg_lcd-s0", "oracle_mean", rows=BASE)
    put(tmp_path, "rg_lcd-s0", "hps_aa0", rows=BASE)
    with pytest.raises(UsageError, match="evaluate its checkpoints: rgbench eval RUN --checkpoints"):
        gold_curves(load_results(tmp_path))


def test_best_of_n_reads_the_rows_of_several_seeds(tmp_path, cli):
    results = tmp_path / "results"
    draws = RNG.normal(size=(200, 16))
    put(results, "teacher", "hps_aa0", rows=draws.ravel(), per_prompt=16)
    put(results, "rg_lcd-s0", "hps_aa0", rows=RNG.normal(size=(200, 4)).max(1))
    done = cli("probes", "best-of-n", "rg_lcd-s0", results, "--base", "teacher", "--reward", "hps_aa0", "--json")
    assert done.returncode == 0, done.stderr
    assert '"best of n": "4"' in done.stdout or '"best of n": "3"' in done.stdout or '"best of n": "5"' in done.stdout
    assert '"prompts": "200"' in done.stdout
    put(results, "lcd-s1", "hps_aa0", rows=draws.ravel(), per_prompt=16, copies=True)
    again = cli("probes", "best-of-n", "rg_lcd-s0", results, "--base", "lcd-s1", "--reward", "hps_aa0", "--json")
    assert again.stdout == done.stdout.replace("teacher", "lcd-s1"), "copies of a prompt are as good as seeds"
    put(results, "lcd-s0", "hps_aa0", rows=RNG.normal(size=200))
    done = cli("probes", "best-of-n", "rg_lcd-s0", results, "--base", "lcd-s0", "--reward", "hps_aa0")
    assert (
        done.returncode == 2 and "needs several images of each prompt of lcd-s0 and rg_lcd-s0, found 1" in done.stderr
    )
    done = cli("probes", "best-of-n", "rg_ldc-s0", results, "--base", "teacher")
    assert done.returncode == 2 and "did you mean 'rg_lcd-s0'" in done.stderr


def test_copies_of_a_prompt_are_draws_of_it(tmp_path, cli):
    done = cli("probes", "repeat-prompts", "lists/twice.jsonl", "--times", "3", "--num", "2")
    assert done.returncode == 0 and done.stdout.strip() == "lists/twice.jsonl"
    copies, base = load_prompts("lists/twice.jsonl").prompts, benchtop_prompts(2).prompts
    assert [prompt.id for prompt in copies] == [f"test/{i}#{k}" for i in range(2) for k in range(3)]
    assert [(p.text, p.group, p.scene) for p in copies[::3]] == [(p.text, p.group, p.scene) for p in base]
    assert without_copy("a#1/b#12") == "a#1/b" and without_copy("test/3") == "test/3"
    done = cli("probes", "repeat-prompts", "lists/twice.jsonl")
    assert done.returncode == 2 and "exists already" in done.stderr
    Path("own.txt").write_text("a cat\na dog\n")
    assert cli("probes", "repeat-prompts", "own.jsonl", "--prompts", "own.txt").returncode == 0
    assert len(load_prompts("own.jsonl")) == 16
    done = cli("probes", "repeat-prompts", "own.txt")
    assert done.returncode == 2 and "written as .jsonl" in done.stderr


def test_pareto_marks_the_front_and_refuses_two_protocols(tmp_path, cli):
    results = tmp_path / "results"
    for model, reward, distance in (("lcd-s0", 1.0, 5.0), ("rg_lcd-s0", 3.0, 9.0), ("lrm-s0", 2.0, 9.5)):
        put(results, model, "hps_aa1", reward)
        put(results, model, "fd_efflite0", distance)
    points = pareto_points(load_results(results), "hps_aa1", "fd_efflite0")
    assert [(p.model, p.on_front) for p in points] == [("rg_lcd-s0", True), ("lrm-s0", False), ("lcd-s0", True)]
    done = cli("probes", "pareto", results)
    assert done.returncode == 0 and done.stdout.count("front") == 2
    put(results, "lcd-s0", "hps_aa1", 1.0, version=2)
    done = cli("probes", "pareto", results)
    assert done.returncode == 2 and "hps_aa1 is here under 2 protocols" in done.stderr
    done = cli("probes", "pareto", results, "--reward", "nothing")
    assert done.returncode == 2 and "no model here has both nothing and fd_efflite0" in done.stderr
