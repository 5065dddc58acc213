"""Whole runs: stages from the files that end them, processes with all their children, the demo that make knows."""

from __future__ import annotations

import os
import subprocess

import pytest

from rgbench.core.errors import RgbenchError, UsageError
from tests.conftest import ROOT
from tools.bench import api, whole

# Leaves the demo's files in its order; a child takes memory, and the report runs on a little after its last file.
MAKEFILE = """
SLOW := 0.3
install:
	touch installed
demo:
	test -f installed && test -z "$$(ls $$XDG_CACHE_HOME 2>/dev/null)"
	for r in lcd rg_lcd lrm; do mkdir -p $(DEMO)/runs/$$r-s0 && touch $(DEMO)/runs/$$r-s0/run.json || exit; done
	mkdir -p $(DEMO)/results/a $(DEMO)/results/.cache $(DEMO)/report
	python3 -c 'block = bytearray(200 << 20); block[::4096] = b"1" * len(block[::4096])'
	sleep $(SLOW); touch $(DEMO)/results/a/fid.json
	touch $(DEMO)/report/report.html; touch $(DEMO)/results/.cache/late.json
"""


def test_a_demo_is_timed_by_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    found = api.whole_run(subject="demo", settings=["SLOW=0.4"])
    assert found["overrides"] == ["SLOW=0.4"]
    row = found["rows"][0]
    assert list(row["stages"]) == ["train lcd", "train rg_lcd", "train lrm", "eval", "report", "end"]
    assert sum(row["stages"].values()) == pytest.approx(row["seconds"], abs=0.05)
    assert row["stages"]["eval"] >= 0.4 > 0.2 > row["stages"]["report"] >= 0
    assert 200 << 20 < row["peak_rss_bytes"] < 400 << 20  # a grandchild's


def test_what_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="has no Makefile"):
        api.whole_run(subject="demo", settings=[])
    with pytest.raises(UsageError, match="did you mean 'lrm'"):
        api.whole_run(subject="lrn", settings=[])
    (tmp_path / "Makefile").write_text("install:\ndemo:\n\t@echo out of paper; exit 3\n")
    with pytest.raises(RgbenchError, match="make demo .* failed with exit code 2: (.|\n)*out of paper"):
        api.whole_run(subject="demo", settings=[])


def test_a_stage_without_its_file_is_an_error(tmp_path):
    early, late = tmp_path / "early", tmp_path / "late"
    early.touch()
    late.touch()
    os.utime(early, (100.0, 101.0))
    os.utime(late, (100.0, 105.0))
    ends = {"one": lambda: [early], "two": lambda: [late, early]}
    assert whole.stages(ends, 100.0, 107.5) == {"one": 1.0, "two": 4.0, "end": 2.5}
    with pytest.raises(RgbenchError, match="the stage 'two'"):
        whole.stages({"one": lambda: [late], "two": lambda: [early]}, 100.0, 107.5)
    with pytest.raises(RgbenchError, match="the stage 'one'"):
        whole.stages({"one": lambda: [tmp_path / "none"]}, 100.0, 107.5)


def test_makes_demo_leaves_these_files(tmp_path, monkeypatch):
    """The stages are those of our own Makefile: its three recipes, its results, its report."""
    monkeypatch.chdir(ROOT)
    command = whole.plan("demo", tmp_path / "d", []).command
    told = subprocess.run([command[0], "-n", *command[1:]], capture_output=True, text=True, check=True).stdout
    assert f"for recipe in {' '.join(whole.DEMO_RECIPES)};" in told
    assert f"--out {tmp_path}/d/runs/$recipe-s0" in told and f"--results {tmp_path}/d/results" in told
    assert f"--out {tmp_path}/d/report" in told


@pytest.mark.long
def test_a_recipe_is_timed_by_stage():
    row = api.whole_run(subject="lcd", settings=["train.steps=2", "train.batch_size=4"])["rows"][0]
    assert list(row["stages"]) == ["start", "steps, checkpoints, samples", "export", "end"]
    assert all(seconds > 0 for seconds in row["stages"].values())
    assert row["cpu_sec"] > 1 and row["peak_rss_bytes"] > 300 << 20
