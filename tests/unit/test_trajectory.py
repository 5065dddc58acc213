"""A run along its training: one protocol per curve, the hack step, checkpoints that are no rows of the table."""

import json
import re
from pathlib import Path

import pytest

from rgbench.judge.models import Comparison, gather
from rgbench.report.words import Trajectory, readings, trajectories
from tests.history.plausible import write_model

FEW = ("hps_aa1", "oracle_mean", "fd_efflite0", "hfer_gap_db")


def follow(root: Path, method: str = "rg_lcd", steps: tuple[int, ...] = (50, 100, 150, 200, 250), **how) -> None:
    for step in steps:
        write_model(root, method, 0, metrics=FEW, num=32, training=(step, 250), **how)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("along")
    for method in ("lcd", "rg_lcd", "lrm"):
        follow(root, method)
    write_model(root, "teacher", None, metrics=FEW, num=32)
    return root


@pytest.fixture(scope="module")
def along(root: Path) -> Comparison:
    return gather(root)[0]


def run(comparison: Comparison, method: str) -> Trajectory:
    return next(found for found in trajectories(comparison) if found.row.method == method)


def test_checkpoints_are_no_rows_but_points_that_end_in_the_finished_model(along):
    assert [row.method for row in along.rows] == ["teacher", "lcd", "rg_lcd", "lrm"]
    assert len(along.checkpoints) == 3 * 4 * len(FEW)
    found = run(along, "rg_lcd")
    assert list(found.points) == [50, 100, 150, 200, 250] and found.model == "rg_lcd-s0"
    column = along.column("hps_aa1")
    assert found.curve("hps_aa1")[250] == found.row.figure(column).value


def test_the_proxy_is_what_it_was_trained_on_and_gold_what_it_was_not(along):
    found = run(along, "rg_lcd")
    assert (found.proxy, found.gold) == ("hps_aa1", "oracle_mean")
    assert run(along, "lcd").proxy is None


def test_the_hack_step_is_golds_peak_while_the_trained_reward_still_rises(along):
    hack = run(along, "lrm").hack
    curve = run(along, "lrm").curve("oracle_mean")
    assert hack.step == max(curve, key=curve.__getitem__) and hack.last == 250
    assert hack.loss.value == pytest.approx(curve[hack.step] - curve[250]) and hack.loss.basis == "images"
    assert hack.loss.low > 0 and hack.gain.low > 0
    assert run(along, "lcd").hack is None, "nothing was trained on"


def test_the_words_tell_the_hack_step_or_that_there_is_none(along):
    told = {reading.title.split()[0]: reading.facts[-1] for reading in readings(along)}
    hack = run(along, "lrm").hack
    assert told["LRM"].startswith(f"Along training, lrm-s0: hack step {hack.step}")
    assert re.search(
        r"to step 250 Oracle, mean falls by [\d.]+ ± <?[\d.]+ points while HPS aa1 rises by [\d.]+", told["LRM"]
    )
    assert told.keys() == {"RG-LCD", "LRM"}


def test_gold_that_peaks_at_the_end_is_no_hack(tmp_path):
    follow(tmp_path, steps=(50, 100, 250))
    for path in tmp_path.rglob("oracle_mean@*.json"):
        result = json.loads(path.read_text())
        result["value"] = result["training"]["step"]
        path.write_text(json.dumps(result))
    found = run(gather(tmp_path)[0], "rg_lcd")
    assert found.curve("oracle_mean") == {50: 50, 100: 100, 250: 250} and found.hack is None


def test_two_points_are_too_few_for_a_peak(tmp_path):
    follow(tmp_path, steps=(100, 250))
    assert run(gather(tmp_path)[0], "rg_lcd").hack is None


def test_figures_of_another_protocol_are_not_joined_to_a_curve(tmp_path):
    follow(tmp_path, steps=(50, 100, 200), protocol_num=512)
    follow(tmp_path, steps=(250,), protocol_num=2048)
    found = run(gather(tmp_path)[0], "rg_lcd")
    assert list(found.points) == [50, 100, 200]
    assert len(gather(tmp_path)[0].protocol_numbers) == 2 * len(FEW), "the checkpoints' protocols have footnotes too"


def test_checkpoints_of_another_sampler_belong_to_another_row(tmp_path):
    follow(tmp_path, steps=(50, 100))
    write_model(tmp_path, "rg_lcd", 0, metrics=FEW, num=32, steps=2, training=(250, 250))
    assert trajectories(gather(tmp_path)[0]) == ()
