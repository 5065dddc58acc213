"""``rgbench check``: limits as a gate, in words and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.results_maker import HACKED, make_result, make_students


@pytest.fixture
def results(tmp_path) -> Path:
    root = tmp_path / "results"
    make_result(root, "lcd-s0", values={"hfer_db": 0.2}, half=0.1)
    make_result(root, "rg_lcd-s0", values={"hfer_db": 3.25, "oracle_mean": 80.0}, half=0.5)
    return root


def test_a_broken_limit_is_reported_and_exits_1(cli, results):
    done = cli("check", results, "--max-hf-db", "1.0")
    assert done.returncode == 1 and "1 of 2 checks failed" in done.stderr
    assert done.stdout.splitlines() == [
        "ok     benchtop/lcd-s0: HFER gap is 0.20 dB [0.10, 0.30], at most 1 dB",
        "FAILED benchtop/rg_lcd-s0: HFER gap is 3.25 dB [2.75, 3.75]; it must be at most 1 dB",
    ]


def test_limits_that_hold_exit_0(cli, results):
    done = cli("check", results, "--max-hf-db", "3.25", "--min", "hfer_db=-1")
    assert done.returncode == 0 and done.stdout.count("ok") == 4
    assert cli("check", results, "--max", "hfer_db=1", "--model", "lcd-s0").returncode == 0
    assert cli("check", results, "--min", "oracle_mean=80.01", "--model", "rg_lcd-s0").returncode == 1


def test_what_was_not_measured_fails(cli, results):
    done = cli("check", results, "--min", "oracle_mean=50")
    assert done.returncode == 1 and "benchtop/lcd-s0: oracle_mean has no value" in done.stdout
    make_result(results, "lcd-s0", values={"oracle_mean": None})
    done = cli("check", results, "--min", "oracle_mean=50")
    assert done.returncode == 1 and "has no value (made up); it must be at least 50" in done.stdout


def test_checkpoints_of_a_run_are_left_out(cli, results):
    make_result(results, "lcd-s0", values={"hfer_db": 9.0}, step=50)
    done = cli("check", results, "--max-hf-db", "1.0", "--model", "lcd-s0")
    assert done.returncode == 0 and done.stdout.count("ok") == 1


def test_every_seed_is_held_and_against_a_base_the_method(cli, tmp_path):
    for seed in range(3):
        make_result(tmp_path, f"lcd-s{seed}", values={"fd_efflite0": 10.0 + seed}, half=1)
        make_result(tmp_path, f"lrm-s{seed}", values={"fd_efflite0": 12.0 + 2 * seed}, half=1)
    done = cli("check", tmp_path, "--max", "fd_efflite0=15")
    assert done.returncode == 1 and done.stdout.count("\n") == 6 and "FAILED benchtop/lrm-s2" in done.stdout
    done = cli("check", tmp_path, "--max", "fd_efflite0=2.5", "--base", "lcd")
    assert done.returncode == 1, "the difference that compare shows"
    assert "benchtop/lrm, 3 seeds against lcd, 3 seeds: FD-EffLite0 is 3.00 [0.52, 5.48]; it must be" in done.stdout
    done = cli("check", tmp_path, "--max", "fd_efflite0=2.5", "--base", "lcd-s0", "--model", "lrm-s0")
    assert done.returncode == 0 and "lrm-s0 against lcd-s0: FD-EffLite0 is 2.00" in done.stdout
    make_result(tmp_path, "rg_lcd-s0", values={"fd_efflite0": 12.0}, sampling={"steps": 8})
    done = cli("check", tmp_path, "--max", "fd_efflite0=2.5", "--base", "lcd", "--model", "rg_lcd-s0")
    assert done.returncode == 1 and "sampled with LCM, 4 steps" in done.stdout


def test_limits_on_the_difference_to_another_model(cli, tmp_path):
    """Where no real images are of the models' size, HFER means nothing by itself: another model says what it means."""
    results = tmp_path / "results"
    given = {"reference": None, "half": 0.3}
    make_result(results, "teacher", values={"hfer_db": -12.0}, sampling={"steps": 50}, **given)
    make_result(results, "teacher", values={"hfer_db": -30.0}, sampling={"steps": 1}, **given)
    make_result(results, "mine", "external", values={"hfer_db": -11.5}, **given)
    make_result(results, "wild", "external", values={"hfer_db": -9.0}, **given)
    make_result(results, "later", "external", values={"hfer_db": -12.0}, protocol={"version": 2}, **given)
    make_result(results, "blank", "external", values={"hfer_db": None}, **given)
    make_result(results, "bare", "external", values={"oracle_mean": 1.0}, **given)
    done = cli("check", results, "--max-hf-db", "1.0")
    assert done.returncode == 2 and "compare with another model's: --base teacher" in done.stderr
    done = cli("check", results, "--max-hf-db", "1.0", "--base", "teacher", "--model", "mine")
    assert done.returncode == 0, done.stderr
    assert "against teacher" in done.stdout and "HFER is 0.50 dB [0.08, 0.92], at most 1 dB" in done.stdout, "of 50"
    done = cli("check", results, "--max-hf-db", "1.0", "--base", "teacher")
    lines = {line.split("/")[1].split(" ")[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1 and "4 of 5 checks failed" in done.stderr
    assert set(lines) == {"mine", "wild", "later", "blank", "bare"}
    assert "HFER is 3.00 dB" in lines["wild"] and "has no value (made up)" in lines["blank"]
    assert "has no value" in lines["later"] and "has no value" in lines["bare"]
    done = cli("check", results, "--max-hf-db", "1", "--base", "taecher")
    assert done.returncode == 2 and "no finished model 'taecher'; did you mean 'teacher'" in done.stderr
    done = cli("check", results, "--max-hf-db", "1", "--base", "mine", "--model", "mine")
    assert done.returncode == 2 and "nothing but mine is here" in done.stderr


def test_verdicts_can_gate(cli, tmp_path, caplog):
    make_students(tmp_path, "lcd", {})
    make_students(tmp_path, "lrm", {"hps": 6.0, "oracle_all": 15.0})
    done = cli("check", tmp_path, "--verdict")
    assert done.returncode == 0 and "lrm against lcd (6 common seeds): aligned." in done.stdout, "without a file too"
    make_students(tmp_path, "rg_lcd", HACKED)
    done = cli("check", tmp_path, "--verdict")
    assert done.returncode == 1 and "FAILED benchtop: rg_lcd against lcd (6 common seeds): over-opt" in done.stdout
    assert cli("verdict", tmp_path).returncode == 0
    make_students(tmp_path, "rg_lcd", HACKED | {"oracle_all": -20.0}, [0])
    done = cli("check", tmp_path, "--verdict", "--model", "rg_lcd")
    assert done.returncode == 1 and "verdict.json: stale for rg_lcd" in caplog.text


def test_a_gate_that_checked_nothing_is_not_open(cli, tmp_path):
    make_result(tmp_path, "lcd-s0", values={"hps": 20.0})
    done = cli("check", tmp_path, "--verdict")
    assert done.returncode == 2 and "no model here is known to be trained on a reward" in done.stderr
    assert cli("compare", tmp_path).returncode == 2


def test_two_protocols_and_two_settings_are_told_apart(cli, tmp_path):
    for model in ("lcd-s0", "lrm-s0"):
        make_result(tmp_path, model, values={"fd_efflite0": 10.0}, half=1)
        make_result(tmp_path, model, values={"fd_efflite0": 12.0}, half=1, protocol={"version": 2})
        make_result(tmp_path, model, values={"fd_efflite0": 14.0}, half=1, sampling={"steps": 8})
    lines = cli("check", tmp_path, "--max", "fd_efflite0=99", "--model", "lrm-s0").stdout.splitlines()
    assert len({line.split(" is ")[0] for line in lines}) == len(lines) == 3, lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to check; give --max-hf-db 1.0"),
        (["--max", "hfer_db"], "--max 'hfer_db': give a metric and a number, like --max hfer_db=1.0"),
        (["--min", "oracle_mean=nan"], "--min 'oracle_mean=nan': give a metric and a number"),
        (["--max", "hfer=1"], "no model has the metric 'hfer'; did you mean 'hfer_db'"),
        (["--max-hf-db", "1", "--model", "lce-s0"], "no finished model 'lce-s0'; did you mean 'lcd-s0'"),
    ],
)
def test_wrong_usage_exits_2(cli, results, arguments, message):
    done = cli("check", results, *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_no_results_are_no_success(cli, tmp_path):
    done = cli("check", tmp_path / "empty", "--max-hf-db", "1")
    assert done.returncode == 2 and f"{tmp_path / 'empty'}: no such folder" in done.stderr
    (tmp_path / "empty").mkdir()
    done = cli("check", tmp_path / "empty", "--max-hf-db", "1")
    assert done.returncode == 2 and "no results here" in done.stderr
