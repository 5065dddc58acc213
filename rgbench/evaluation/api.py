"""What the command line calls: evaluate models, sample images."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts, load_prompts
from rgbench.errors import UsageError
from rgbench.evaluation.checkpoints import checkpoint_targets
from rgbench.evaluation.evaluate import evaluate_target
from rgbench.evaluation.generate import BATCH_SIZE, ImageStream, settle_sampling
from rgbench.evaluation.job import Job
from rgbench.evaluation.matching import own_prompts
from rgbench.evaluation.names import file_stem
from rgbench.evaluation.pictures import Index, about
from rgbench.evaluation.progress import image_progress, track_images
from rgbench.evaluation.targets import Target, resolve_targets
from rgbench.metrics.features import EffLite0Set
from rgbench.metrics.reference import ReferenceScenes
from rgbench.models import load_models
from rgbench.process import pick_device
from rgbench.registry import resolve
from rgbench.trainers.stop import StopRequest

NUM_IMAGES = 2048  # the benchtop protocol's n: above the 1,280 features of its Fréchet distance
SEED = 0
CHECKPOINT_IMAGES = 8  # kept of each checkpoint, for the slider of the report's page
CACHE = ".cache"
BENCHTOP = "benchtop"


def evaluate(
    targets: Sequence[str],
    metrics: Sequence[str],
    *,
    num: int | None = None,
    prompts: str | None = None,
    runs: Path = Path("runs"),
    results: Path = Path("results"),
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    force: bool = False,
    keep_images: int = 64,
    checkpoints: bool = False,
) -> list[Path]:
    """Generate images of each target in one pass through all metrics; store each figure as soon as it is made.

    Args:
        targets: run folders or names, pipeline folders, folders of images, "teacher"; none for every finished run
            and its teacher.
        metrics: names in the registry.
        num: images; 2,048 by default, or all of a prompt file.
        prompts: a prompt file, or "benchtop"; by default the list of a folder of images, else the benchtop's.
        runs: folder of runs.
        results: folder of result files.
        steps: sampling steps; each target's own by default.
        guidance: guidance scale in the pipelines' form; likewise.
        batch_size: images at once, 64 by default.
        device: "auto", "cpu" or "cuda".
        force: measure again what is there already.
        keep_images: how many of the first images are kept as PNG.
        checkpoints: of each run the checkpoints that it kept too, before the run itself; of these 8 images are kept.

    Returns:
        The result files, old and new.

    Raises:
        UsageError: an unknown target or metric, an unfinished run, an empty prompt file, a metric that does not fit.
        Interrupted: SIGTERM or Ctrl-C; what was stored stays, and the command given goes on.
    """
    command = _command(
        targets,
        metrics,
        num=num,
        prompts=prompts,
        runs=runs,
        results=results,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
        device=device,
        force=force,
        keep_images=keep_images,
        checkpoints=checkpoints,
    )
    for name in metrics:
        resolve("metric", name)
    if not metrics:
        raise UsageError("no metric to measure; name some, such as --metric fid,hps")
    found = resolve_targets(targets, runs)
    known = _known_prompts(prompts, num, found)
    chosen = known if num is None else known.first(num)
    place = torch.device(pick_device(device))
    files: list[Path] = []
    with StopRequest() as stop, image_progress() as progress, TemporaryDirectory(prefix="rgbench-") as scratch:
        scenes = ReferenceScenes(chosen, results / CACHE, track_images(progress))
        job = Job(
            metrics=tuple(dict.fromkeys(metrics)),
            prompts=chosen,
            known=known,
            features=EffLite0Set(scenes, place),
            results=results,
            seed=SEED,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size or BATCH_SIZE,
            device=place,
            force=force,
            keep_images=keep_images,
            command=command,
            stop=stop,
            progress=progress,
        )
        try:
            for target in found:
                for earlier in checkpoint_targets(target, Path(scratch)) if checkpoints else ():
                    files += evaluate_target(earlier, replace(job, keep_images=min(keep_images, CHECKPOINT_IMAGES)))
                files += evaluate_target(target, job)
        except KeyboardInterrupt as error:  # a second Ctrl-C: not even this batch is waited for
            raise job.stopped() from error
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
    for batch in ImageStream(models, [Prompt(text, text) for text in prompts], sampling, seed, BATCH_SIZE):
        files += index.add(
            (f"{prefix}-{file_stem(prompt.text)}-{seed}.png", image, about(prompt, seed) | settings)
            for prompt, image in zip(batch.prompts, batch.images, strict=True)
        )
    return files


def _known_prompts(path: str | None, num: int | None, targets: Sequence[Target]) -> PromptSet:
    """All prompts of the list that is asked for; of the benchtop's, which has no end, as many as are wanted."""
    if path is None and len(targets) == 1 and targets[0].images:
        return own_prompts(targets[0].folder, SEED)
    if path in (None, BENCHTOP):
        given = any(target.images for target in targets)
        return benchtop_prompts(max(num or NUM_IMAGES, NUM_IMAGES if given else 0))
    return load_prompts(path)


def _command(targets: Sequence[str], metrics: Sequence[str], **options: Any) -> str:
    """The command line of an evaluation, with the options that differ from :func:`evaluate`'s defaults."""
    words = ["rgbench", "eval", *targets, "--metric", ",".join(metrics)]
    defaults = inspect.signature(evaluate).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
