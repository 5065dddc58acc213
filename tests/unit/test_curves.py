"""Runs along their steps: hack step, one protocol a curve; best-of-n equivalence; Pareto front."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rgbench.data.prompts import benchtop_prompts, load_prompts, without_copy
from rgbench.judge.models import Column, load_result_sets, result_set
from rgbench.judge.paired import run_delta
from rgbench.judge.trajectory import (
    Hack,
    TrainingRun,
    equivalent_n,
    expected_maxima,
    find_hack,
    pareto_front,
    pareto_points,
    training_runs,
)
from rgbench.metrics.statistics import kl_best_of
from tests.results_maker import make_result

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


def checkpoints(root: Path, model: str, gold: dict[int, float], steps: int | None = None) -> None:
    for step, shift in gold.items():
        rows = {"oracle_mean": BASE + shift, "hps_no_antialias": BASE + step / 10}
        noisy = {name: values + 0.01 * RNG.normal(size=48) for name, values in rows.items()}
        make_result(root, model, rows=noisy, step=step, steps=steps or max(gold))


def runs(root: Path) -> dict[str, TrainingRun]:
    return {run.name: run for found in load_result_sets(root) for run in training_runs(found)}


def test_the_hack_step_is_where_gold_peaks_while_the_reward_rises(tmp_path, cli):
    results = tmp_path / "results"
    checkpoints(results, "rg_lcd-s0", {10: 0.0, 20: 1.0, 30: 0.4, 40: 0.2})
    checkpoints(results, "lrm-s0", {10: 0.0, 20: 0.5, 30: 1.0})
    checkpoints(results, "lrm-s1", {10: 0.0, 20: 1.0, 30: 0.9})
    loose = np.where(np.arange(48) // 2 % 2, 0.8, -0.8)
    make_result(results, "lrm-s1", rows={"oracle_mean": BASE + 0.9 + loose}, step=30, steps=30)
    found = runs(results)
    hacked = found["rg_lcd-s0"]
    (gold,) = hacked.golds
    hack = hacked.hack(gold)
    assert (hack.step, hack.first, hack.end, hack.last, hack.censored) == (20, 20, 20, 40, False)
    assert list(hacked.points) == [10, 20, 30, 40] and hacked.model.names == ("rg_lcd-s0",)
    assert hack.loss.better == pytest.approx(-0.8, abs=0.02) and hack.loss.basis == "images"
    assert hack.gain.value == pytest.approx(2, abs=0.02)
    assert (gold.metric, hacked.proxy.metric) == ("oracle_mean", "hps_no_antialias")
    assert found["lrm-s0"].hack(gold) is None, "gold is best at the end"
    assert found["lrm-s1"].hack(gold) is None, "a fall that the interval does not part from none"
    done = cli("probes", "gold", results)
    assert "rg_lcd-s0\t20\tHPS, no antialias" in done.stdout and done.stdout.count("hack step") == 1


def test_checkpoints_of_another_protocol_or_sampler_are_not_joined(tmp_path):
    for step in (50, 100):
        make_result(tmp_path, "rg_lcd-s0", values={"hps": 1.0, "oracle_mean": 1.0}, step=step, steps=200)
    make_result(tmp_path, "rg_lcd-s0", values={"hps": 2.0}, protocol={"version": 2}, step=150, steps=200)
    make_result(tmp_path, "rg_lcd-s0", values={"hps": 3.0}, sampling={"steps": 2}, step=200, steps=200)
    (run,) = runs(tmp_path).values()
    (hps,) = (
        c for c in load_result_sets(tmp_path)[0].columns if c.metric == "hps" and "version" not in c.protocol.fields
    )
    assert list(run.points) == [50, 100, 150] and run.curve(hps) == {50: 1.0, 100: 1.0} and run.model is None


def columns() -> tuple[Column, Column]:
    found = result_set([make_result(None, "rg_lcd-s0", values={"hps_no_antialias": 1.0, "oracle_mean": 1.0})])
    gold, proxy = found.column("oracle_mean"), found.column("hps_no_antialias")
    assert gold is not None and proxy is not None
    return gold, proxy


def points(golds: list[float], proxies: list[float], half: tuple[float, float] = (1.0, 0.1)) -> dict:
    widths = dict(zip(("oracle_mean", "hps_no_antialias"), half, strict=True))
    return {
        i: make_result(None, "rg_lcd-s0", values={"oracle_mean": g, "hps_no_antialias": p}, half=widths, step=i)
        for i, (g, p) in enumerate(zip(golds, proxies, strict=True))
    }


def hack_of(golds: list[float], proxies: list[float], half: tuple[float, float] = (1.0, 0.1)) -> Hack | None:
    return find_hack(points(golds, proxies, half), *columns())


def test_gold_that_stays_the_same_is_seldom_called_a_hack_though_its_peak_is_picked():
    rng, num_runs, steps = np.random.default_rng(1), 400, 10
    gold, proxy = columns()
    made = [points(list(rng.normal(size=steps)), list(range(steps)), (1.96, 0.1)) for _ in range(num_runs)]
    peaks = [max(run, key=lambda step: run[step].by_key[gold.key].value) for run in made]
    falls = [run_delta(run[steps - 1], run[peak], gold) for run, peak in zip(made, peaks, strict=True)]
    assert sum(fall.is_worse for fall in falls) > 0.08 * num_runs, "the 95 % interval of a picked peak is too short"
    assert sum(find_hack(run, gold, proxy) is not None for run in made) <= 0.025 * num_runs


def test_the_stretch_around_the_peak_holds_what_is_not_clearly_worse():
    hack = hack_of([0.0, 9.0, 10.0, 9.5, 9.2, 0.0], [0, 1, 2, 3, 4, 5])
    assert (hack.step, hack.first, hack.end, hack.last, hack.censored) == (2, 1, 4, 5, False)
    assert hack_of([9.9, 9.0, 10.0, 3.0, 0.0, 9.9], [0, 1, 2, 3, 4, 5]) is None
    early = hack_of([10.0, 9.0, 3.0, 3.0, 2.0, 1.0], [0, 1, 2, 3, 4, 5])
    assert (early.step, early.first, early.end, early.censored) == (0, 0, 1, True)


def test_a_reward_that_does_not_clearly_rise_after_golds_peak_is_no_hack():
    falling = [0.0, 10.0, 5.0, 0.0]
    assert hack_of(falling, [0, 1, 2, 3]).step == 1
    assert hack_of(falling, [0, 3, 2, 1]) is None
    assert hack_of(falling, [0, 1, 2, 3], (1.0, 3.0)) is None
    assert hack_of(falling[1::2], [1, 3]) is None, "of two steps one is always the better"


def test_without_checkpoints_the_way_is_said(tmp_path, cli):
    make_result(tmp_path, "rg_lcd-s0", rows={"oracle_mean": BASE, "hps": BASE})
    done = cli("probes", "gold", tmp_path)
    assert done.returncode == 2 and "evaluate its checkpoints: rgbench eval RUN --checkpoints" in done.stderr


def test_best_of_n_reads_the_values_of_several_images_of_a_prompt(tmp_path, cli):
    results = tmp_path / "results"
    draws = RNG.normal(size=(200, 16))
    make_result(results, "teacher", rows={"hps": draws.ravel()}, per_prompt=16)
    make_result(results, "rg_lcd-s0", rows={"hps": RNG.normal(size=(200, 4)).max(1)})
    done = cli("probes", "best-of-n", "rg_lcd-s0", results, "--base", "teacher", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["best of n"] in ("3", "4", "5") and found["prompts"] == "200"
    make_result(results, "lcd-s1", rows={"hps": draws.ravel()}, per_prompt=16, copies=True)
    (again,) = json.loads(cli("probes", "best-of-n", "rg_lcd-s0", results, "--base", "lcd-s1", "--json").stdout)
    assert again["best of n"] == found["best of n"], "copies of a prompt are draws as seeds are"
    make_result(results, "lcd-s0", rows={"hps": RNG.normal(size=200)})
    done = cli("probes", "best-of-n", "rg_lcd-s0", results, "--base", "lcd-s0")
    assert done.returncode == 2 and "several images of each prompt of lcd-s0 and rg_lcd-s0, found 1" in done.stderr
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
        make_result(results, model, values={"hps": reward, "fd_efflite0": distance})
    (found,) = load_result_sets(results)
    points = pareto_points(found, "hps", "fd_efflite0")
    assert [(p.model, p.on_front) for p in points] == [("rg_lcd-s0", True), ("lrm-s0", False), ("lcd-s0", True)]
    done = cli("probes", "pareto", results)
    assert done.returncode == 0 and done.stdout.count("front") == 2
    make_result(results, "lcd-s0", values={"hps": 1.0}, protocol={"version": 2})
    done = cli("probes", "pareto", results)
    assert done.returncode == 2 and "hps was measured under 2 protocols" in done.stderr
    done = cli("probes", "pareto", results, "--reward", "nothing")
    assert done.returncode == 2 and "no model here has both nothing and fd_efflite0" in done.stderr
