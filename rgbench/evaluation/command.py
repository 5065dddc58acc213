"""One ``rgbench eval`` command: its options, the command line that repeats it, and carrying it out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rgbench.data.prompts import PromptSet, benchtop_prompts, load_prompts
from rgbench.errors import UsageError
from rgbench.evaluation.checkpoints import checkpoint_targets
from rgbench.evaluation.defaults import default_metrics
from rgbench.evaluation.evaluate import evaluate_target
from rgbench.evaluation.job import Job
from rgbench.evaluation.matching import own_prompts
from rgbench.evaluation.progress import image_progress, say_above, track_images
from rgbench.evaluation.set_comparison import settle_comparison
from rgbench.evaluation.shards import WHOLE, Shard
from rgbench.evaluation.targets import Target, resolve_targets, student_target
from rgbench.metrics.judges import check_judges_asked, find_metric, parse_judges
from rgbench.metrics.protocols import SetProtocol, find_protocol
from rgbench.metrics.reference import ReferenceScenes
from rgbench.process import pick_device, take_own_gpu, whole_float32
from rgbench.trainers.stop import StopRequest

NUM_IMAGES = 2048  # the benchtop protocol's n: above the 1,280 features of its Fréchet distance
CHECKPOINT_IMAGES = 8  # kept of each checkpoint, for the slider of the report's page
CACHE = ".cache"
BENCHTOP = "benchtop"
OF_MODELS = ("sampler", "steps", "guidance", "dtype", "checkpoints")  # options that a folder of images has no use for


@dataclass(frozen=True)
class Options:
    """What was asked for; the fields are the arguments of :func:`rgbench.evaluation.api.evaluate`."""

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
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is not MISSING and value != field.default:
                flag = f"--{field.name.replace('_', '-')}"
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
        UsageError: see :func:`rgbench.evaluation.api.evaluate`.
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
