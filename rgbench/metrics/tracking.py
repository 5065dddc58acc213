"""Long computations give their steps through a :class:`Track`, which may show how far they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")

IMAGES = "images"


class Track(Protocol):
    """Gives steps back one by one while it shows what is being done, at which rate, and the time that is left."""

    def __call__(self, steps: Sequence[T], what: str, unit: str = IMAGES) -> Iterable[T]:
        """The steps, in order.

        Args:
            steps: each counts by its length where images are counted, else as one.
            what: is being done.
            unit: that is counted, in the plural.
        """
        ...


def untracked(steps: Sequence[T], what: str, unit: str = IMAGES) -> Iterable[T]:
    """The steps, without a progress bar."""
    return steps
