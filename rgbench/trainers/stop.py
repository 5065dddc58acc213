"""SIGTERM and Ctrl-C as a request to save and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Notes the first SIGTERM or SIGINT; the loop asks between two steps.

    A second Ctrl-C interrupts at once; a repeated SIGTERM, as schedulers send it, does not. Outside of the main thread
    nothing is installed, since only that thread receives signals.

    Args:
        deaf_after: ignore both signals on leaving, for a process that others started and stop: it is ending already.

    Attributes:
        signal: number of the signal received, or None.
    """

    def __init__(self, deaf_after: bool = False) -> None:
        self.signal: int | None = None
        self.deaf_after = deaf_after
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.deaf_after else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """75 (resumable) for SIGTERM, 130 for Ctrl-C."""
        return 130 if self.signal == signal.SIGINT else 75
