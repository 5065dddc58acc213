"""The progress bar of an evaluation: images done, images per second, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from rgbench.metrics.reference import Track


class _Rate(ProgressColumn):
    """Images per second, with all that is done to them."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} images/s" if speed else "")


def image_progress() -> Progress:
    """A progress display on stderr that leaves nothing behind."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def say_above(progress: Progress) -> Callable[[str], None]:
    """Prints a line above the bars, never broken."""

    def say(text: str) -> None:
        progress.console.print(Text(text), soft_wrap=True)

    return say


def track_images(progress: Progress) -> Track:
    """Gives batches of images back one by one, with a bar of their own."""

    def track(batches: Sequence[Tensor], what: str) -> Iterable[Tensor]:
        task = progress.add_task(what, total=sum(map(len, batches)))
        for batch in batches:
            yield batch
            progress.advance(task, len(batch))
        progress.remove_task(task)

    return track
