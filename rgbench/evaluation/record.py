"""Measurements turned into result files."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from rgbench.data.prompts import PromptSet
from rgbench.errors import RgbenchError, UsageError
from rgbench.evaluation.job import ImageSource, Job
from rgbench.evaluation.results import (
    NewerResult,
    Protocol,
    Result,
    identify,
    load_result,
    load_samples,
    result_file,
    write_result,
)
from rgbench.evaluation.targets import Target
from rgbench.metrics.contract import Accumulator, Measurement, Quantity
from rgbench.run import provenance

log = logging.getLogger(__name__)


class Record:
    """Turns measurements of one model into result files."""

    def __init__(self, target: Target, job: Job, source: ImageSource) -> None:
        self.target, self.job, self.generation = target, job, source.generation
        self.provenance = provenance(job.device.type)
        self.cost = {
            "train_wall_sec": target.cost.get("wall_sec"),
            "train_cpu_sec": target.cost.get("cpu_sec"),
            "train_gpu_sec": target.cost.get("gpu_sec"),
            "peak_rss_gib": target.cost.get("peak_rss_gib"),
            "peak_gpu_gib": target.cost.get("peak_gpu_gib"),
            "reward_calls": target.cost.get("reward_calls"),
            "generate_images_per_sec": source.images_per_sec,
            "nfe": source.network_evaluations,
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
            protocol=protocol_of(measurement.quantity),
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
        return write_result(self.job.results, result, sample_rows(measurement, self.job.prompts))


def sample_rows(measurement: Measurement, prompts: PromptSet) -> dict[str, list[Any]] | None:
    """Columns of the per-image file; None for a figure of a whole set."""
    if measurement.rows is None:
        return None
    return {
        "prompt_id": [prompt.id for prompt in prompts.prompts],
        "seed": [prompt.seed for prompt in prompts.prompts],
        "group": [prompt.group for prompt in prompts.prompts],
        "value": measurement.rows.tolist(),
    }


def protocol_of(quantity: Quantity) -> Protocol:
    """The protocol id and its fields."""
    fields = quantity.protocol
    name = fields.get("protocol") or f"{quantity.metric.name}-{fields['prompts']['num']}"
    return Protocol(id=identify(name, fields), fields=fields)


def is_stored(folder: Path, metric: Accumulator) -> bool:
    """Whether a generation's folder holds every figure of a metric; a damaged one is told, and counts as missing.

    Raises:
        NewerResult: a figure of a later rgbench is there, which would be overwritten.
    """
    try:
        return all(file.exists() and _is_whole(file) for file in (file_of(folder, q) for q in metric.quantities))
    except NewerResult:
        raise
    except UsageError as error:
        log.warning("%s; measured again", error)
        return False


def _is_whole(file: Path) -> bool:
    """Whether a result and its per-image rows can be read; raises UsageError where not."""
    load_samples(load_result(file))
    return True


def file_of(folder: Path, quantity: Quantity) -> Path:
    """The result file of a figure."""
    return result_file(folder, quantity.metric, protocol_of(quantity))


def shown(measurement: Measurement) -> str:
    """A figure in one line, for the terminal."""
    metric = measurement.quantity.metric
    if measurement.value is None:
        return f"{metric.label}: — ({', '.join(measurement.flags)})"
    text = f"{metric.label}: {measurement.value:.{metric.decimals}f}{f' {metric.unit}' if metric.unit else ''}"
    if measurement.interval:
        low, high = (f"{x:.{metric.decimals}f}" for x in (measurement.interval.low, measurement.interval.high))
        text += f" [{low}, {high}]"
    return text + (f" ({', '.join(measurement.flags)})" if measurement.flags else "")
