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


def test_verdicts_can_gate(cli, results):
    done = cli("check", results, "--verdict")
    assert done.returncode == 1 and "trained on a reward and no verdict; run: rgbench verdict" in done.stdout
    assert cli("verdict", results).returncode == 1
    done = cli("check", results, "--verdict")
    assert done.returncode == 1 and "no verdict on rg_lcd-s0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to check; give --max-hf-db 1.0"),
        (["--max", "hfer_gap_db"], "--max 'hfer_gap_db': give a metric and a number, like --max hfer_gap_db=1.0"),
        (["--min", "oracle_mean=nan"], "--min 'oracle_mean=nan': give a metric and a number"),
        (["--max", "hfer_gap=1"], "no model has the metric 'hfer_gap'; did you mean 'hfer_gap_db'"),
        (["--max-hf-db", "1", "--model", "lcd"], "no model 'lcd'; did you mean 'lcd-s0'"),
    ],
)
def test_wrong_usage_exits_2(cli, results, arguments, message):
    done = cli("check", results, *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_no_results_are_no_success(cli, tmp_path):
    done = cli("check", tmp_path / "empty", "--max-hf-db", "1")
    assert done.returncode == 2 and "no result files here" in done.stderr
