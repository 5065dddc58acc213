"""``python -m tools.bench start``: from the command to the first step, and the CPU time of ``--help``."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rgbench.core.errors import RgbenchError
from tools.bench.clock import Spread


def seconds_to_first_step(folder: Path, device: str) -> float:
    """Wall seconds from starting ``rgbench train recipes/lcd.yaml`` to the first row of its log.

    Raises:
        RgbenchError: the training failed.
    """
    log = folder / "log.jsonl"
    settings = ["train.steps=1", "train.log_every=1", "train.sample_every=0"]
    command = [sys.executable, "-m", "rgbench", "train", "lcd", *settings, "--out", str(folder), "--device", device]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None and not log.exists():
                assert process.stderr is not None
                raise RgbenchError(f"{' '.join(command)} failed: {process.stderr.read()[-500:]}")
            time.sleep(0.02)
        found = time.perf_counter() - start
        process.communicate()
    return found


def help_cpu_seconds() -> float:
    """CPU seconds, user and system, of ``rgbench --help``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "rgbench", "--help"], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(folder: Path, device: str, rounds: int) -> dict[str, Any]:
    """Both, several times.

    Args:
        folder: an empty one.
        device: ``cpu`` or ``cuda``.
        rounds: how often.
    """
    return {
        "help_cpu_sec": Spread.of([help_cpu_seconds() for _ in range(rounds)]).to_json(),
        "train_to_first_step_sec": Spread.of(
            [seconds_to_first_step(folder / str(i), device) for i in range(rounds)]
        ).to_json(),
    }
