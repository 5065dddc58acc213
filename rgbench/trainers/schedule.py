"""Learning rates over a run, as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from rgbench.trainers.proxy_config import ScheduleSection


def schedule(section: ScheduleSection, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each optimiser step.

    Args:
        section: ``schedule`` and ``warmup``.
        steps: of the whole run.

    Returns:
        step, from 0 → factor in [0, 1].
    """
    return partial(_factor, section.schedule, section.warmup, steps)


def _factor(kind: str, warmup: int, steps: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
