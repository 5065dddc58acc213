"""What is measured where nothing is named, and what counts as measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.data.prompts import load_prompts
from rgbench.evaluate.evaluate import evaluate, fitting_metrics
from rgbench.evaluate.results import load_results, load_samples
from tests.tiny_models import make_context, save_run


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder of runs, never written to."""
    root = tmp_path_factory.mktemp("shared")
    save_run(root / "runs" / "rg_lcd-s0")
    return root


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(shared: Path, targets: list[str], metrics: list[str], **options) -> list[Path]:
    given = {"num": 6, "runs": shared / "runs", "batch_size": 4, "device": "cpu", "keep_images": 2}
    return evaluate(targets, metrics, **{**given, **options})


def test_without_metrics_all_that_fit_are_measured(shared, place, caplog):
    """A newcomer's first command has prompts of his own, and names nothing."""
    Path("mine.txt").write_text("a cat\na dog\n")
    found = {path.name.partition("@")[0] for path in run(shared, ["rg_lcd-s0"], [], num=None, prompts="mine.txt")}
    assert {"hps_aa0", "hps_aa1"} < found and "band_energy" not in found
    assert not found & {"fd_efflite0", "kd_efflite0", "oracle_mean", "hps_jpeg75_aa1"}
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out")]
    assert len(told) == 1 and "left out: fid, kid, oracle, prdc, vendi: mine: prompt 'mine/0' has no scene" in told[0]
    assert load_results(Path("results"))[0].command.startswith("rgbench eval rg_lcd-s0 --prompts mine.txt")
    with pytest.raises(UsageError, match="none of the metrics fid, kid fits; name one with --metric"):
        fitting_metrics(["fid", "kid"], make_context(load_prompts("mine.txt"), place))


def test_a_damaged_figure_is_measured_again(shared, place, caplog):
    files = run(shared, ["rg_lcd-s0"], ["hps"])
    good = load_results(Path("results"))[0]
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert run(shared, ["rg_lcd-s0"], ["hps"]) == files and "not valid JSON" in caplog.text
    files[1].with_suffix(".parquet").unlink()
    run(shared, ["rg_lcd-s0"], ["hps"])
    assert load_results(Path("results"))[0].value == good.value
    assert all(len(load_samples(result)) == 6 for result in load_results(Path("results")))
