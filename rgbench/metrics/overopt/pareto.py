"""Reward against set distance: which models no other beats on both."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(rewards: Sequence[float], distances: Sequence[float]) -> list[bool]:
    """Whether each point is on the front: no other has a reward as high and a distance as low, one of them better.

    Args:
        rewards: higher is better.
        distances: lower is better.

    Raises:
        ValueError: unequal lengths.
    """
    points = list(zip(rewards, distances, strict=True))
    return [
        not any(r >= reward and d <= distance and (r, d) != (reward, distance) for r, d in points)
        for reward, distance in points
    ]
