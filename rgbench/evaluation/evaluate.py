"""One pass over a model's images through all metrics; each figure is stored as soon as it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rgbench.errors import UsageError
from rgbench.evaluation.defaults import fitting_metrics, named_metrics
from rgbench.evaluation.gather import gather
from rgbench.evaluation.generate import ImageStream, settle_sampling
from rgbench.evaluation.given import GivenImages
from rgbench.evaluation.job import ImageSource, Job
from rgbench.evaluation.logged import keep_log
from rgbench.evaluation.on_base import load_student, sampled_as
from rgbench.evaluation.partial import FOLDER, Pass
from rgbench.evaluation.pictures import KeptImages
from rgbench.evaluation.progress import bar, track_images
from rgbench.evaluation.record import Record, file_of, is_stored, shown
from rgbench.evaluation.results import generation_folder
from rgbench.evaluation.targets import Target
from rgbench.metrics.contract import Accumulator, Context
from rgbench.metrics.features import FeatureRows
from rgbench.models import load_models
from rgbench.rewards.published import HPS_V21_FILE, PUBLISHED
from rgbench.worlds.presets import JUDGES_FOLDER, Shipped
from rgbench.worlds.scenes import IMAGE_SIZE

BENCHTOP, FULL_SIZE = "benchtop", "full-size"


def evaluate_target(target: Target, job: Job) -> list[Path]:
    """Measure one model: what ``results`` holds already under both ids is left as it is.

    Args:
        target: the model.
        job: what to measure, and how.

    Returns:
        The result files, old and new, in the order of the metrics; none for a shard, whose figures come with
        the merge.

    Raises:
        UsageError: a metric that does not fit the prompts or the model; before any image is made.
        RgbenchError: NaN in images, features or scores; figures already stored stay.
        Interrupted: a signal; they stay likewise.
    """
    with bar(job.progress, f"{target.name}: loading"):
        source = open_target(target, job)
    target = _in_its_world(target, source)
    folder = generation_folder(job.results, target.world, target.name, source.generation)
    rows = FeatureRows(len(job.prompts), job.compared.features.network.num_features)
    context = context_of(target, source, rows, job)
    with bar(job.progress, f"{', '.join(job.metrics)}: loading"):
        metrics = fitting_metrics(job.metrics, context) if job.fitting else named_metrics(job.metrics, context)
    job.compared.check(source.resolution, [quantity for _, metric in metrics for quantity in metric.quantities])
    wanted = [file_of(folder, quantity) for _, metric in metrics for quantity in metric.quantities]
    pending = [pair for pair in metrics if job.force or not is_stored(folder, pair[1])]
    if len(pending) < len(metrics):
        done = ", ".join(name for name, metric in metrics if (name, metric) not in pending)
        job.say(f"{target.name}, {source.generation.id}: {done}: there already (--force measures again)")
    kept = KeptImages(folder / "images", job.prompts.prompts[: job.keep_images], job.force)
    if target.training and target.training["step"] == target.training["steps"]:
        keep_log(target.folder.parent, folder)
    if pending:
        place = job.results / FOLDER / target.world / target.name / source.generation.id
        gathering = Pass(place, source.generation, pending, rows, len(job.prompts))
        if not gather(gathering, source, kept, target.name, job):
            return []
        _finish(pending, Record(target, job, source), target.name, job)
        gathering.forget()
    elif len(kept.positions) and not job.merge:
        with bar(job.progress, f"{target.name}: {source.label}", len(kept.positions)) as task:
            for batch in source.stream(kept.positions, partial(job.progress.advance, task)):
                kept.keep(batch)
    return wanted


def _finish(metrics: Sequence[tuple[str, Accumulator]], record: Record, name: str, job: Job) -> None:
    """Store each metric's figures as soon as they are there."""
    for metric_name, metric in metrics:
        job.check_stop()
        with bar(job.progress, f"{name}: {metric_name}"):
            for measurement in metric.finish():
                record.write(measurement)
                job.say(f"  {shown(measurement)}")


def open_target(target: Target, job: Job) -> ImageSource:
    """Where a target's images come from, as a job asks for them."""
    if target.images:
        track = track_images(job.progress)
        seeds = job.prompts.seeds
        if len(seeds) > 1:
            raise UsageError(f"{target.folder}: holds one image of each prompt; name one of its --seeds")
        return GivenImages(target.folder, job.prompts, job.known, seeds[0], job.batch_size, track)
    if target.student is not None:
        models = load_student(target.student, job.device, job.dtype)
    else:
        models = load_models(target.folder, job.device, job.dtype)
    if job.sampler is not None:
        models = sampled_as(models, job.sampler)
    sampling = settle_sampling(target, models, job.steps, job.guidance)
    stream = ImageStream(models, job.prompts.prompts, sampling, job.batch_size)
    job.say(f"{target.name}: {stream.label}, {models.resolution} px, {stream.generation.fields['dtype']}")
    return stream


def _in_its_world(target: Target, source: ImageSource) -> Target:
    """A model of unknown origin belongs to the benchtop only if it makes images of its size."""
    if target.method == "external" and target.world == BENCHTOP and source.resolution != IMAGE_SIZE:
        return replace(target, world=FULL_SIZE)
    return target


def _reward(target: Target, job: Job) -> Path:
    """The reward model that is asked for, else the world's own; HPSv2.1 where the benchtop's would see nothing."""
    if job.hps is not None:
        return job.hps
    if target.world != FULL_SIZE and isinstance(target.preset.reward, Shipped):
        return target.preset.reward_folder()
    return PUBLISHED["hps 2.1"].find() or Path(HPS_V21_FILE)  # where it is not, those that load it say so


def context_of(target: Target, source: ImageSource, rows: FeatureRows, job: Job) -> Context:
    """What metrics need to know of a target."""
    return Context(
        prompts=job.prompts,
        resolution=source.resolution,
        jpeg=source.jpeg,
        named=job.compared.named,
        departures=job.compared.departures,
        reference=job.scenes,
        features=job.compared.features,
        rows=rows,
        judges=job.judges,
        reward_folder=_reward(target, job),
        judges_folder=JUDGES_FOLDER,
        track=track_images(job.progress),
        trained_rewards=target.rewards,
        device=job.device,
    )
