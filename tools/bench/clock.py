"""Time on a CPU or a GPU: stamps that cost no synchronisation, medians, intervals, alternation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

LEVEL = 0.95
NUM_RESAMPLES = 2000


class Clock:
    """Takes stamps of a device's work.

    On a GPU a stamp is a CUDA event on the current stream, read only after the work is done; on a CPU it is the time.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def stamp(self) -> Any:
        """Now, in the order of the device's work."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one stamp to another, after :meth:`wait`."""
        return start.elapsed_time(end) / 1000 if self.is_cuda else end - start

    def seconds(self, work: Callable[[], Any]) -> float:
        """Wall seconds of one call, its device work done before and after."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Spread:
    """A figure measured several times: its median and the 95 % interval of the median by bootstrap."""

    median: float
    low: float
    high: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From at least one value; of one value the interval is that value."""
        draws = np.random.default_rng(0).integers(0, len(values), (NUM_RESAMPLES, len(values)))
        medians = np.median(np.asarray(values, dtype=np.float64)[draws], axis=1)
        low, high = np.quantile(medians, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
        return cls(float(median(values)), float(low), float(high), len(values))

    def to_json(self) -> dict[str, float | int]:
        """Plain data."""
        return {"median": self.median, "low": self.low, "high": self.high, "num": self.num}


def alternate(work: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each piece of work, taken in turn: A B C, A B C, …

    Args:
        work: name → call, each warmed up once before.
        rounds: how often each is timed.
        clock: of the device.
    """
    for call in work.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            seconds[name].append(clock.seconds(call))
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times faster, pair by pair: the machine's drift is in both of a pair."""
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])
