"""Run directories: never overwritten, resumable, one writer; seeds that are pure functions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgbench.core.errors import UsageError
from rgbench.core.run import RunDirectory, provenance, stream_generator, stream_seed
from tests.conftest import ROOT

CONFIG = {"kind": "lrm", "train": {"lr": 1e-4, "betas": (0.9, 0.95)}, "seed": 0}
META = {"name": "lrm-s0", "status": "running", "step": 0, "steps": 10}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_is_created_and_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "lrm-s0").create(CONFIG, META)
    assert run.read() == {"schema_version": 1, **META}
    assert sorted(p.name for p in run.path.iterdir() if p.name != ".lock") == [
        *("checkpoints", "config.yaml", "environment.json", "run.json", "samples", "tensorboard")
    ]
    run.update(step=7, status="interrupted")
    assert RunDirectory.open(run.path).read() == {"schema_version": 1, **META, "step": 7, "status": "interrupted"}


def test_the_same_config_goes_on_and_keeps_what_is_there(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r").create(CONFIG, META)
    run.update(step=5)
    again = RunDirectory(tmp_path / "r").create(CONFIG, META)
    assert again.read()["step"] == 5


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoints/step-00000010/manifest.json"])
def test_what_is_no_run_is_left_alone(tmp_path: Path, name: str) -> None:
    file = tmp_path / "r" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(UsageError, match="exists and is not a run"):
        RunDirectory(tmp_path / "r").create(CONFIG, META)
    assert tree(tmp_path) == {f"r/{name}": b"precious"}


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("precious")
    with pytest.raises(UsageError, match="a file is in the way"):
        RunDirectory(tmp_path / "r").create(CONFIG, META)
    assert (tmp_path / "r").read_text() == "precious"


def test_a_start_that_was_killed_can_be_repeated(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r").create(CONFIG, META)
    run.run_file.unlink()  # it is written last
    (run.path / ".config.yaml.1.ab.tmp").write_text("half")
    assert RunDirectory(tmp_path / "r").create(CONFIG, META).read()["step"] == 0


def test_open_wants_a_run_of_this_version(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a run \(no run\.json\)"):
        RunDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text('{"schema_version": 2}')
    with pytest.raises(UsageError, match="schema version 2; this rgbench reads 1"):
        RunDirectory.open(tmp_path).read()
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UsageError, match="schema version None"):
        RunDirectory.open(tmp_path).read()


@pytest.mark.parametrize("key", ["world", "method"])
@pytest.mark.parametrize("name", ["../../escaped", "/abs", "..", ".partial", "a\\b", "", 3, None, "a\nb", "x" * 300])
def test_fields_that_become_folders_cannot_lead_elsewhere(tmp_path: Path, key: str, name: object) -> None:
    run = RunDirectory(tmp_path / "r").create(CONFIG, META | {key: name})
    with pytest.raises(UsageError, match=rf"run\.json: {key} .* is not the name of a folder"):
        run.read()


@pytest.mark.parametrize("name", ["benchtop", "my teacher", "模型", "sd_v1.5", "a-b"])
def test_names_of_any_script_are_folders(tmp_path: Path, name: str) -> None:
    assert RunDirectory(tmp_path / "r").create(CONFIG, META | {"world": name}).read()["world"] == name


HOLDER = """
import sys
from rgbench.core.run import RunDirectory
RunDirectory(sys.argv[1]).create({"kind": "lrm"}, {"step": 0})
print("held", flush=True)
sys.stdin.read()
"""


def test_one_writer_at_a_time_and_a_kill_releases(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "r")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process is training this run"):
            RunDirectory(tmp_path / "r").create({"kind": "lrm"}, {"step": 0})
        holder.kill()
    assert RunDirectory(tmp_path / "r").create({"kind": "lrm"}, {"step": 0}).read()["step"] == 0


def test_the_log_survives_a_torn_line_and_rewinds(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r").create(CONFIG, META)
    assert run.read_log() == []
    rows = [{"step": step, "loss": step / 3} for step in range(1, 6)]
    for row in rows:
        run.log(row)
    with open(run.log_file, "ab") as file:
        file.write(b'{"step": 6, "lo')
    assert run.read_log() == rows
    for step in (True, 10**25):  # no step of a run
        run.log({"step": step})
    assert run.read_log() == rows
    run.rewind_log(3)
    assert run.read_log() == rows[:3]
    run.log(rows[3])
    assert run.read_log() == rows[:4]


def test_a_torn_line_does_not_swallow_the_next_row(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r").create(CONFIG, META)
    run.log({"step": 1})
    with open(run.log_file, "ab") as file:
        file.write(b'{"step": 2')
    run.rewind_log(10)
    run.log({"step": 2})
    assert run.read_log() == [{"step": 1}, {"step": 2}]


def test_nan_in_the_log_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r").create(CONFIG, META)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.log({"step": 1, "loss": float("nan")})
    assert run.read_log() == []


def test_seeds_are_the_same_for_ever() -> None:
    """These numbers are a promise: a resumed run must draw what the first process would have drawn."""
    assert stream_seed(0, "noise", 0) == GOLDEN_SEEDS[0]
    assert stream_seed(7, "timesteps", 12, 3) == GOLDEN_SEEDS[1]


GOLDEN_SEEDS = (8_372_154_264_372_198_063, 3_843_270_550_364_433_970)

NATURAL = st.integers(0, 2**40)
KEY = st.tuples(NATURAL, st.text(max_size=8), NATURAL, NATURAL)


@given(KEY, KEY)
def test_different_draws_have_different_seeds(one: tuple[int, str, int, int], two: tuple[int, str, int, int]) -> None:
    assert 0 <= stream_seed(*one) < 2**63
    assert (stream_seed(*one) == stream_seed(*two)) == (one == two)


def test_neighbouring_streams_are_independent() -> None:
    draws = np.array([torch.randn(64, generator=stream_generator(0, "noise", step)).numpy() for step in range(64)])
    assert abs(np.corrcoef(draws)[np.triu_indices(64, 1)]).max() < 0.6  # 2,016 pairs of 64: |r| < .55 expected
    again = torch.randn(64, generator=stream_generator(0, "noise", 5)).numpy()
    assert np.array_equal(again, draws[5])


def test_provenance_names_everything() -> None:
    found = provenance()
    assert found["packages"]["torch"] and found["python"].startswith("3.")
    assert found["time"].endswith("+00:00") and found["threads"] >= 1 and found["device"]
    if found["git"] is not None:
        assert len(found["git"]["revision"]) == 40
