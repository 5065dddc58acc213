"""What a run has cost so far, over all its interruptions."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

SUMMED: tuple[str, ...] = ("cpu_sec", "gpu_sec")
PEAKS: tuple[str, ...] = ("peak_rss_gib", "peak_gpu_gib")
GPU_KEYS = ("gpu_sec", "peak_gpu_gib")
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


class CostMeter:
    """Adds up wall and CPU time, images, reward calls and peak memory.

    Args:
        before: an earlier :meth:`read` to go on from, or None.
        device_type: where the run computes; a GPU's time counts only for ``cuda``, whatever else the process did.
    """

    def __init__(self, before: dict[str, Any] | None = None, device_type: str = "cpu") -> None:
        self._before, self._on_gpu = before or {}, device_type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self.images, self.reward_calls = self._before.get("images", 0), self._before.get("reward_calls", 0)

    def read(self) -> dict[str, Any]:
        """``wall_sec`` and ``cpu_sec`` of this process, ``images`` trained on, ``reward_calls`` (images that the expert
        scored), ``peak_rss_gib``; of a run on a CUDA GPU, ``gpu_sec`` for which it held it and ``peak_gpu_gib``.
        """
        rss_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES / 2**30
        return {
            "wall_sec": round(self._before.get("wall_sec", 0.0) + time.monotonic() - self._wall, 3),
            "cpu_sec": round(self._before.get("cpu_sec", 0.0) + time.process_time() - self._cpu, 3),
            "images": self.images,
            "reward_calls": self.reward_calls,
            "peak_rss_gib": round(max(self._before.get("peak_rss_gib", 0.0), rss_gib), 4),
            **self._gpu(),
        }

    def _gpu(self) -> dict[str, float]:
        """Seconds for which a GPU was held, busy or not, as clusters bill them; nothing where none ever was."""
        spent = {key: self._before[key] for key in GPU_KEYS if key in self._before}
        if self._on_gpu:
            held_sec = spent.get("gpu_sec", 0.0) + time.monotonic() - self._wall
            peak_gib = max(spent.get("peak_gpu_gib", 0.0), torch.cuda.max_memory_allocated() / 2**30)
            spent = {"gpu_sec": round(held_sec, 3), "peak_gpu_gib": round(peak_gib, 4)}
        return spent


def of_all_ranks(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """The cost of a run from its ranks' :meth:`CostMeter.read`, the main one's first.

    CPU and GPU time add up, peaks are those of the largest process, and all else the main rank has counted for all.
    """
    own = costs[0]
    summed = {key: round(sum(cost.get(key, 0.0) for cost in costs), 3) for key in SUMMED if key in own}
    peaks = {key: max(cost.get(key, 0.0) for cost in costs) for key in PEAKS if key in own}
    return {**own, **summed, **peaks}
