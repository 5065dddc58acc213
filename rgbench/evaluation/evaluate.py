"""One pass over a model's images through all metrics; each figure is stored as soon as it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.text import Text

from rgbench.data.prompts import PromptSet
from rgbench.errors import Interrupted, RgbenchError
from rgbench.evaluation.generate import ImageStream, settle_sampling
from rgbench.evaluation.pictures import KeptImages
from rgbench.evaluation.results import (
    Generation,
    Protocol,
    Result,
    generation_folder,
    identify,
    result_file,
    write_result,
)
from rgbench.evaluation.targets import Target
from rgbench.metrics.contract import Accumulator, Context, Measurement, Quantity
from rgbench.metrics.features import EffLite0Set
from rgbench.metrics.reference import from_uint8
from rgbench.models import DiffusionModels, load_models
from rgbench.registry import resolve
from rgbench.run import provenance
from rgbench.trainers.stop import StopRequest


@dataclass(frozen=True)
class Job:
    """What is asked of every target of one command.

    Attributes:
        metrics: names in the registry.
        prompts: one image each.
        features: of the real scenes for these prompts.
        results: the results folder.
        seed: of the noise.
        steps: sampling steps, or None for each target's own.
        guidance: guidance scale, or None likewise.
        batch_size: images at once.
        device: where everything runs.
        force: measure again what is there already.
        keep_images: how many of the first images are kept as PNG.
        command: the command line, for the records.
        stop: a signal to stop, noted.
        progress: where it is shown.
    """

    metrics: tuple[str, ...]
    prompts: PromptSet
    features: EffLite0Set
    results: Path
    seed: int
    steps: int | None
    guidance: float | None
    batch_size: int
    device: torch.device
    force: bool
    keep_images: int
    command: str
    stop: StopRequest
    progress: Progress

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
        return Interrupted(kept, resume_command=self.command, exit_code=self.stop.exit_code)


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
    models = load_models(target.folder, job.device, torch.float32)
    sampling = settle_sampling(target, models, job.steps, job.guidance)
    generation = sampling.generation(models)
    folder = generation_folder(job.results, target.world, target.name, generation)
    context = _context(target, models, job)
    metrics = [(name, resolve("metric", name)(context)) for name in job.metrics]
    wanted = [_file(folder, quantity) for _, metric in metrics for quantity in metric.quantities]
    pending = [pair for pair in metrics if job.force or not _stored(folder, pair[1])]
    if len(pending) < len(metrics):
        done = ", ".join(name for name, metric in metrics if (name, metric) not in pending)
        job.progress.console.print(f"{target.name}, {generation.id}: {done}: there already (--force measures again)")
    kept = KeptImages(folder / "images", job.prompts.prompts[: job.keep_images], job.seed, job.force)
    prompts = job.prompts.prompts if pending else kept.missing
    if prompts:
        stream = ImageStream(models, prompts, sampling, job.seed, job.batch_size)
        _run_through(stream, [metric for _, metric in pending], kept, target.name, job)
        record = _Record(target, job, generation, stream)
        for name, metric in pending:
            job.check_stop()
            task = job.progress.add_task(f"{target.name}: {name}", total=None)
            for measurement in metric.finish():
                record.write(measurement)
                job.progress.console.print(Text(f"  {_shown(measurement)}"))
            job.progress.remove_task(task)
    return wanted


def _context(target: Target, models: DiffusionModels, job: Job) -> Context:
    return Context(
        prompts=job.prompts,
        seed=job.seed,
        resolution=models.resolution,
        reference=job.features.scenes,
        features=job.features,
        reward_folder=target.preset.root / target.preset.reward,
        judges_folder=target.preset.root / "judges",
        trained_rewards=target.rewards,
        device=job.device,
    )


def _run_through(stream: ImageStream, metrics: Sequence[Accumulator], kept: KeptImages, name: str, job: Job) -> None:
    settings = stream.sampling
    label = f"{name}: {settings.sampler}, {settings.steps} steps, guidance {settings.guidance_scale:g}"
    task = job.progress.add_task(label, total=len(stream.prompts))
    for batch in stream:
        job.check_stop()
        kept.keep(batch)
        images = from_uint8(batch.images).to(job.device)
        for metric in metrics:
            metric.update(images, batch.prompts, batch.positions)
        job.progress.advance(task, len(batch.prompts))
    job.progress.remove_task(task)


class _Record:
    """Turns measurements of one model into result files."""

    def __init__(self, target: Target, job: Job, generation: Generation, stream: ImageStream) -> None:
        self.target, self.job, self.generation = target, job, generation
        self.provenance = provenance()
        self.cost = {
            "train_wall_sec": target.cost.get("wall_sec"),
            "train_cpu_sec": target.cost.get("cpu_sec"),
            "peak_rss_gib": target.cost.get("peak_rss_gib"),
            "reward_calls": target.cost.get("reward_calls"),
            "generate_images_per_sec": stream.images_per_sec,
            "nfe": stream.sampling.network_evaluations,
        }

    def write(self, measurement: Measurement) -> Path:
        """Store one figure.

        Raises:
            RgbenchError: it is not finite.
        """
        name = measurement.quantity.metric.name
        if measurement.value is not None and not math.isfinite(measurement.value):
            raise RgbenchError(f"{self.target.name}: metric {name} is {measurement.value}; not stored")
        result = Result(
            world=self.target.world,
            model=self.target.name,
            method=self.target.method,
            training_seed=self.target.training_seed,
            training=dict(self.target.training),
            generation=self.generation,
            metric=measurement.quantity.metric,
            protocol=_protocol(measurement.quantity),
            value=measurement.value,
            interval=measurement.interval,
            num_samples=measurement.num_samples,
            flags=measurement.flags,
            in_sample=measurement.in_sample,
            trained_rewards=tuple(entry["fingerprint_id"] for entry in self.target.rewards),
            extra=dict(measurement.extra),
            cost=self.cost,
            provenance=self.provenance,
            command=self.job.command,
        )
        return write_result(self.job.results, result, self._rows(measurement))

    def _rows(self, measurement: Measurement) -> dict[str, list[Any]] | None:
        if measurement.rows is None:
            return None
        prompts = self.job.prompts.prompts
        return {
            "prompt_id": [prompt.id for prompt in prompts],
            "seed": [self.job.seed] * len(prompts),
            "group": [prompt.group for prompt in prompts],
            "value": measurement.rows.tolist(),
        }


def _protocol(quantity: Quantity) -> Protocol:
    num = quantity.protocol["prompts"]["num"]
    return Protocol(id=identify(f"{quantity.metric.name}-{num}", quantity.protocol), fields=quantity.protocol)


def _stored(folder: Path, metric: Accumulator) -> bool:
    return all(_file(folder, quantity).exists() for quantity in metric.quantities)


def _file(folder: Path, quantity: Quantity) -> Path:
    return result_file(folder, quantity.metric, _protocol(quantity))


def _shown(measurement: Measurement) -> str:
    metric = measurement.quantity.metric
    if measurement.value is None:
        return f"{metric.label}: — ({', '.join(measurement.flags)})"
    text = f"{metric.label}: {measurement.value:.{metric.decimals}f}{f' {metric.unit}' if metric.unit else ''}"
    if measurement.interval:
        low, high = (f"{x:.{metric.decimals}f}" for x in (measurement.interval.low, measurement.interval.high))
        text += f" [{low}, {high}]"
    return text + (f" ({', '.join(measurement.flags)})" if measurement.flags else "")
