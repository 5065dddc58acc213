"""What is asked of every target of one command, and what a target is to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import Progress

from rgbench.data.prompts import PromptSet
from rgbench.errors import Interrupted
from rgbench.evaluation.generate import ImageBatch
from rgbench.evaluation.progress import say_above
from rgbench.evaluation.results import Generation
from rgbench.evaluation.set_comparison import SetComparison
from rgbench.evaluation.shards import WHOLE, Shard
from rgbench.metrics.reference import ReferenceScenes
from rgbench.trainers.stop import StopRequest


class ImageSource(Protocol):
    """Where the images of one target come from: a model, or a folder of images.

    Attributes:
        generation: how they were made.
        resolution: their side in pixels.
        jpeg: their loss, as a protocol says it; None for none.
        label: what a progress bar says.
        images_per_sec: of making them; None where they were given.
        network_evaluations: per image; None likewise.
    """

    generation: Generation
    resolution: int

    @property
    def jpeg(self) -> str | None: ...

    @property
    def label(self) -> str: ...

    @property
    def network_evaluations(self) -> int | None: ...

    @property
    def images_per_sec(self) -> float | None: ...

    def stream(self, positions: np.ndarray, step: Callable[[float], None] | None = None) -> Iterator[ImageBatch]:
        """Images at positions of the prompt list, batch by batch; ``step`` is told how many images' work was done."""
        ...


@dataclass(frozen=True)
class Job:
    """What is asked of every target of one command.

    Attributes:
        metrics: names in the registry.
        prompts: one image each.
        known: all prompts that a folder of images may hold images of; ``prompts`` are the first of them.
        scenes: real ones for these prompts.
        compared: what the set metrics compare with.
        results: the results folder.
        steps: sampling steps, or None for each target's own.
        guidance: guidance scale, or None likewise.
        batch_size: images at once, or None for what fits into memory.
        device: where everything runs.
        dtype: of the networks that make images.
        hps: the reward model of ``--metric hps`` and of the probes, or None for the world's.
        force: measure again what is there already.
        keep_images: how many of the first images are kept as PNG.
        command: the command line, for the records.
        judges: weights of held-out judges by name.
        stop: a signal to stop, noted.
        progress: where it is shown.
        shard: the share of the images that this process makes.
        merge: put finished shards together instead of making images.
        about: the options of the command, for the files of shards.
        sampler: "ddim" or "lcm", or None for what each target's scheduler says.
        fitting: leave out metrics that do not fit, and say so.
    """

    metrics: tuple[str, ...]
    prompts: PromptSet
    known: PromptSet
    scenes: ReferenceScenes
    compared: SetComparison
    results: Path
    dtype: torch.dtype
    steps: int | None
    guidance: float | None
    batch_size: int | None
    device: torch.device
    hps: Path | None
    judges: Mapping[str, Path]
    force: bool
    keep_images: int
    command: str
    stop: StopRequest
    progress: Progress
    shard: Shard = WHOLE
    merge: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    fitting: bool = False

    def say(self, text: str) -> None:
        """One line above the progress bars."""
        say_above(self.progress)(text)

    def check_stop(self) -> None:
        """Stop here if a signal asked for it.

        Raises:
            Interrupted: it did.
        """
        if self.stop.signal is not None:
            raise self.stopped()

    def stopped(self) -> Interrupted:
        """The error that says what stays and how to go on."""
        kept = f"evaluation stopped; the figures stored under {self.results} stay"
        command = self.command if self.shard == WHOLE else f"{self.command} --shard {self.shard}"
        return Interrupted(kept, resume_command=command, exit_code=self.stop.exit_code)
