"""What all tests share: no network, a tuned process, hypothesis profiles, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs ``rgbench`` in a process of its own, in ``tmp_path``."""

    def run(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        command = [sys.executable, "-m", "rgbench", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
