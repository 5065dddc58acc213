"""What all tests share: no network, a tuned process, hypothesis profiles, the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from rgbench.process import tune_process

ROOT = Path(__file__).parent.parent

# pytest-socket blocks this process; the variables reach the processes that tests start.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", NO_COLOR="1", TERM="dumb")
if "torch" not in sys.modules:
    tune_process()

# Deterministic, so that a failure on one machine is a failure on all; time limits are pytest-timeout's.
settings.register_profile(
    "rgbench", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("rgbench")


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code and output."""

    returncode: int
    stdout: str
    stderr: str


Cli = Callable[..., Finished]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs ``rgbench`` in ``tmp_path``, in this process, which has its imports already."""
    from typer.testing import CliRunner

    from rgbench.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Finished:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)], prog_name="rgbench")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Finished(result.exit_code, result.stdout, result.stderr)

    return run
