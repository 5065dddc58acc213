"""What the command line calls: evaluate models, merge shards, sample images.

One ``rgbench eval`` command: its options, the command line that repeats it, and carrying it out.

What is asked of every target of one command, and what a target is to it.

One pass over a model's images through all metrics; each figure is stored as soon as it is made.

The pass over one target's images: in one go, after a stop, as one of several shards, or merged from them.

A pass over images that is not finished: what its metrics gathered so far, in one file.

    results/.partial/{world}/{model}/{generation}/{key}-{K}of{N}.safetensors

The key is a hash of what is being measured. A file serves every evaluation of the same generation whose metrics and
protocols are all in it, so that after a crash the figures that are missing are made without the images. The same file
is a pause (1of1) and a shard's result.

What an evaluation measures where no metric is named: all that fit the model, the prompts and the weights at hand.

Measurements turned into result files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import Progress

from rgbench.benchtop.scenes import IMAGE_SIZE
from rgbench.core.errors import Interrupted, RgbenchError, UsageError
from rgbench.core.io import file_stem, load_safetensors, read_safetensors_metadata, save_safetensors_atomic
from rgbench.core.process import StopRequest, pick_device, take_own_gpu, whole_float32
from rgbench.core.progress import bar, image_progress, say_above, track_images
from rgbench.core.registry import names
from rgbench.core.run import provenance
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts, load_prompts
from rgbench.evaluate.images import GivenImages, ImageBatch, ImageStream, Index, KeptImages, about, settle_sampling
from rgbench.evaluate.results import (
    Generation,
    NewerResult,
    Result,
    generation_folder,
    identify,
    keep_log,
    load_result,
    load_samples,
    result_file,
    write_result,
)
from rgbench.evaluate.results import Protocol as results_Protocol
from rgbench.evaluate.shards import WHOLE, Shard, parse_shard
from rgbench.evaluate.targets import Target, checkpoint_targets, named, own_prompts, resolve_targets, student_target
from rgbench.metrics.base import Accumulator, Measurement, Quantity, absorb, can_be_carried, gathered
from rgbench.metrics.cache import cache_folder, read_whole
from rgbench.metrics.context import Context, SetComparison, settle_comparison
from rgbench.metrics.features import FeatureRows
from rgbench.metrics.reference import ReferenceScenes, SetProtocol, find_protocol, from_uint8
from rgbench.metrics.rewards import check_judges_asked, find_metric, parse_judges
from rgbench.models.pipeline import load_models
from rgbench.models.presets import JUDGES_FOLDER
from rgbench.models.student import load_student, sampled_as
from rgbench.rewards.config import HPS_V21_FILE, PUBLISHED


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


def protocol_of(quantity: Quantity) -> results_Protocol:
    """The protocol id and its fields."""
    fields = quantity.protocol
    name = fields.get("protocol") or f"{quantity.metric.name}-{fields['prompts']['num']}"
    return results_Protocol(id=identify(name, fields), fields=fields)


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


FOLDER = ".partial"


class Pass:
    """One pass over a generation's images through some metrics.

    Args:
        folder: of unfinished passes of this generation.
        generation: how the images are made.
        metrics: name on the command line, metric.
        rows: features of the evaluated images, shared by the set metrics.
        num: positions of the prompt set.
    """

    def __init__(
        self,
        folder: Path,
        generation: Generation,
        metrics: Sequence[tuple[str, Accumulator]],
        rows: FeatureRows,
        num: int,
    ) -> None:
        self.folder, self.metrics, self.rows = folder, list(metrics), rows
        self.seen = np.zeros(num, dtype=bool)
        self.measured = [[name, *(protocol_of(q).id for q in metric.quantities)] for name, metric in metrics]
        self.key = hashlib.sha256(json.dumps([generation.id, self.measured]).encode()).hexdigest()[:12]
        self._files: set[Path] = set()

    def file(self, shard: Shard) -> Path:
        """Where a share is kept."""
        return self.folder / f"{self.key}-{shard.index}of{shard.count}.safetensors"

    def save(self, shard: Shard, about: Mapping[str, Any]) -> Path:
        """Store what was gathered.

        Args:
            shard: whose it is.
            about: JSON values that say how it was made.
        """
        positions = np.flatnonzero(self.seen)
        arrays = {"positions": positions}
        for name, metric in self.metrics:
            arrays |= {f"{name}/{key}": array for key, array in gathered(metric, positions).items()}
        if self.rows.used:
            arrays["features"] = self.rows.everything()[positions]
        tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
        path = self.file(shard)
        cache_folder(path.parent)
        told = {"about": json.dumps(about), "measured": json.dumps(self.measured)}
        save_safetensors_atomic({**tensors, "sha256": _digest(tensors)}, path, told)
        self._files.add(path)
        return path

    def load(self, shard: Shard) -> bool:
        """Take in a stored share; whether there was one that is whole."""
        path = self._find(shard)
        tensors = read_whole(path, partial(_tensors, path)) if path else None
        if path is None or tensors is None:
            return False
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        positions = arrays["positions"]
        assert not self.seen[positions].any(), "one image in two shards"
        for name, metric in self.metrics:
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            absorb(metric, positions, own)
        if "features" in arrays:
            self.rows.put(positions, tensors["features"])
        self.seen[positions] = True
        self._files.add(path)
        return True

    def _find(self, shard: Shard) -> Path | None:
        """The file of a share: this pass's own, else one of more metrics."""
        others = sorted(self.folder.glob(f"*-{shard.index}of{shard.count}.safetensors"))
        for path in sorted(others, key=lambda path: path != self.file(shard)):
            measured = read_whole(path, partial(_measured, path))
            if measured is not None and all(each in measured for each in self.measured):
                return path
        return None

    def forget(self) -> None:
        """Remove the files that this pass wrote or went on from; its figures are stored."""
        for path in self._files:
            path.unlink(missing_ok=True)


def stored_shards(results: Path) -> dict[Path, dict[str, Any]]:
    """Files of shards under a results folder, and what each says of how it was made.

    Raises:
        UsageError: a damaged file.
    """
    found = {}
    for path in sorted((results / FOLDER).rglob("*of*.safetensors")):
        if path.stem.endswith("-1of1"):
            continue
        told = read_safetensors_metadata(path).get("about")
        if told is None:
            raise UsageError(f"{path}: no shard of an evaluation, for it does not say how it was made; remove it")
        found[path] = json.loads(told)
    return found


def _measured(path: Path) -> list[list[str]]:
    """Metrics and protocols that a share holds; none of a foreign file."""
    measured: list[list[str]] = json.loads(read_safetensors_metadata(path).get("measured", "[]"))
    return measured


def _tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """A share's tensors; None where they do not match their checksum."""
    tensors = load_safetensors(path)
    told = tensors.pop("sha256", torch.empty(0))
    return tensors if torch.equal(told, _digest(tensors)) else None


def _digest(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


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


FOR_OWN_IMAGES = ("fid", "kid", "prdc", "vendi", "hps", "probes")
NAMED_ONLY = (
    "fid_inf",
    "hps_jpeg75",
    "cmmd",
    "clip_score",
    "pickscore",
    "aesthetic",
    "hpsv3",
    "imagereward",
    "vqascore",
)  # many images, or weights of their own

log = logging.getLogger(__name__)


def default_metrics(own_images: bool) -> list[str]:
    """Metrics that an evaluation takes when none is named.

    Args:
        own_images: it compares with the user's real images, for which no scenes are known.
    """
    return list(FOR_OWN_IMAGES) if own_images else [name for name in names("metric") if name not in NAMED_ONLY]


def named_metrics(wanted: Sequence[str], context: Context) -> list[tuple[str, Accumulator]]:
    """Metrics by name, ready for images.

    Args:
        wanted: names.
        context: of the evaluation.

    Raises:
        UsageError: one does not fit.
    """
    return [(name, find_metric(name, context.judges)(context)) for name in wanted]


def fitting_metrics(wanted: Sequence[str], context: Context) -> list[tuple[str, Accumulator]]:
    """Those of some metrics that fit; what does not is told with its reason.

    Args:
        wanted: names.
        context: of the evaluation.

    Raises:
        UsageError: none fits.
    """
    made: list[tuple[str, Accumulator]] = []
    left_out: dict[str, list[str]] = {}
    for name in wanted:
        try:
            made += named_metrics([name], context)
        except UsageError as error:
            left_out.setdefault(str(error).removeprefix(f"metric {name}: "), []).append(name)
    for reason, of in left_out.items():
        log.warning("left out: %s: %s", ", ".join(of), reason)
    if not made:
        raise UsageError(f"none of the metrics {', '.join(wanted)} fits; name one with --metric")
    return made


EVALUATE_BENCHTOP, FULL_SIZE = "benchtop", "full-size"


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
    if target.method == "external" and target.world == EVALUATE_BENCHTOP and source.resolution != IMAGE_SIZE:
        return replace(target, world=FULL_SIZE)
    return target


def _reward(target: Target, job: Job) -> Path:
    """The reward model that is asked for, else the world's own; HPSv2.1 where the benchtop's would see nothing."""
    if job.hps is not None:
        return job.hps
    if target.world != FULL_SIZE and target.preset.root:
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


NUM_IMAGES = 2048  # the benchtop protocol's n: above the 1,280 features of its Fréchet distance
CHECKPOINT_IMAGES = 8  # kept of each checkpoint, for the slider of the report's page
CACHE = ".cache"
BENCHTOP = "benchtop"
OF_MODELS = ("sampler", "steps", "guidance", "dtype", "checkpoints")  # options that a folder of images has no use for


@dataclass(frozen=True)
class Options:
    """What was asked for; the fields are the arguments of :func:`rgbench.evaluate.evaluate.evaluate`."""

    targets: tuple[str, ...]
    metrics: tuple[str, ...]
    num: int | None = None
    seeds: str = "0"
    base: str | None = None
    unet: Path | None = None
    lora: Path | None = None
    prompts: str | None = None
    protocol: str | None = None
    reference: Path | None = None
    inception: Path | None = None
    hps: Path | None = None
    judge: tuple[str, ...] = ()
    runs: Path = Path("runs")
    results: Path = Path("results")
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    force: bool = False
    keep_images: int = 64
    save_images: bool = False
    checkpoints: bool = False

    def command(self) -> str:
        """The command line, with the options that differ from the defaults."""
        words = ["rgbench", "eval", *self.targets, *(["--metric", ",".join(self.metrics)] if self.metrics else [])]
        for each_field in fields(self):
            value = getattr(self, each_field.name)
            if each_field.default is not MISSING and value != each_field.default:
                flag = f"--{each_field.name.replace('_', '-')}"
                for each in value if isinstance(value, tuple) else (value,):
                    words += [flag, *([] if each is True else [str(each)])]
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Options:
        """From :meth:`to_json`.

        Raises:
            UsageError: what another version of rgbench wrote.
        """
        values: dict[str, Any] = dict(told)
        if values.keys() != {field.name for field in fields(cls)}:
            raise UsageError("the shards are another rgbench's; merge them with the one that made them")
        for name in ("targets", "metrics", "judge"):
            values[name] = tuple(values[name])
        for name in ("unet", "lora", "reference", "inception", "hps", "runs", "results"):
            values[name] = None if values[name] is None else Path(values[name])
        return cls(**values)


def carry_out(options: Options, shard: Shard = WHOLE, merge: bool = False) -> list[Path]:
    """Evaluate every target, or one share of its images, or merge its shares.

    Args:
        options: what is asked for.
        shard: the share.
        merge: put the ``shard.count`` finished shares together; no image is made.

    Returns:
        The result files.

    Raises:
        UsageError: see :func:`rgbench.evaluate.evaluate.evaluate`.
        Interrupted: likewise.
    """
    judges = parse_judges(options.judge)
    check_judges_asked(judges, options.metrics)
    for name in options.metrics:
        find_metric(name, judges)
    given = {"--hps": options.hps, **{f"--judge {name}": path for name, path in judges.items()}}
    for flag, path in given.items():
        if path is not None and not path.exists():
            raise UsageError(f"{flag}: {path}: no such file or folder")
    if options.results.exists() and not options.results.is_dir():
        raise UsageError(f"--results {options.results}: is a file; name the folder of result files")
    asked = load_prompts(options.prompts) if options.prompts not in (None, BENCHTOP) else None
    targets = _targets(options)
    _check_of_use(options, targets)
    protocol = find_protocol(options.protocol) if options.protocol else None
    seeds = parse_seeds(options.seeds)
    prompts, known = _prompts(options, asked, protocol, targets, seeds)
    place = torch.device(pick_device(options.device))
    if place.type == "cuda":
        take_own_gpu()
    files: list[Path] = []
    with (
        StopRequest() as stop,
        image_progress() as progress,
        TemporaryDirectory(prefix="rgbench-") as scratch,
        whole_float32(),
    ):
        track, say = track_images(progress), say_above(progress)
        scenes = ReferenceScenes(prompts, options.results / CACHE, track)
        say(prompts.describe())
        compared = settle_comparison(protocol, options.reference, options.inception, prompts, scenes, place, track, say)
        job = Job(
            metrics=options.metrics or tuple(default_metrics(bool(options.protocol or options.reference))),
            fitting=not options.metrics,
            prompts=prompts,
            known=known,
            scenes=scenes,
            compared=compared,
            results=options.results,
            sampler=options.sampler,
            steps=options.steps,
            guidance=options.guidance,
            batch_size=options.batch_size,
            device=place,
            dtype=getattr(torch, options.dtype),
            hps=options.hps,
            judges=judges,
            force=options.force,
            keep_images=len(prompts) if options.save_images else options.keep_images,
            command=options.command(),
            stop=stop,
            progress=progress,
            shard=shard,
            merge=merge,
            about={"options": options.to_json(), "count": shard.count},
        )
        try:
            for target in targets:
                for earlier in checkpoint_targets(target, Path(scratch)) if options.checkpoints else ():
                    few = min(job.keep_images, CHECKPOINT_IMAGES)
                    files += evaluate_target(earlier, replace(job, keep_images=few))
                files += evaluate_target(target, job)
        except KeyboardInterrupt as error:  # a second Ctrl-C: not even this batch is waited for
            raise job.stopped() from error
    return files


def _check_of_use(options: Options, targets: Sequence[Target]) -> None:
    """What is asked of the making of images, where they are made already, would be left undone in silence."""
    default = Options((), ())
    unused = [name for name in OF_MODELS if getattr(options, name) != getattr(default, name)]
    if unused and all(target.images for target in targets):
        flags = ", ".join(f"--{name}" for name in unused)
        raise UsageError(f"{flags}: says how images are made; {targets[0].folder} holds finished ones")


def parse_seeds(text: str) -> list[int]:
    """Noise seeds from ``0,1,7`` or ``0-7``.

    Raises:
        UsageError: neither, or one twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise UsageError(f"--seeds {text!r}: expected numbers from 0, such as 0,1,7 or 0-7")
        seeds += range(int(ends[0]), int(ends[-1]) + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text!r}: names {'no seed' if not seeds else 'a seed twice'}")
    return seeds


def _targets(options: Options) -> list[Target]:
    if options.base is None:
        if options.unet or options.lora:
            raise UsageError("--unet and --lora need --base: the preset or folder that the student was trained from")
        return resolve_targets(options.targets, options.runs)
    student = student_target(options.base, options.unet, options.lora)
    return [*(resolve_targets(options.targets, options.runs) if options.targets else ()), student]


def _prompts(
    options: Options,
    asked: PromptSet | None,
    protocol: SetProtocol | None,
    targets: Sequence[Target],
    seeds: Sequence[int],
) -> tuple[PromptSet, PromptSet]:
    """What is measured, and all of the list that its prompts are the first of: ``asked`` if a file was named."""
    if protocol is not None and options.prompts is None:
        raise UsageError(
            f"protocol {protocol.name}: give its captions with --prompts FILE (a caption list, or COCO's own)"
        )
    known = asked or _known_prompts(options, targets, seeds[0])
    num = options.num
    if protocol is not None and num is None:
        num = min(protocol.num_prompts, len(known))
    return (known if num is None else known.first(num)).with_seeds(seeds), known


def _known_prompts(options: Options, targets: Sequence[Target], seed: int) -> PromptSet:
    """All prompts of a folder of images, or of the benchtop's list, which has no end, as many as are wanted."""
    path, num = options.prompts, options.num
    if path is None and len(targets) == 1 and targets[0].images:
        return own_prompts(targets[0].folder, seed)
    given = any(target.images for target in targets)
    return benchtop_prompts(max(num or NUM_IMAGES, NUM_IMAGES if given else 0))


def evaluate(
    targets: Sequence[str],
    metrics: Sequence[str] = (),
    *,
    num: int | None = None,
    seeds: str = "0",
    base: str | None = None,
    unet: Path | None = None,
    lora: Path | None = None,
    prompts: str | None = None,
    protocol: str | None = None,
    reference: Path | None = None,
    inception: Path | None = None,
    hps: Path | None = None,
    judge: Sequence[str] = (),
    runs: Path = Path("runs"),
    results: Path = Path("results"),
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    force: bool = False,
    keep_images: int = 64,
    save_images: bool = False,
    checkpoints: bool = False,
    shard: str | None = None,
) -> list[Path]:
    """Generate images of each target in one pass through all metrics; store each figure as soon as it is made.

    Args:
        targets: run folders or names, pipeline folders, folders of images, "teacher"; none for every finished run
            and its teacher.
        metrics: names in the registry; none for all that fit, and what does not is told.
        num: prompts; 2,048 by default, or all of a prompt file.
        seeds: of the noise, like "0,1,7" or "0-7": an image of each prompt for each.
        base: preset or pipeline folder of a student that is given as a part, one more target.
        unet: the student's UNet: a folder in diffusers' layout or a weight file.
        lora: the student's LoRA.
        prompts: a prompt file, or "benchtop"; by default the list of a folder of images, else the benchtop's.
        protocol: a named protocol of the set metrics; see ``rgbench ls protocols``.
        reference: folder of real images, such as COCO's val2014, that set metrics and probes compare with; the
            benchtop's scenes by default.
        inception: the Inception file of a named protocol, if not in its usual place.
        hps: the reward model: an HPS checkpoint file or an open_clip folder; the world's own by default.
        judge: weights of held-out judges, each ``NAME=PATH``; the published ones in the local caches by default.
        runs: folder of runs.
        results: folder of result files.
        sampler: "ddim" or "lcm"; by default what each target's scheduler says.
        steps: sampling steps; each target's own by default.
        guidance: guidance scale in the pipelines' form; likewise.
        batch_size: images at once; by default what fits into memory, 64 at most.
        device: "auto", "cpu" or "cuda".
        dtype: of the networks that make images: "float32", "bfloat16" or "float16".
        force: measure again what is there already.
        keep_images: how many of the first images are kept as PNG.
        save_images: keep all of them.
        shard: the share of the images that this process makes, "3/64" or "auto"; :func:`merge` then gives the figures.
        checkpoints: of each run the checkpoints that it kept too, before the run itself; of these 8 images are kept.

    Returns:
        The result files, old and new.

    Raises:
        UsageError: an unknown target or metric, an unfinished run, an empty prompt file, a metric that does not fit.
        RgbenchError: an image, score or figure that is not finite; nothing is stored of it.
        Interrupted: SIGTERM or Ctrl-C; what was stored stays, and the command given goes on.
    """
    options = Options(
        targets=tuple(targets),
        metrics=tuple(dict.fromkeys(metrics)),
        num=num,
        seeds=seeds,
        base=base,
        unet=unet,
        lora=lora,
        prompts=prompts,
        protocol=protocol,
        reference=reference,
        inception=inception,
        hps=hps,
        judge=tuple(judge),
        runs=runs,
        results=results,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        force=force,
        keep_images=keep_images,
        save_images=save_images,
        checkpoints=checkpoints,
    )
    return carry_out(options, parse_shard(shard))


def merge(results: Path = Path("results"), *, device: str = "auto") -> list[Path]:
    """Put the shards of every evaluation under a results folder together, and store the figures.

    Args:
        results: folder of result files; the paths in the shards' options are taken as they were given.
        device: where features of a reference are computed that are not kept yet; the shards' may not be here.

    Returns:
        The result files.

    Raises:
        UsageError: no shard there, or an evaluation whose shards are not all there; says which and how to make them.
    """
    found: dict[str, tuple[Options, int]] = {}
    for told in stored_shards(results).values():
        found.setdefault(json.dumps(told, sort_keys=True), (Options.from_json(told["options"]), told["count"]))
    if not found:
        raise UsageError(f"{results}: no shard to merge; make them with: rgbench eval TARGET --shard 1/N and so on")
    files: list[Path] = []
    for options, count in found.values():
        files += carry_out(replace(options, results=results, device=device), Shard(1, count), merge=True)
    return files


def sample(
    target: str,
    prompts: Sequence[str],
    *,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    device: str = "auto",
    runs: Path = Path("runs"),
) -> list[Path]:
    """Make one image per prompt, a pure function of (model, sampler settings, prompt, seed).

    The file name carries all of these, so nothing else is ever overwritten. ``index.json``
    names for each file the ``noise_seed`` with which
    ``torch.Generator().manual_seed(...)`` gives the same image in a diffusers pipeline.

    Args:
        target: a run folder or name, a pipeline folder, or "teacher".
        prompts: texts.
        out: folder for the PNGs.
        seed: of the noise.
        steps: sampling steps; the target's own by default.
        guidance: guidance scale in the pipelines' form; likewise.
        device: "auto", "cpu" or "cuda".
        runs: folder of runs.

    Returns:
        The PNG files, in the order of the prompts.

    Raises:
        UsageError: no prompt, an empty one, or an unknown target.
    """
    if not prompts or not all(text.strip() for text in prompts):
        raise UsageError("give at least one prompt, and none of them empty")
    found = resolve_targets([target], runs)[0]
    models = load_models(found.folder, pick_device(device), torch.float32)
    sampling = settle_sampling(found, models, steps, guidance)
    prefix = f"{file_stem(found.name)}-{sampling.generation(models).id}"
    index = Index(out)
    settings = {"steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
    files: list[Path] = []
    stream = ImageStream(models, [Prompt(text, text, seed=seed) for text in prompts], sampling, None)
    label = f"{found.name}: {stream.label}"
    with whole_float32(), image_progress() as progress, bar(progress, label, len(prompts)) as task:
        for batch in stream.stream(np.arange(len(prompts)), partial(progress.advance, task)):
            files += index.add(
                (f"{prefix}-{file_stem(prompt.text)}-{seed}.png", image, about(prompt) | settings)
                for prompt, image in zip(batch.prompts, batch.images, strict=True)
            )
    return files
