"""``rgbench check``: limits as a gate, in words and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.results_maker import put


@pytest.fixture
def results(tmp_path) -> Path:
    root = tmp_path / "results"
    put(root, "lcd-s0", "hfer_gap_db", 0.2, half=0.1)
    put(root, "rg_lcd-s0", "hfer_gap_db", 3.25, half=0.5)
    put(root, "rg_lcd-s0", "oracle_mean", 80.0)
    return root


def test_a_broken_limit_is_said_and_exits_1(cli, results):
    done = cli("check", results, "--max-hf-db", "1.0")
    assert done.returncode == 1
    good, bad = sorted(done.stdout.splitlines(), key=lambda line: line.startswith("FAILED"))
    assert good.startswith("ok     benchtop/lcd-s0/lcm4-") and good.endswith(
        ": HFER_GAP_DB is 0.20 dB [0.10, 0.30], at most 1 dB"
    )
    assert bad.startswith("FAILED benchtop/rg_lcd-s0/lcm4-")
    assert bad.endswith(": HFER_GAP_DB is 3.25 dB [2.75, 3.75]; it must be at most 1 dB")
    assert "1 of 2 checks failed" in done.stderr


def test_limits_that_hold_exit_0(cli, results):
    done = cli("check", results, "--max-hf-db", "3.25", "--min", "hfer_gap_db=-1")
    assert done.returncode == 0 and done.stdout.count("ok") == 4
    assert cli("check", results, "--max", "hfer_gap_db=1", "--model", "lcd-s0").returncode == 0
    assert cli("check", results, "--min", "oracle_mean=80.01", "--model", "rg_lcd-s0").returncode == 1


def test_what_was_not_measured_fails(cli, results):
    done = cli("check", results, "--min", "oracle_mean=50")
    assert done.returncode == 1 and "lcd-s0/lcm4-" in done.stdout and "oracle_mean was not measured" in done.stdout
    put(results, "lcd-s0", "oracle_mean")
    done = cli("check", results, "--min", "oracle_mean=50")
    assert done.returncode == 1 and "has no value (made up); it must be at least 50" in done.stdout


def test_checkpoints_of_a_run_are_not_held(cli, results):
    put(results, "lcd-s0", "hfer_gap_db", 9.0, step=50)
    done = cli("check", results, "--max-hf-db", "1.0", "--model", "lcd-s0")
    assert done.returncode == 0 and done.stdout.count("ok") == 1


def test_limits_on_the_difference_to_another_model(cli, tmp_path):
    """Where no real images are of the models' size, HFER has a level alone: what it means, another model says."""
    results = tmp_path / "results"
    put(results, "teacher", "hfer_db", -12.0, half=0.3, level=True, sampler_steps=50)
    put(results, "teacher", "hfer_db", -30.0, half=0.3, level=True, sampler_steps=1)
    put(results, "mine", "hfer_db", -11.5, half=0.2, level=True, elsewhere=True)
    put(results, "wild", "hfer_db", -9.0, half=0.4, level=True, elsewhere=True)
    put(results, "later", "hfer_db", -12.0, level=True, elsewhere=True, version=2)
    put(results, "blank", "hfer_db", level=True, elsewhere=True)
    put(results, "bare", "oracle_mean", 1.0, elsewhere=True)
    done = cli("check", results, "--max-hf-db", "1.0")
    assert (
        done.returncode == 2
        and "no real images of its size; compare with another model's: --base teacher" in done.stderr
    )
    done = cli("check", results, "--max-hf-db", "1.0", "--base", "teacher", "--model", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" against teacher: HFER_DB is 0.50 dB [0.14, 0.86], at most 1 dB\n"), "of 50 steps"
    done = cli("check", results, "--max-hf-db", "1.0", "--base", "teacher")
    lines = {line.split("/")[1]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1 and "4 of 5 checks failed" in done.stderr and set(lines) == {
        "mine", "wild", "later", "blank", "bare",
    }  # fmt: skip
    assert lines["wild"].endswith("against teacher: HFER_DB is 3.00 dB [2.50, 3.50]; it must be at most 1 dB")
    assert lines["later"].endswith("against teacher: hfer_db was not measured of both under one protocol")
    assert lines["blank"].endswith("HFER_DB has no value (made up); it must be at most 1 dB")
    assert lines["bare"].endswith("hfer_db was not measured")
    done = cli("check", results, "--max-hf-db", "1", "--base", "taecher")
    assert done.returncode == 2 and "no model 'taecher' in the results; did you mean 'teacher'" in done.stderr
    done = cli("check", results, "--max-hf-db", "1", "--base", "mine", "--model", "wild")
    assert done.returncode == 1 and "against mine: HFER_DB is 2.50" in done.stdout, "one's own earlier model"
    done = cli("check", results, "--max-hf-db", "1", "--base", "mine", "--model", "mine")
    assert done.returncode == 2 and "nothing but mine is here, which is not held against itself" in done.stderr


def test_a_student_is_held_against_the_one_of_its_seed(cli, tmp_path):
    for seed in range(2):
        put(tmp_path, f"lcd-s{seed}", "fd_efflite0", 10.0 + seed, half=1)
        put(tmp_path, f"lrm-s{seed}", "fd_efflite0", 12.0 + 2 * seed, half=1)
    done = cli("check", tmp_path, "--max", "fd_efflite0=2.5", "--base", "lcd")
    assert done.returncode == 1 and done.stdout.count("\n") == 2, "the base itself is not held"
    assert "lrm-s1" in done.stdout.split("FAILED")[1] and "against lcd-s1: FD_EFFLITE0 is 3.00" in done.stdout
    put(tmp_path, "rg_lcd-s0", "fd_efflite0", 12.0, half=1, sampler_steps=8)
    done = cli("check", tmp_path, "--max", "fd_efflite0=2.5", "--base", "lcd", "--model", "rg_lcd-s0")
    assert done.returncode == 1 and "no lcd of its world, sampler settings and training steps is here" in done.stdout


def test_verdicts_can_gate(cli, results):
    done = cli("check", results, "--verdict")
    assert done.returncode == 1 and "trained on a reward and no verdict; run: rgbench verdict" in done.stdout
    assert cli("verdict", results).returncode == 1
    done = cli("check", results, "--verdict")
    assert done.returncode == 1 and "no verdict on rg_lcd-s0" in done.stdout


def test_a_gate_that_checked_nothing_is_not_open(cli, tmp_path):
    put(tmp_path, "lcd-s0", "hps_aa1", 20.0)
    done = cli("check", tmp_path, "--verdict")
    assert done.returncode == 2 and "no model here is known to be trained on a reward, and" in done.stderr
    done = cli("compare", tmp_path)
    assert done.returncode == 2 and "no model here can be compared with lcd" in done.stderr


def test_two_protocols_and_two_settings_are_told_apart(cli, tmp_path):
    for model in ("lcd-s0", "lrm-s0"):
        put(tmp_path, model, "fd_efflite0", 10.0, half=1)
        put(tmp_path, model, "fd_efflite0", 12.0, half=1, version=2)
        put(tmp_path, model, "fd_efflite0", 14.0, half=1, sampler_steps=8)
    for command in (("check", tmp_path, "--max", "fd_efflite0=99", "--model", "lrm-s0"), ("compare", tmp_path)):
        lines = cli(*command).stdout.splitlines()
        firsts = {line.split(" is ")[0] if command[0] == "check" else tuple(line.split("\t")[:3]) for line in lines}
        assert len(firsts) == len(lines) == 3, lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to check; give --max-hf-db 1.0"),
        (["--max", "hfer_gap_db"], "--max 'hfer_gap_db': give a metric and a number, like --max hfer_gap_db=1.0"),
        (["--min", "oracle_mean=nan"], "--min 'oracle_mean=nan': give a metric and a number"),
        (["--max", "hfer_gap=1"], "no model has the metric 'hfer_gap'; did you mean 'hfer_gap_db'"),
        (["--max-hf-db", "1", "--model", "lcd"], "no finished model 'lcd'; did you mean 'lcd-s0'"),
    ],
)
def test_wrong_usage_exits_2(cli, results, arguments, message):
    done = cli("check", results, *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_no_results_are_no_success(cli, tmp_path):
    done = cli("check", tmp_path / "empty", "--max-hf-db", "1")
    assert done.returncode == 2 and "no result files here" in done.stderr
