"""Long computations give their steps through a :class:`Track`, which may show how far they are.

The progress bars of an evaluation: what is done, at which rate, and the time that is left.

On a terminal they are drawn and vanish; into a file, as of a batch job, a line is written now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

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


LINE_SEC = 60  # between two lines where no bar can be drawn


def rate(task: Task) -> str:
    """Steps per second since the task began; "" before the first. Batches of minutes have one too."""
    if not task.completed or not task.elapsed:
        return ""
    speed = task.completed / task.elapsed
    return f"{speed:.{1 if speed >= 0.95 else 3}f} {task.fields.get('unit', IMAGES)}/s"


def time_left(task: Task) -> str:
    """At that rate, as ``0:01:15``; where no end is known, the time that it took so far."""
    if task.total is None:
        return f"{timedelta(seconds=int(task.elapsed or 0))} so far"
    if not task.completed or not task.elapsed:
        return "-:--:-- left"
    seconds = (task.total - task.completed) * task.elapsed / task.completed
    return f"{timedelta(seconds=int(seconds))} left"


class _Rate(ProgressColumn):
    """Images per second, with all that is done to them."""

    def render(self, task: Task) -> Text:
        return Text(rate(task))


class _TimeLeft(ProgressColumn):
    """Time that is left."""

    def render(self, task: Task) -> Text:
        return Text(time_left(task))


class Bars(Progress):
    """A progress display on stderr that leaves nothing behind; where stderr is a file, a line each minute."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), _TimeLeft())
        super().__init__(*columns, console=console or Console(stderr=True), transient=True)
        self._told = time.monotonic()

    def stop(self) -> None:
        """End the display, without the empty line that rich would write into a file."""
        if self.console.is_interactive:
            super().stop()
        else:
            self.live.stop()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count steps of a task."""
        super().advance(task_id, advance)
        if not self.console.is_terminal and time.monotonic() - self._told >= LINE_SEC:
            task = self._tasks[task_id]
            done = f"{int(task.completed):,} of {int(task.total or 0):,}"
            say_above(self)(f"{task.description}: {done}, {rate(task)}, {time_left(task)}")
            self._told = time.monotonic()


def image_progress() -> Bars:
    """The display of one command."""
    return Bars()


def say_above(progress: Progress) -> Callable[[str], None]:
    """Prints a line above the bars, never broken."""

    def say(text: str) -> None:
        progress.console.print(Text(text), soft_wrap=True)

    return say


def track_images(progress: Progress) -> Track:
    """Gives batches of images, or steps of another unit, back one by one, with a bar of their own."""

    def track(steps: Sequence[T], what: str, unit: str = IMAGES) -> Iterable[T]:
        counts = [len(step) if unit == IMAGES else 1 for step in steps]  # type: ignore[arg-type]
        with bar(progress, what, sum(counts), unit) as task:
            for step, count in zip(steps, counts, strict=True):
                yield step
                progress.advance(task, count)

    return track


@contextmanager
def bar(progress: Progress, what: str, total: int | None = None, unit: str = IMAGES) -> Iterator[TaskID]:
    """A bar that goes when what it shows is done, or has failed; without a total it tells the time so far."""
    task = progress.add_task(what, total=total, unit=unit)
    try:
        yield task
    finally:
        progress.remove_task(task)
