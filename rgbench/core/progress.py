"""Progress bars: a :class:`Track` yields the steps of a long computation and shows rate and time left.

On a terminal they are drawn and vanish; into a file, as of a batch job, a line is written each minute.
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

IMAGES = "images"
LINE_SEC = 60  # between two lines where no bar can be drawn
T = TypeVar("T")


class Track(Protocol):
    """Yields steps one by one and shows the task, its rate and the time left."""

    def __call__(self, steps: Sequence[T], what: str, unit: str = IMAGES) -> Iterable[T]:
        """Yield the steps in order.

        Args:
            steps: each counts by its length where images are counted, else as one.
            what: name of the task.
            unit: of the count, in the plural.
        """
        ...


def untracked(steps: Sequence[T], what: str, unit: str = IMAGES) -> Iterable[T]:
    """Give the steps without a progress bar."""
    return steps


def image_progress() -> Bars:
    """The progress bars of one command."""
    return Bars()


def track_images(progress: Progress) -> Track:
    """Track batches of images, or steps of another unit, with a bar each."""

    def track(steps: Sequence[T], what: str, unit: str = IMAGES) -> Iterable[T]:
        counts = [len(step) if unit == IMAGES else 1 for step in steps]  # type: ignore[arg-type]
        with bar(progress, what, sum(counts), unit) as task:
            for step, count in zip(steps, counts, strict=True):
                yield step
                progress.advance(task, count)

    return track


def say_above(progress: Progress) -> Callable[[str], None]:
    """Print lines above the bars, without wrapping them."""

    def say(text: str) -> None:
        progress.console.print(Text(text), soft_wrap=True)

    return say


@contextmanager
def bar(progress: Progress, what: str, total: int | None = None, unit: str = IMAGES) -> Iterator[TaskID]:
    """Show a bar until its work is done or fails; without a total it shows the time so far."""
    task = progress.add_task(what, total=total, unit=unit)
    try:
        yield task
    finally:
        progress.remove_task(task)


class Bars(Progress):
    """Progress bars on stderr that vanish at the end; where stderr is a file, a line each minute."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), _TimeLeft())
        super().__init__(*columns, console=console or Console(stderr=True), transient=True)
        self._line_time = time.monotonic()

    def stop(self) -> None:
        """End the display, without the empty line that rich would write into a file."""
        if self.console.is_interactive:
            super().stop()
        else:
            self.live.stop()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count steps of a task, and write the line that is due."""
        super().advance(task_id, advance)
        if not self.console.is_terminal and time.monotonic() - self._line_time >= LINE_SEC:
            task = self._tasks[task_id]
            done = f"{int(task.completed):,} of {int(task.total or 0):,}"
            say_above(self)(f"{task.description}: {done}, {rate(task)}, {time_left(task)}")
            self._line_time = time.monotonic()


class _Rate(ProgressColumn):
    """Images per second, with all that is done to them."""

    def render(self, task: Task) -> Text:
        return Text(rate(task))


class _TimeLeft(ProgressColumn):
    """Time that is left."""

    def render(self, task: Task) -> Text:
        return Text(time_left(task))


def rate(task: Task) -> str:
    """Steps per second since the task began, so that batches of minutes have a rate too; "" before the first."""
    if not task.completed or not task.elapsed:
        return ""
    speed = task.completed / task.elapsed
    return f"{speed:.{1 if speed >= 0.95 else 3}f} {task.fields.get('unit', IMAGES)}/s"


def time_left(task: Task) -> str:
    """Time left at that rate, as ``0:01:15``; without a known end, the time so far."""
    if task.total is None:
        return f"{timedelta(seconds=int(task.elapsed or 0))} so far"
    if not task.completed or not task.elapsed:
        return "-:--:-- left"
    seconds = (task.total - task.completed) * task.elapsed / task.completed
    return f"{timedelta(seconds=int(seconds))} left"
