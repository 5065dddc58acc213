"""The pass over one target's images: in one go, after a stop, as one of several shards, or merged from them."""

from __future__ import annotations

import time

import numpy as np

from rgbench.errors import Interrupted, UsageError
from rgbench.evaluation.job import ImageSource, Job
from rgbench.evaluation.matching import named
from rgbench.evaluation.partial import Pass
from rgbench.evaluation.pictures import KeptImages
from rgbench.evaluation.progress import bar, track_images
from rgbench.evaluation.shards import WHOLE, Shard
from rgbench.metrics.carrying import can_be_carried
from rgbench.metrics.reference import from_uint8

SAVE_SEC = 300  # between two saves: what a kill costs at most
WORTH_SEC = 30  # of images that are worth a file before the figures are made of them


def gather(gathering: Pass, source: ImageSource, kept: KeptImages, name: str, job: Job) -> bool:
    """Show the metrics the images.

    Args:
        gathering: the metrics, and what they saw so far.
        source: of the images.
        kept: stores some of them.
        name: of the target, for messages.
        job: what is asked for.

    Returns:
        Whether every image was seen, by this process or by those whose shards were merged.

    Raises:
        UsageError: shards of a metric that cannot be shared, or a merge of shards that are not all there.
        Interrupted: a signal; what was seen is stored.
    """
    unable = [metric_name for metric_name, metric in gathering.metrics if not can_be_carried(metric)]
    if unable and job.shard != WHOLE:
        raise UsageError(f"metric {', '.join(unable)} does not say what it gathers; measure it without --shard")
    if job.merge:
        _merge(gathering, name, job)
        return True
    shard = job.shard
    wanted = shard.positions(len(gathering.seen))
    if not unable and not job.force and gathering.load(shard):
        job.say(f"{name}: goes on after {int(gathering.seen.sum())} of {len(wanted)} images")
    left = wanted[~gathering.seen[wanted]]
    began = time.monotonic()
    try:
        _run_through(gathering, source, left, kept, name, job, savable=not unable)
    except Interrupted:  # raised between batches; a second Ctrl-C comes inside of one, whose sums are then half there
        if not unable and gathering.seen.any():
            gathering.save(shard, job.about)
        raise
    if shard == WHOLE:
        if not unable and time.monotonic() - began > WORTH_SEC:  # a figure may yet fail; the images are kept in mind
            gathering.save(shard, job.about)
        return True
    path = gathering.save(shard, job.about)
    job.say(f"{name}: shard {shard} stored: {path}; when all {shard.count} are there: rgbench merge")
    return False


def _run_through(
    gathering: Pass, source: ImageSource, left: np.ndarray, kept: KeptImages, name: str, job: Job, savable: bool
) -> None:
    saved, done, shown = time.monotonic(), 0, 0.0
    with bar(job.progress, f"{name}: {source.label}", len(left)) as task:

        def step(images: float) -> None:
            nonlocal shown
            shown += images
            job.progress.advance(task, images)

        for batch in source.stream(left, step):
            job.check_stop()
            kept.keep(batch)
            images = from_uint8(batch.images).to(job.device)
            for _, metric in gathering.metrics:
                metric.update(images, batch.prompts, batch.positions)
            gathering.seen[batch.positions] = True
            done += len(batch.prompts)
            step(done - shown)  # what no step has told: given images, or less after a batch that did not fit
            if savable and time.monotonic() - saved > SAVE_SEC:
                gathering.save(job.shard, job.about)
                saved = time.monotonic()


def _merge(gathering: Pass, name: str, job: Job) -> None:
    shards = [Shard(i, job.shard.count) for i in range(1, job.shard.count + 1)]
    for shard in track_images(job.progress)(shards, f"{name}: reading shards", "shards"):
        gathering.load(shard)
    absent = [str(shard) for shard in shards if not gathering.seen[shard.positions(len(gathering.seen))].all()]
    if absent:
        raise UsageError(
            f"{name}: {len(absent)} of {len(shards)} shards are not there or not finished: {named(absent)}; make each "
            f"with: {job.command} --shard {absent[0]}"
        )
