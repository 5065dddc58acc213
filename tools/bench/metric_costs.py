"""``python -m tools.bench metrics``: what each metric costs of 1,000 images, alone and with all others in one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rgbench.core.errors import UsageError
from rgbench.core.registry import resolve
from rgbench.evaluate.evaluate import ImageSource, Job, context_of, open_target
from rgbench.evaluate.images import BATCH_SIZE, ImageBatch
from rgbench.evaluate.targets import Target
from rgbench.metrics.features import FeatureRows
from rgbench.metrics.reference import from_uint8
from tools.bench.clock import Clock

PER = 1000


@dataclass
class _Spent:
    """Seconds of one metric in a pass: until it was made, of each batch, of its figures."""

    made: float
    batches: list[float] = field(default_factory=list)
    finish: float = 0.0

    def row(self, sizes: Sequence[int]) -> dict[str, float]:
        """What it costs once, by image, and at the end; the first batch loads networks."""
        usual = sum(self.batches[1:]) / sum(sizes[1:])
        return {
            "load_sec": self.made + max(0.0, self.batches[0] - usual * sizes[0]),
            "per_1000_sec": PER * usual,
            "finish_sec": self.finish,
        }


def measure(target: Target, job: Job, names: Sequence[str]) -> dict[str, Any]:
    """Make a target's images once, show them to all of its metrics together, then to each metric alone.

    A pass before makes the features of the reference, which later evaluations find.

    Args:
        target: a model.
        job: its metrics are those of the pass together; two images at least, shown in two batches or more.
        names: metrics that are measured alone; one that does not suit the prompts is left out, with the reason.
    """
    job = replace(job, batch_size=min(BATCH_SIZE, len(job.prompts) // 2))
    source = open_target(target, job)
    batches = list(source.stream(np.arange(len(job.prompts))))
    assert source.images_per_sec is not None  # of a model
    sizes, clock = [len(batch.prompts) for batch in batches], Clock(job.device)
    _pass(target, source, batches, job, job.metrics, clock)
    together = _pass(target, source, batches, job, job.metrics, clock)
    alone: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            alone[name] = _pass(target, source, batches, job, [name], clock)[name].row(sizes)
        except UsageError as error:  # as the suite of probes leaves out what does not suit the prompts
            left_out[name] = str(error)
    return {
        "images": len(job.prompts),
        "batch_size": sizes[0],
        "resolution": source.resolution,
        "generation_per_1000_sec": PER / source.images_per_sec,
        "together": {"metrics": list(job.metrics)} | _sum([spent.row(sizes) for spent in together.values()]),
        "alone": alone,
        "left_out": left_out,
    }


def _pass(
    target: Target, source: ImageSource, batches: Sequence[ImageBatch], job: Job, names: Sequence[str], clock: Clock
) -> dict[str, _Spent]:
    """One pass over the images, as an evaluation makes it, timed by metric."""
    rows = FeatureRows(len(job.prompts), job.compared.features.network.num_features)
    context = context_of(target, source, rows, job)
    metrics, spent = {}, {}
    for name in names:
        start = time.perf_counter()
        metrics[name] = resolve("metric", name)(context)
        clock.wait()
        spent[name] = _Spent(time.perf_counter() - start)
    for batch in batches:
        images = from_uint8(batch.images).to(job.device)
        for name, metric in metrics.items():
            spent[name].batches.append(
                clock.seconds(lambda: metric.update(images, batch.prompts, batch.positions))  # noqa: B023
            )
    for name, metric in metrics.items():
        spent[name].finish = clock.seconds(lambda: list(metric.finish()))  # noqa: B023
    return spent


def _sum(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) for key in rows[0]}
