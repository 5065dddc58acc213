"""What a run has cost so far, over all its interruptions."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


class CostMeter:
    """Adds up wall and CPU time, images, reward calls and peak memory.

    Args:
        before: an earlier :meth:`read` to go on from, or None.
    """

    def __init__(self, before: dict[str, Any] | None = None) -> None:
        self._before = before or {}
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self.images, self.reward_calls = self._before.get("images", 0), self._before.get("reward_calls", 0)

    def read(self) -> dict[str, Any]:
        """``wall_sec`` and ``cpu_sec`` of this process, ``images`` trained on, ``reward_calls`` (images that the expert
        scored), ``peak_rss_gib``.
        """
        rss_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES / 2**30
        return {
            "wall_sec": round(self._before.get("wall_sec", 0.0) + time.monotonic() - self._wall, 3),
            "cpu_sec": round(self._before.get("cpu_sec", 0.0) + time.process_time() - self._cpu, 3),
            "images": self.images,
            "reward_calls": self.reward_calls,
            "peak_rss_gib": round(max(self._before.get("peak_rss_gib", 0.0), rss_gib), 4),
        }


def of_all_ranks(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """The cost of a run from its ranks' :meth:`CostMeter.read`, the main one's first.

    CPU time adds up, the peak is that of the largest process, and all else the main rank has counted for all.
    """
    cpu_sec = round(sum(cost["cpu_sec"] for cost in costs), 3)
    return {**costs[0], "cpu_sec": cpu_sec, "peak_rss_gib": max(cost["peak_rss_gib"] for cost in costs)}
