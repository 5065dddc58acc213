"""A busy process beside the one that is measured, paused and woken in turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tools.bench.clock import Clock, Spread, ratio

BUSY = "while True: pass"


class Neighbour:
    """One process that keeps one core busy while it is awake; use as a context."""

    def __enter__(self) -> Neighbour:
        self._process = subprocess.Popen([sys.executable, "-c", BUSY])
        self.pause()
        return self

    def pause(self) -> None:
        """Let it use no time; returns when it has stopped."""
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def wake(self) -> None:
        """Let it run on."""
        os.kill(self._process.pid, signal.SIGCONT)

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()


def beside(work: Callable[[], Any], rounds: int, clock: Clock) -> dict[str, Any]:
    """Seconds of some work alone and beside a busy process, in turn.

    Args:
        work: one call is timed.
        rounds: how often each way.
        clock: of the device.
    """
    seconds: dict[str, list[float]] = {"idle": [], "busy": []}
    work()
    with Neighbour() as neighbour:
        for _ in range(rounds):
            seconds["idle"].append(clock.seconds(work))
            neighbour.wake()
            try:
                seconds["busy"].append(clock.seconds(work))
            finally:
                neighbour.pause()
    return {
        "idle_sec": Spread.of(seconds["idle"]).to_json(),
        "busy_sec": Spread.of(seconds["busy"]).to_json(),
        "times_idle": ratio(seconds["busy"], seconds["idle"]).to_json(),
    }
