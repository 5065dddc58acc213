"""What bars say: rate and time left of batches however slow, lines where there is no terminal, and of which work."""

from __future__ import annotations

import io
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Task

from rgbench.benchtop.scenes import scene_batch
from rgbench.core import progress as module
from rgbench.core.progress import Bars, bar, rate, time_left, track_images
from rgbench.data.prompts import benchtop_prompts
from rgbench.evaluate.results import load_results
from rgbench.judge.limits import Limit, check_results
from rgbench.judge.models import load_result_sets
from rgbench.metrics.cmmd import cmmd
from rgbench.metrics.fid import FrechetDistance, Gaussian, infinity_points
from rgbench.metrics.kid import KernelDistance, kid_draws
from rgbench.metrics.prdc import PrecisionRecall
from rgbench.metrics.vendi import VendiScore
from rgbench.report.report import check, report
from tests.history.plausible import write_model
from tests.tiny_models import make_context

NUM = 24
HISTORY = Path(__file__).parents[1] / "history" / "report_v1"
LIMITS = [Limit("hps", 99.0, most=True)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def at(task: Task, clock: Clock, seconds: float, completed: int) -> Task:
    clock.now, task.completed = seconds, completed
    return task


@pytest.fixture
def display(monkeypatch) -> tuple[Bars, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(module.time, "monotonic", clock)
    bars = Bars(Console(file=out, width=200))
    bars.get_time = clock
    return bars, clock, out


def test_batches_of_a_minute_have_a_rate_and_an_end(display):
    """rich's own estimate looks back 30 seconds and would show neither."""
    bars, clock, _ = display
    with bar(bars, "teacher: ddim", 1024) as task_id:
        task = bars.tasks[task_id]
        assert (rate(task), time_left(task)) == ("", "-:--:-- left")
        assert rate(at(task, clock, 100, 64)) == "0.640 images/s" and time_left(task) == "0:25:00 left"
        assert rate(at(task, clock, 200, 512)) == "2.6 images/s" and time_left(task) == "0:03:20 left"
    assert not bars.tasks


def test_what_has_no_known_end_says_how_long_it_takes(display):
    bars, clock, _ = display
    with bar(bars, "fid") as task_id:
        clock.now = 65
        assert time_left(bars.tasks[task_id]) == "0:01:05 so far" and rate(bars.tasks[task_id]) == ""


def test_a_bar_goes_when_its_work_fails(display):
    bars, _, _ = display
    with pytest.raises(ZeroDivisionError), bar(bars, "broken", 3):
        raise ZeroDivisionError
    assert not bars.tasks


def test_a_batch_job_gets_a_line_each_minute(display):
    bars, clock, out = display
    with bars:
        for step in track_images(bars)([torch.zeros(64)] * 5, "teacher: ddim"):
            assert len(step) == 64
            clock.now += 25
    assert out.getvalue() == ("teacher: ddim: 192 of 320, 2.6 images/s, 0:00:50 left\n")


def test_other_units_count_steps(display):
    bars, clock, _ = display
    for _ in track_images(bars)(["ab", "cdef"], "jackknife", "distances"):
        clock.now += 4
        if bars.tasks[0].completed:
            assert bars.tasks[0].total == 2 and rate(bars.tasks[0]) == "0.125 distances/s"


class Recorder:
    """A track that notes what it was asked to show, and that all of it was done."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.steps: dict[str, int] = {}

    def __call__(self, steps, what, unit="images"):
        assert len(steps) > 0
        self.begun.append(what)
        self.steps[what] = len(steps)
        yield from steps
        self.ended.append(what)


def test_every_stage_of_a_set_metric_is_shown(tmp_path):
    """At 30,000 images each of these takes from seconds to minutes."""
    recorder = Recorder()
    context = make_context(benchtop_prompts(NUM), tmp_path, track=recorder)
    images = scene_batch("test", range(NUM))[0].flip(0)
    shown = {}
    for metric in (FrechetDistance, KernelDistance, PrecisionRecall, VendiScore):
        measure = metric(context)
        measure.update(images, context.prompts.prompts, np.arange(NUM))
        recorder.begun.clear()
        recorder.ended.clear()
        measure.compute()
        assert recorder.begun and sorted(recorder.begun) == sorted(recorder.ended)
        shown[metric] = set(recorder.begun)
    assert shown[FrechetDistance] == {"mean and covariance", "jackknife"}
    assert shown[KernelDistance] == {"kernel: reference", "kernel: generated", "kernel: generated and real"}
    assert shown[PrecisionRecall] == {"radii", "neighbours among real images"}
    assert shown[VendiScore] == {"Vendi: jackknife"}


def test_so_are_those_of_many_images():
    recorder, rows = Recorder(), np.random.default_rng(0).normal(size=(40, 3))
    groups = np.arange(40) % 5
    reference = Gaussian.of_rows(rows, recorder)
    reference.replicates(rows.__getitem__, groups, recorder)
    infinity_points(reference, rows.__getitem__, 40, 3, recorder)
    cmmd(rows, rows, groups, track=recorder)
    kid_draws(rows, rows, subsets=2, size=20, track=recorder)
    assert set(recorder.ended) == {
        "kernel distance",
        *("mean and covariance", "groups of the jackknife", "jackknife", "subsets"),
        *("kernel: generated", "kernel: generated and real", "kernel: reference"),
    }


@pytest.mark.parametrize("read", [load_result_sets, load_results, partial(check_results, limits=LIMITS)])
def test_every_result_that_is_read_is_shown(read):
    recorder = Recorder()
    read(HISTORY, track=recorder)
    assert recorder.ended == [f"{HISTORY}: reading"]
    assert recorder.steps == {f"{HISTORY}: reading": len({path.parent for path in HISTORY.rglob("*@*.json")})}


def test_so_is_each_part_of_a_report(tmp_path):
    """With hundreds of models each of these takes minutes."""
    results, out = tmp_path / "results", tmp_path / "out"
    shutil.copytree(HISTORY, results)
    write_model(results, "external", None, metrics=("hps",), num=4, images=1)
    of_both = {f"{results}: reading", "tables and grids", "images of the page", "plots of the page"}
    written, compared = Recorder(), Recorder()
    report(results, out, [], written)
    check(results, out, [], compared)
    assert set(written.ended) == {*of_both, "writing", "benchtop: plots", "benchtop: grids"}
    assert set(compared.ended) == {*of_both, "comparing"}
    assert written.steps["writing"] == compared.steps["comparing"] == 4 and written.steps["benchtop: grids"] == 4
    for recorder in (written, compared):
        assert sorted(recorder.begun) == sorted(recorder.ended)
