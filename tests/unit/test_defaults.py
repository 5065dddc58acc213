"""Metrics that are measured where none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.core.registry import TABLES
from rgbench.evaluate import evaluate as engine
from rgbench.evaluate.evaluate import default_metrics
from tests.tiny_models import run_eval, save_run


@pytest.fixture
def shared(tmp_path, monkeypatch) -> Path:
    """A folder of runs, and an empty working folder."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "rg_lcd-s0")
    Path("mine.txt").write_text("a cat\na dog\n")
    return tmp_path / "runs"


def test_defaults_need_no_download():
    assert default_metrics() == [
        "fid",
        "gold_utility",
        "gold_win_rate",
        "hps",
        "kid",
        "oracle",
        "prdc",
        "probes",
        "vendi",
    ]


def test_without_metrics_all_that_fit_are_measured(shared, caplog):
    """A newcomer's first command has prompts of his own, and names nothing."""
    (result,) = run_eval(["rg_lcd-s0"], prompts="mine.txt", batch_size=4)
    found = {value.metric for value in result.values}
    assert {"hps", "hps_no_antialias", "hfer_db"} < found
    assert not found & {"fd_efflite0", "kd_efflite0", "oracle_mean", "hps_jpeg75"}
    left = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out")]
    assert (
        len(left) == 1
        and "left out: fid, gold_utility, gold_win_rate, kid, oracle, prdc, vendi: mine: prompt 'mine/0' has no scene"
        in left[0]
    )
    assert result.runs[0].command.startswith("rgbench eval rg_lcd-s0 --prompts mine.txt")


def test_no_metric_that_fits_is_explained(shared, monkeypatch):
    monkeypatch.setattr(engine, "default_metrics", lambda: ["fid", "kid"])
    with pytest.raises(UsageError, match="no metric fits; name one with --metric"):
        run_eval(["rg_lcd-s0"], prompts="mine.txt")


def test_every_metric_says_whether_it_is_a_default():
    assert set(default_metrics()) < set(TABLES["metric"])
