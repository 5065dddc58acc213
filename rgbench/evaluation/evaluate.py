"""One pass over a model's images through all metrics; each figure is stored as soon as it is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.text import Text

from rgbench.evaluation.generate import ImageStream, settle_sampling
from rgbench.evaluation.given import GivenImages
from rgbench.evaluation.job import ImageSource, Job
from rgbench.evaluation.logged import keep_log
from rgbench.evaluation.pictures import KeptImages
from rgbench.evaluation.progress import track_images
from rgbench.evaluation.record import Record, file_of, is_stored, shown
from rgbench.evaluation.results import generation_folder
from rgbench.evaluation.targets import Target
from rgbench.metrics.contract import Accumulator, Context
from rgbench.metrics.reference import from_uint8
from rgbench.models import load_models
from rgbench.registry import resolve


def evaluate_target(target: Target, job: Job) -> list[Path]:
    """Measure one model: what ``results`` holds already under both ids is left as it is.

    Args:
        target: the model.
        job: what to measure, and how.

    Returns:
        The result files, old and new, in the order of the metrics.

    Raises:
        UsageError: a metric that does not fit the prompts or the model; before any image is made.
        RgbenchError: NaN in images, features or scores; figures already stored stay.
        Interrupted: a signal; they stay likewise.
    """
    source = _open(target, job)
    generation = source.generation
    folder = generation_folder(job.results, target.world, target.name, generation)
    context = _context(target, source, job)
    metrics = [(name, resolve("metric", name)(context)) for name in job.metrics]
    wanted = [file_of(folder, quantity) for _, metric in metrics for quantity in metric.quantities]
    pending = [pair for pair in metrics if job.force or not is_stored(folder, pair[1])]
    if len(pending) < len(metrics):
        done = ", ".join(name for name, metric in metrics if (name, metric) not in pending)
        job.progress.console.print(f"{target.name}, {generation.id}: {done}: there already (--force measures again)")
    kept = KeptImages(folder / "images", job.prompts.prompts[: job.keep_images], job.seed, job.force)
    if target.training and target.training["step"] == target.training["steps"]:
        keep_log(target.folder.parent, folder)
    positions = np.arange(len(job.prompts)) if pending else kept.positions
    if len(positions):
        _run_through(source, positions, [metric for _, metric in pending], kept, target.name, job)
        record = Record(target, job, source)
        for name, metric in pending:
            job.check_stop()
            task = job.progress.add_task(f"{target.name}: {name}", total=None)
            for measurement in metric.finish():
                record.write(measurement)
                job.progress.console.print(Text(f"  {shown(measurement)}"))
            job.progress.remove_task(task)
    return wanted


def _open(target: Target, job: Job) -> ImageSource:
    if target.images:
        track = track_images(job.progress)
        return GivenImages(target.folder, job.prompts, job.known, job.seed, job.batch_size, track)
    models = load_models(target.folder, job.device, torch.float32)
    sampling = settle_sampling(target, models, job.steps, job.guidance)
    return ImageStream(models, job.prompts.prompts, sampling, job.seed, job.batch_size)


def _context(target: Target, source: ImageSource, job: Job) -> Context:
    return Context(
        prompts=job.prompts,
        seed=job.seed,
        resolution=source.resolution,
        jpeg=source.jpeg,
        reference=job.features.scenes,
        features=job.features,
        reward_folder=target.preset.root / target.preset.reward,
        judges_folder=target.preset.root / "judges",
        trained_rewards=target.rewards,
        device=job.device,
    )


def _run_through(
    source: ImageSource,
    positions: np.ndarray,
    metrics: Sequence[Accumulator],
    kept: KeptImages,
    name: str,
    job: Job,
) -> None:
    task = job.progress.add_task(f"{name}: {source.label}", total=len(positions))
    for batch in source.stream(positions):
        job.check_stop()
        kept.keep(batch)
        images = from_uint8(batch.images).to(job.device)
        for metric in metrics:
            metric.update(images, batch.prompts, batch.positions)
        job.progress.advance(task, len(batch.prompts))
    job.progress.remove_task(task)
