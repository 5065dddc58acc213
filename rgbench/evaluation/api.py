"""What the command line calls: evaluate models, merge shards, sample images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rgbench.data.prompts import Prompt
from rgbench.errors import UsageError
from rgbench.evaluation.command import Options, carry_out
from rgbench.evaluation.generate import ImageStream, settle_sampling
from rgbench.evaluation.names import file_stem
from rgbench.evaluation.partial import stored_shards
from rgbench.evaluation.pictures import Index, about
from rgbench.evaluation.progress import bar, image_progress
from rgbench.evaluation.shards import Shard, parse_shard
from rgbench.evaluation.targets import resolve_targets
from rgbench.models import load_models
from rgbench.process import pick_device, whole_float32


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
