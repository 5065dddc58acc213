"""Evaluation: one pass over each model's images through all metrics; every value is stored as soon as it is computed.

    targets → images → metrics → values → results

What is stored already under the same generation and protocol is left alone. A pass that was stopped resumes where it
was, and shards of one pass are merged from files (:mod:`rgbench.evaluate.shards`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from rgbench.core.errors import Interrupted, RgbenchError, UsageError
from rgbench.core.io import file_stem
from rgbench.core.process import StopRequest, pick_device, take_own_gpu, whole_float32
from rgbench.core.progress import bar, image_progress, say_above, track_images
from rgbench.core.registry import names, resolve
from rgbench.core.run import RunDirectory, provenance
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts, load_prompts
from rgbench.evaluate.config import BENCHTOP, WHOLE, EvalConfig, Shard, parse_seeds, parse_shard
from rgbench.evaluate.images import (
    GivenImages,
    ImageBatch,
    ImageStream,
    Index,
    Source,
    TextToImage,
    about,
    named,
    own_prompts,
    settle_sampling,
)
from rgbench.evaluate.results import (
    Head,
    ModelResult,
    Run,
    generation_folder,
    load_result,
    stored_keys,
    write_sheet,
    write_training_log,
    write_values,
)
from rgbench.evaluate.shards import FOLDER, Pass, stored_shards
from rgbench.evaluate.targets import (
    Target,
    base_folder,
    check_inputs,
    checkpoint_targets,
    config_targets,
    preset_teacher,
    resolve_targets,
)
from rgbench.metrics.base import Metric
from rgbench.metrics.context import Context, Opponent, SetComparison, settle_comparison
from rgbench.metrics.features import FeatureRows
from rgbench.metrics.protocols import find_protocol
from rgbench.metrics.reference import ReferenceFolder, ReferenceScenes
from rgbench.metrics.rewards import check_judges_asked, find_metric, parse_judges
from rgbench.metrics.values import MetricValue, shipped_infos
from rgbench.models.folder import is_stable_diffusion
from rgbench.models.generic import CallOptions, load_generic
from rgbench.models.pipeline import load_models
from rgbench.models.presets import BENCHTOPS, CLASSIFIERS_FOLDER, REGRESSORS_FOLDER
from rgbench.models.student import Student, load_student, sampled_as
from rgbench.rewards.clip import num_tokens
from rgbench.rewards.config import HPS_V21_FILE, PUBLISHED
from rgbench.train.identity import method_settings

NUM_IMAGES = 2048  # the benchtop protocol's n: above the 1,280 features of its Fréchet distance
CHECKPOINT_IMAGES = 8  # kept of each checkpoint, for the slider of the report's page
CACHE = ".cache"  # under the results: what was read in real images
SAVE_SEC = 300  # between two saves of a pass: what a kill costs at most
WORTH_SEC = 30  # of images that are worth a file before values are computed from them
OF_MODELS = (  # options that finished images have no use for
    *("sampler", "steps", "guidance", "dtype", "checkpoints"),
    *("pipeline_kwargs", "offload", "vae_slicing", "lora_weight"),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What the targets of one evaluation share.

    Attributes:
        config: the options.
        shard: the share of the images that this process makes; when merging, its ``count`` says how many there are.
        merging: put finished shards together instead of making images.
        prompts: one image each.
        known: all prompts that a folder of images may hold images of; ``prompts`` are the first of them.
        scenes: real scenes of these prompts.
        compared: what the set metrics compare with.
        judges: files of held-out rewards by name.
        device: of networks.
        stop: whether a signal asked to stop.
        progress: the display.
    """

    config: EvalConfig
    shard: Shard
    merging: bool
    prompts: PromptSet
    known: PromptSet
    scenes: ReferenceScenes
    compared: SetComparison
    judges: Mapping[str, Path]
    device: torch.device
    stop: StopRequest
    progress: Progress
    provenance: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print a line above the progress bars."""
        say_above(self.progress)(text)

    def check_stop(self, kept: str) -> None:
        """Stop here if a signal asked for it; ``kept`` says what stays.

        Raises:
            Interrupted: it did.
        """
        if self.stop.signal is not None:
            raise self.stopped(kept)

    def stopped(self, kept: str = "results") -> Interrupted:
        """The error that says what stays and how to continue."""
        return Interrupted(
            f"Stopped. Finished {kept} are kept; rerun the command to continue.",
            resume_command=self.config.command(),
            exit_code=self.stop.exit_code,
        )


def evaluate(config: EvalConfig) -> list[ModelResult]:
    """Generate images of each target in one pass through all metrics, and store each value as soon as it is computed.

    Args:
        config: what to evaluate, and how.

    Returns:
        The result of each model and generation, with the values of this evaluation alone, measured now or before;
        none for a shard, whose values come with :func:`merge`.

    Raises:
        UsageError: an unknown target or metric, an unfinished run, an empty prompt file, a metric that does not fit.
        RgbenchError: an image, score or value that is not finite; it is not stored.
        Interrupted: SIGTERM or Ctrl-C; what is stored stays, and the same command continues.
    """
    shard = parse_shard(config.shard)
    if config.shard is not None:  # "auto" means nothing outside of its launcher
        config = config.model_copy(update={"shard": str(shard)})
    return _evaluate(config, shard, merging=False)


def merge(results: Path = Path("results"), *, device: str = "auto") -> list[ModelResult]:
    """Put the shards of every evaluation under a results folder together, and store the values.

    Args:
        results: the folder.
        device: for features of real images that are not cached yet; the shards' may not be here.

    Returns:
        As :func:`evaluate`.

    Raises:
        UsageError: no shard there, or not all of an evaluation; names the missing ones and how to make them.
    """
    found: dict[str, tuple[EvalConfig, int]] = {}
    here = EvalConfig(results=results, device=device)
    for path, stored in stored_shards(results).items():
        try:
            config = EvalConfig(**{**stored["config"], "results": here.results, "device": here.device})
        except (UsageError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: of another rgbench; merge it with the one that made it ({error})") from error
        found.setdefault(json.dumps(stored, sort_keys=True), (config, stored["count"]))
    if not found:
        raise UsageError(f"{results}: no shard to merge; make them with: rgbench eval TARGET --shard 1/N and so on")
    return [result for config, count in found.values() for result in _evaluate(config, Shard(1, count), merging=True)]


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
    dtype: str = "float32",
    pipeline_kwargs: Sequence[str] = (),
    offload: bool = False,
) -> list[Path]:
    """Make one image per prompt, a pure function of (model, sampler settings, prompt, seed).

    The file name holds all of these, so nothing else is ever overwritten. ``index.json`` has for each file the
    ``noise_seed`` with which ``torch.Generator().manual_seed(...)`` makes the same image in a diffusers pipeline.

    Args:
        target: a run folder or name, a pipeline folder, or "teacher".
        prompts: texts.
        out: folder for the PNGs.
        seed: of the noise.
        steps: sampling steps; the target's own by default.
        guidance: guidance scale in the pipelines' form; likewise.
        device: "auto", "cpu" or "cuda".
        runs: folder of runs.
        dtype: floating type of the networks.
        pipeline_kwargs: as of :class:`EvalConfig`.
        offload: likewise.

    Returns:
        The PNG files, in the order of the prompts.

    Raises:
        UsageError: no prompt, an empty one, or an unknown target.
    """
    if not prompts or not all(text.strip() for text in prompts):
        raise UsageError("give at least one prompt, and none of them empty")
    how = {"dtype": dtype, "pipeline_kwargs": tuple(pipeline_kwargs), "offload": offload}
    config = EvalConfig(targets=(target,), runs=runs, **how)
    found = resolve_targets([target], runs)[0]
    models = load_target(found, config, torch.device(pick_device(device)))
    sampling = settle_sampling(found, models, steps, guidance)
    prefix = f"{file_stem(found.name)}-{sampling.generation(models).id}"
    settings = {"steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
    index, files = Index(out), []
    stream = ImageStream(models, [Prompt(text, text, seed=seed) for text in prompts], sampling, None)
    label = f"{found.name}: {stream.label}"
    with whole_float32(), image_progress() as progress, bar(progress, label, len(prompts)) as task:
        for batch in stream.stream(np.arange(len(prompts)), partial(progress.advance, task)):
            files += index.add(
                (f"{prefix}-{file_stem(prompt.text)}-{seed}.png", image, about(prompt).model_dump() | settings)
                for prompt, image in zip(batch.prompts, batch.images, strict=True)
            )
    return files


def default_metrics() -> list[str]:
    """Metrics that are measured where none is named, if they fit."""
    return [name for name in names("metric") if resolve("metric", name).default]


def _evaluate(config: EvalConfig, shard: Shard, merging: bool) -> list[ModelResult]:
    """Evaluate every target, or one share of its images, or merge its shares."""
    results: list[ModelResult | None] = []
    with TemporaryDirectory(prefix="rgbench-") as scratch, open_session(config, shard, merging) as (session, targets):
        keep = config.keep_images
        try:
            for target in targets:
                for earlier in checkpoint_targets(target, Path(scratch)) if config.checkpoints else ():
                    results.append(_evaluate_target(earlier, session, min(keep, CHECKPOINT_IMAGES)))
                results.append(_evaluate_target(target, session, keep))
        except KeyboardInterrupt as error:  # a second Ctrl-C: not even this batch is waited for
            raise session.stopped() from error
    return [result for result in results if result is not None]


@contextmanager
def open_session(
    config: EvalConfig, shard: Shard = WHOLE, merging: bool = False
) -> Iterator[tuple[Session, list[Target]]]:
    """What the targets of an evaluation share, and the targets.

    Args:
        config: the options.
        shard: as in :class:`Session`.
        merging: likewise.

    Raises:
        UsageError: as :func:`evaluate`.
    """
    check_inputs(config)
    judges = parse_judges(config.judge)
    check_judges_asked(judges, config.metrics)
    for name in config.metrics:
        find_metric(name, judges)
    targets = config_targets(config)
    _refuse_unused(config, targets)
    prompts, known = _prompts(config, targets)
    device = torch.device(pick_device(config.device))
    if device.type == "cuda":
        take_own_gpu()
    protocol = find_protocol(config.protocol) if config.protocol else None
    with StopRequest() as stop, image_progress() as progress, whole_float32():
        track, say = track_images(progress), say_above(progress)
        say(prompts.describe())
        scenes = ReferenceScenes(prompts, config.results / CACHE, track)
        compared = settle_comparison(protocol, config.reference, config.inception, prompts, scenes, device, track, say)
        shared = (config, shard, merging, prompts, known, scenes, compared, judges, device, stop, progress)
        yield Session(*shared, provenance(device.type)), targets


def _refuse_unused(config: EvalConfig, targets: Sequence[Target]) -> None:
    """Reject generation options for folders of finished images."""
    fields = EvalConfig.model_fields
    unused = [EvalConfig.flag(name) for name in OF_MODELS if getattr(config, name) != fields[name].default]
    if unused and all(target.images for target in targets):
        raise UsageError(f"{', '.join(unused)}: says how images are made; {targets[0].folder} holds finished ones")


def _prompts(config: EvalConfig, targets: Sequence[Target]) -> tuple[PromptSet, PromptSet]:
    """The prompts that are measured, and the whole list that they are the first of."""
    seeds, num = parse_seeds(config.seeds), config.num
    protocol = find_protocol(config.protocol) if config.protocol else None
    if protocol is not None and config.prompts is None:
        raise UsageError(
            f"protocol {protocol.name}: give its captions with --prompts FILE (a caption list, or COCO's own)"
        )
    given = [target for target in targets if target.images]
    if config.prompts not in (None, BENCHTOP):
        known = load_prompts(str(config.prompts))
    elif config.prompts is None and given and len(targets) == 1:
        known = own_prompts(given[0].folder, seeds[0])
    else:
        if config.prompts is None:
            _refuse_benchtop_prompts(targets)
        known = benchtop_prompts(max(num or NUM_IMAGES, NUM_IMAGES if given else 0))  # of a list without end
        num = num or NUM_IMAGES
    if protocol is not None and num is None:
        num = min(protocol.num_prompts, len(known))
    return (known if num is None else known.first(num)).with_seeds(seeds), known


def _refuse_benchtop_prompts(targets: Sequence[Target]) -> None:
    """The benchtop's captions are the default for its own models alone."""
    for target in targets:
        if target.world not in BENCHTOPS:
            raise UsageError(
                f"{target.name} is not a benchtop model (world {target.world!r}): give its prompts with --prompts, and "
                "real images for fid, kid, prdc and vendi with --reference"
            )


def _evaluate_target(target: Target, session: Session, keep: int) -> ModelResult | None:
    """Measure one model; None for a shard, whose values come with the merge.

    Args:
        target: the model.
        session: shared by all targets.
        keep: number of the first images that are kept.
    """
    with bar(session.progress, f"{_title(target)}: loading"):
        source = open_source(target, session)
    folder = generation_folder(session.config.results, target.world, target.name, source.generation)
    num, rows = len(session.prompts), FeatureRows(len(session.prompts), session.compared.features.network.num_features)
    with bar(session.progress, "loading metrics"):
        metrics = _metrics(metric_context(target, source, rows, session), session)
    planned = [key for metric in metrics for key in metric.planned]
    session.compared.check(source.resolution, [protocol for _, protocol in planned])
    pending = _pending(metrics, folder, target, session)
    writer = _Writer(target, source, metrics, folder, session)
    finished = target.training and target.training["step"] == target.training["steps"]
    if finished and (logged := RunDirectory.open(target.folder.parent).read_log()):
        write_training_log(folder, writer.head(), writer.run, logged)
    saver = _Saver(folder / "images", session)
    place = session.config.results / FOLDER / target.world / target.name / source.generation.id
    run = Pass(place, pending, rows, num, min(keep, num))
    if pending:
        if not _fill(run, source, saver, _title(target), session):
            return None
        for metric in pending:
            session.check_stop("results")
            with bar(session.progress, f"{_title(target)}: {metric.name}"):
                writer.write(metric)
    _keep_images(run, source, saver, writer, _title(target), session)
    run.forget()
    result = load_result(folder)
    return replace(result, values=tuple(result.by_key[name, protocol.id] for name, protocol in planned))


def _title(target: Target) -> str:
    """A target's name, and of a checkpoint its step."""
    step, steps = target.training.get("step", 0), target.training.get("steps", 0)
    return f"{target.name}, step {step} of {steps}" if step < steps else target.name


def open_source(target: Target, session: Session) -> Source:
    """Where a target's images come from.

    Raises:
        UsageError: several seeds of a folder of images, or a model that cannot be loaded.
    """
    config, prompts = session.config, session.prompts
    if target.images:
        if len(prompts.seeds) > 1:
            raise UsageError(f"{target.folder}: holds one image of each prompt; name one of its --seeds")
        track = track_images(session.progress)
        return GivenImages(target.folder, prompts, session.known, prompts.seeds[0], config.batch_size, track)
    models = load_target(target, config, session.device)
    sampling = settle_sampling(target, models, config.steps, config.guidance)
    stream = ImageStream(models, prompts.prompts, sampling, config.batch_size)
    session.say(f"{_title(target)}: {stream.label}, {models.resolution} px, {config.dtype}")
    return stream


def load_target(target: Target, config: EvalConfig, device: torch.device) -> TextToImage:
    """Load a target's networks: of Stable Diffusion 1 and 2 for rgbench's samplers, of other families to be called.

    Args:
        target: no folder of images.
        config: type, sampler, LoRA weight and arguments of calls.
        device: where they run.

    Raises:
        UsageError: a model that cannot be loaded, or options that it has no use for.
    """
    dtype, arguments = getattr(torch, config.dtype), config.call_arguments()
    whole = target.folder if target.base is None else base_folder(target.base)
    unet, lora = (None, target.folder) if target.lora else (target.folder, None)
    side = target.config.get("model", {}).get("resolution")
    if arguments or not is_stable_diffusion(whole):
        arguments = ({} if side is None else {"height": side, "width": side}) | arguments
        if target.base is not None and lora is None:
            raise UsageError(f"{target.folder}: --unet is for SD 1 and 2; give the whole pipeline instead")
        options = CallOptions(
            arguments,
            config.sampler,
            lora if target.base else None,
            config.lora_weight,
            config.offload,
            config.vae_slicing,
        )
        called = load_generic(whole, device, dtype, options)
        _check_student(target, called)
        return called
    if config.offload or config.vae_slicing:
        flag = "--offload" if config.offload else "--vae-slicing"
        raise UsageError(f"{target.name}: {flag} is for pipelines that are called; leave it out for SD 1 and 2")
    if target.base is not None:
        models = load_student(Student(target.base, unet, lora, config.lora_weight), device, dtype)
    else:
        models = load_models(whole, device, dtype, side)
        _check_student(target, models)
    return models if config.sampler is None else sampled_as(models, config.sampler)


def _check_student(target: Target, models: TextToImage) -> None:
    """Refuse weights in a run's folder that are not those which it exported."""
    if target.weights_sha256 not in (None, models.weights_sha256):
        raise UsageError(
            f"{target.folder}: not the student that its run exported; put that back, or evaluate this one in another "
            "folder"
        )


def metric_context(target: Target, source: Source, rows: FeatureRows, session: Session) -> Context:
    """What metrics may know of one target's evaluation.

    Args:
        target: the model.
        source: of its images.
        rows: where features of its images go.
        session: of the evaluation.
    """
    return Context(
        prompts=session.prompts,
        resolution=source.resolution,
        **({"stride": source.models.stride, "token": source.models.token} if isinstance(source, ImageStream) else {}),
        jpeg=source.jpeg,
        named=session.compared.named,
        departures=session.compared.departures,
        reference=session.scenes,
        features=session.compared.features,
        rows=rows,
        judges=session.judges,
        reward_folder=_reward(target, session.config),
        classifiers_folder=CLASSIFIERS_FOLDER,
        regressors_folder=REGRESSORS_FOLDER,
        generation=source.generation.id,
        opponent=_opponent(target, session),
        track=track_images(session.progress),
        trained_rewards=target.rewards,
        device=session.device,
    )


def _opponent(target: Target, session: Session) -> Callable[[], Opponent] | None:
    """Loads the shipped teacher of a target's world, once for all targets."""
    preset = target.preset
    if preset is None or preset.root is None:
        return None

    def load() -> Opponent:
        teacher = preset_teacher(preset)
        models = load_models(teacher.folder, session.device, torch.float32)
        sampling, prompts = settle_sampling(teacher, models, None, None), session.prompts.prompts
        stream = ImageStream(models, prompts, sampling, session.config.batch_size)
        folder = generation_folder(session.config.results, teacher.world, teacher.name, stream.generation)

        def images(positions: np.ndarray) -> torch.Tensor:
            return torch.cat([batch.images for batch in stream.stream(positions)])

        def rows(metric: str, protocol_id: str) -> np.ndarray | None:
            stored = (metric, protocol_id) in stored_keys(folder)
            found = load_result(folder).rows(metric, protocol_id) if stored else None
            by_image = found.by_image() if found is not None else {}
            keys = [(prompt.id, prompt.seed) for prompt in prompts]
            return np.array([by_image[key] for key in keys]) if all(key in by_image for key in keys) else None

        return Opponent(stream.generation.id, stream.generation.fields, images, rows)

    return lambda: session.scenes.remember(f"teacher of {preset.name}", load)


def _reward(target: Target, config: EvalConfig) -> Path:
    """The reward model that is given, else that of a shipped world, else HPSv2.1."""
    if config.hps is not None:
        return config.hps
    if target.preset is not None and target.preset.root is not None:
        return target.preset.reward_folder()
    return PUBLISHED["hps 2.1"].find() or Path(HPS_V21_FILE)  # where it is missing, metrics that load it say so


def _metrics(context: Context, session: Session) -> list[Metric]:
    """The metrics that are named; else all default ones that fit, and the others are listed with the reason.

    Raises:
        UsageError: a named metric does not fit, or no default one does.
    """
    wanted = session.config.metrics
    if wanted:
        return [find_metric(name, session.judges)(context) for name in wanted]
    made: list[Metric] = []
    left_out: dict[str, list[str]] = {}
    for name in default_metrics():
        try:
            made.append(find_metric(name, session.judges)(context))
        except UsageError as error:
            left_out.setdefault(str(error).removeprefix(f"metric {name}: "), []).append(name)
    for reason, of in left_out.items():
        log.warning("left out: %s: %s", ", ".join(of), reason)
    if not made:
        raise UsageError("no metric fits; name one with --metric to read why")
    return made


def _pending(metrics: Sequence[Metric], folder: Path, target: Target, session: Session) -> list[Metric]:
    """Metrics whose values are not all stored."""
    if session.config.force:
        return list(metrics)
    stored = stored_keys(folder)
    pending = [m for m in metrics if any((name, protocol.id) not in stored for name, protocol in m.planned)]
    done = [metric.name for metric in metrics if metric not in pending]
    if done:
        session.say(f"{_title(target)}: {', '.join(done)}: stored already (--force measures again)")
    return pending


def _count_cut(source: Source, metrics: Sequence[Metric], prompts: PromptSet) -> dict[str, Any]:
    """Count the prompts that are longer than the text encoder or a reward reads, as training does; warn of them."""
    readers: dict[str, tuple[Any, int]] = {}
    if isinstance(source, ImageStream):
        readers |= source.models.text_limits()
    for reward in (reward for metric in metrics for reward in metric.rewards()):
        tokenizer, limit = getattr(reward, "tokenizer", None), reward.fingerprint().get("token_limit")
        if tokenizer is not None and limit is not None:  # a reward of the image alone has neither
            readers[reward.name] = tokenizer, limit
    texts = list({prompt.id: prompt.text for prompt in prompts.prompts}.values())
    cut = {name: sum(num > limit for num in num_tokens(own, texts)) for name, (own, limit) in readers.items()}
    for name, num in cut.items():
        if num:
            reader, limit = name.replace("_", " "), readers[name][1]
            log.warning(
                "the %s reads %s tokens: %s of %s prompts are longer and are cut", reader, limit, num, len(texts)
            )
    return {"seen": len(texts), "cut": cut}


class _Writer:
    """Writes the values of one model and generation.

    Args:
        target: the model.
        source: of its images.
        metrics: all of the evaluation.
        folder: of the result.
        session: of the evaluation.
    """

    def __init__(
        self, target: Target, source: Source, metrics: Sequence[Metric], folder: Path, session: Session
    ) -> None:
        self.target, self.source, self.folder, self.session = target, source, folder, session
        infos = (info for metric in metrics for info in metric.infos)
        self.own_infos = {info.name: info for info in infos if info.name not in shipped_infos()}
        captions = _count_cut(source, metrics, session.prompts)
        self.run = Run(command=session.config.command(), provenance={**session.provenance, "captions": captions})
        self.keys = [(prompt.id, prompt.seed, prompt.group) for prompt in session.prompts.prompts]
        self.overlap, self.reference = 0, session.compared.features.reference
        if isinstance(source, GivenImages) and isinstance(self.reference, ReferenceFolder):
            self.overlap = source.num_in(self.reference.files)
            if self.overlap:
                log.warning("%s of %s images are also in --reference", self.overlap, len(source.files))

    def head(self) -> Head:
        """What all values share, with the cost so far."""
        target, cost = self.target, self.target.cost
        return Head(
            world=target.world,
            model=target.name,
            method=target.method,
            generation=self.source.generation,
            training_seed=target.training_seed,
            recipe_sha256=target.recipe_sha256,
            recipe=method_settings(target.config) if target.config else {},
            training=dict(target.training),
            trained_rewards=tuple(entry["fingerprint_id"] for entry in target.rewards),
            cost={
                "train_wall_sec": cost.get("wall_sec"),
                "train_cpu_sec": cost.get("cpu_sec"),
                "train_gpu_sec": cost.get("gpu_sec"),
                "peak_rss_gib": cost.get("peak_rss_gib"),
                "peak_gpu_gib": cost.get("peak_gpu_gib"),
                "reward_calls": cost.get("reward_calls"),
                "selection_kl": cost.get("selection_kl"),
                "generate_images_per_sec": self.source.images_per_sec,
                "nfe": self.source.network_evaluations,
            },
            metrics=self.own_infos,
        )

    def write(self, metric: Metric) -> None:
        """Compute and store the values of one metric.

        Raises:
            RgbenchError: one is not finite, or not planned; none of them is stored.
        """
        values = [self._flagged(value) for value in metric.compute()]
        planned = [(name, protocol.id) for name, protocol in metric.planned]
        if [value.key for value in values] != planned:
            raise RgbenchError(
                f"metric {metric.name}: gave {[value.key for value in values]}, not {planned} as planned"
            )
        try:
            write_values(self.session.config.results, self.head(), self.run, values, self.keys)
        except ValueError as error:
            raise RgbenchError(f"{self.target.name}: {error}") from error

    def _flagged(self, value: MetricValue) -> MetricValue:
        """A value that compares images with a reference that holds them as well says so."""
        if not self.overlap or value.protocol.fields.get("reference") != self.reference.fields():
            return value
        return replace(value, flags=(*value.flags, f"{self.overlap} images are in the reference"))


class _Saver:
    """Saves images as PNG where ``--save-images`` asks for it.

    Args:
        folder: of the PNGs and their index.
        session: of the evaluation.
    """

    def __init__(self, folder: Path, session: Session) -> None:
        self.index, prompts = Index(folder), session.prompts.prompts
        self.names = [f"{file_stem(prompt.id)}-{prompt.seed}.png" for prompt in prompts]
        there = set() if session.config.force else self.index.names()
        wanted = self.names if session.config.save_images else []
        self.missing = {i for i, name in enumerate(wanted) if name not in there}

    def save(self, batch: ImageBatch) -> None:
        """Save those of a batch that are missing."""
        found = [
            (self.names[position], image, about(prompt).model_dump())
            for position, prompt, image in zip(batch.positions.tolist(), batch.prompts, batch.images, strict=True)
            if position in self.missing
        ]
        if found:
            self.index.add(found)
            self.missing.difference_update(batch.positions.tolist())


def _fill(run: Pass, source: Source, saver: _Saver, title: str, session: Session) -> bool:
    """Show the metrics the images; whether they saw all, in this process or in those whose shards were merged.

    Raises:
        UsageError: a metric that cannot be shared, or shards that are not all there.
        Interrupted: a signal; what was seen is stored.
    """
    shard = session.shard
    unable = [metric.name for metric in run.metrics if not metric.mergeable]
    if unable and shard != WHOLE:
        raise UsageError(f"metric {', '.join(unable)} does not declare its state; measure it without --shard")
    if session.merging:
        _merge_shards(run, title, session)
        return True
    wanted = np.array(shard.positions(len(run.seen)), dtype=np.int64)
    if not unable and not session.config.force and run.load(shard):
        session.say(f"{title}: resumes after {int(run.seen.sum())} of {len(wanted)} images")
    state = {"config": session.config.model_dump(mode="json", exclude={"shard"}), "count": shard.count}
    save = None if unable else partial(run.save, shard, state)
    began = time.monotonic()
    try:
        _show(run, source, wanted[~run.seen[wanted]], saver, title, session, save)
    except Interrupted:  # raised between batches; a second Ctrl-C comes inside of one, whose sums are then half there
        if save is not None and run.seen.any():
            save()
        raise
    if shard == WHOLE:
        if save is not None and time.monotonic() - began > WORTH_SEC:  # a value may yet fail
            save()
        return True
    path = run.save(shard, state)
    session.say(f"{title}: shard {shard} stored: {path}; when all {shard.count} are there: rgbench merge")
    return False


def _show(
    run: Pass,
    source: Source,
    left: np.ndarray,
    saver: _Saver,
    title: str,
    session: Session,
    save: Callable[[], object] | None,
) -> None:
    saved, done, shown = time.monotonic(), 0, 0.0
    with bar(session.progress, f"{title}: {source.label}", len(left)) as task:

        def advance(images: float) -> None:
            nonlocal shown
            shown += images
            session.progress.advance(task, images)

        for batch in source.stream(left, advance):
            session.check_stop("results and images" if save else "results")
            saver.save(batch)
            run.update(batch, session.device)
            done += len(batch.prompts)
            advance(done - shown)  # given images, or the rest of a batch that did not fit at first
            if save is not None and time.monotonic() - saved > SAVE_SEC:
                save()
                saved = time.monotonic()


def _merge_shards(run: Pass, title: str, session: Session) -> None:
    shards = [Shard(i, session.shard.count) for i in range(1, session.shard.count + 1)]
    for shard in track_images(session.progress)(shards, f"{title}: reading shards", "shards"):
        run.load(shard)
    absent = [str(shard) for shard in shards if not run.seen[shard.positions(len(run.seen))].all()]
    if absent:
        raise UsageError(
            f"{title}: {len(absent)} of {len(shards)} shards are missing or not finished: {named(absent)}; make each "
            f"with: {session.config.command()} --shard {absent[0]}"
        )


def _keep_images(run: Pass, source: Source, saver: _Saver, writer: _Writer, title: str, session: Session) -> None:
    """Write the contact sheet of the first images, unless it is there; make those that no pass made."""
    wanted = [about(prompt) for prompt in session.prompts.prompts[: run.num_kept]]
    try:
        stored = {image: np.asarray(pixels) for image, pixels in load_result(writer.folder).images.items()}
    except UsageError as error:
        log.warning("%s; images are kept anew", error)
        stored = {}
    lacking = {i for i, image in enumerate(wanted) if image not in stored or session.config.force}
    left = np.array(sorted((lacking - run.kept.keys()) | saver.missing), dtype=np.int64)
    if len(left) and not session.merging:
        with bar(session.progress, f"{title}: {source.label}", len(left)) as task:
            for batch in source.stream(left, partial(session.progress.advance, task)):
                session.check_stop("results")
                saver.save(batch)
                run.keep(batch)
    new = {wanted[i]: run.kept[i] for i in sorted(lacking & run.kept.keys())}
    if new:
        sheet = {image: new.get(image, stored.get(image)) for image in (*wanted, *stored)}
        pairs = [(image, pixels) for image, pixels in sheet.items() if pixels is not None]
        write_sheet(writer.folder, writer.head(), writer.run, pairs)
