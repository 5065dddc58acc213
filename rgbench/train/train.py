"""``rgbench train``, its dry run, and ``rgbench export``: from a recipe to a run directory with a student in it."""

from __future__ import annotations

import logging
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from rgbench.core import checkpoint
from rgbench.core.config import dump_yaml
from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import check_place, write_text_atomic
from rgbench.core.launch import Ranks
from rgbench.core.process import StopRequest, end_with_parent, launched, memory_explained, pick_device, whole_float32
from rgbench.core.registry import resolve
from rgbench.core.run import RunDirectory
from rgbench.data.latents import TeacherSource
from rgbench.data.sources import open_source, prepare_source
from rgbench.models.folder import weights_sha256
from rgbench.models.pipeline import load_models
from rgbench.models.presets import readable_size
from rgbench.models.student import is_lora
from rgbench.train.base import Network, StepDraws, StudentTrainer, Trainer
from rgbench.train.cache import open_cached
from rgbench.train.export import export_pipeline
from rgbench.train.identity import (
    check_checkpoint,
    check_contents,
    check_recipe,
    read_contents,
    recipe_sha256,
    teacher_contents,
)
from rgbench.train.loop import MEMORY_ADVICE, Loop, check_split
from rgbench.train.recipe import PROXY_FOLDER, BaseRecipe, LCDRecipe, load_recipe

ADAM_MOMENTS = 2  # each as large as what learns

Row = tuple[str, str]


def train(
    recipe: str,
    overrides: list[str],
    *,
    out: Path | None = None,
    resume: str = "auto",
    device: str = "auto",
    launch: Sequence[str] = (),
) -> Path:
    """Train the student of a recipe, or resume its run.

    Under torchrun this is one rank of the run, and every rank calls it with the same arguments.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        out: run directory; ``runs/{recipe name}-s{seed}`` by default.
        resume: ``auto`` resumes a run of the same config, with more steps also a finished one; ``never`` refuses any
            existing run.
        device: ``auto``, ``cpu`` or ``cuda``.
        launch: words of the command line that started several processes, for the resume command.

    Returns:
        The run directory; its student is in ``pipeline/``.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: a missing part, or an existing run of another config, teacher, data or reward.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
        RgbenchError: a loss or gradient is not finite.
        SystemExit: on all ranks but the main one, in place of any of these.
    """
    if resume not in ("auto", "never"):
        raise UsageError(f"--resume {resume}: use auto or never")
    settings = load_recipe(recipe, overrides)
    run = RunDirectory(run_path(settings, out))
    command = resume_command(recipe, overrides, out, device, launch)
    with StopRequest(deaf_after=launched()) as stop, whole_float32():
        if launched():
            end_with_parent()
        ranks = Ranks.join(pick_device(device))
        if not ranks.is_main:
            logging.getLogger("rgbench").setLevel(logging.ERROR)  # the main rank logs the rest
        if not ranks.together(lambda: _is_finished(run, settings, resume, ranks.is_main)):
            _train(settings, run, ranks, stop, command)
        ranks.leave()
    return run.path


def run_path(settings: BaseRecipe, out: Path | None) -> Path:
    """The directory of a recipe's run."""
    return out or Path("runs") / f"{settings.name}-s{settings.seed}"


def resume_command(recipe: str, overrides: list[str], out: Path | None, device: str, launch: Sequence[str] = ()) -> str:
    """The command line that resumes a run."""
    words = ["rgbench", "train", recipe, *overrides]
    words += ["--out", str(out)] if out else []
    words += ["--device", device] if device != "auto" else []
    return shlex.join([*words, *launch])


def _is_finished(run: RunDirectory, settings: BaseRecipe, resume: str, is_main: bool) -> bool:
    """Whether there is nothing left to do.

    Raises:
        UsageError: a run exists that may not be resumed.
    """
    if not os.path.isfile(run.run_file):  # unlike Path's, also False for a name that no file can have
        run.check_place()
        return False
    if resume == "never":
        raise UsageError(f"{run.path}: a run exists; resume it with --resume auto, or choose another place with --out")
    check_recipe(run, settings)
    meta = run.read()
    if meta["status"] != "finished" or meta["step"] < settings.train.steps:
        return False
    check_contents(run, {"teacher": teacher_contents(settings)})
    if is_main:
        product = run.pipeline if isinstance(settings, LCDRecipe) else run.path / PROXY_FOLDER
        _say(f"{run.path}: finished already; see {product}")
    return True


def _train(settings: BaseRecipe, run: RunDirectory, ranks: Ranks, stop: StopRequest, command: str) -> None:
    if ranks.size > 1:
        ranks.together(lambda: prepare_source(settings.data, ranks.rank, ranks.size))
    loop, contents = ranks.together(lambda: build_loop(settings, run, ranks))
    ranks.on_main(lambda: _begin(settings, run, loop, contents))
    loop.restore()
    if loop.step and ranks.is_main:
        _say(f"{run.path}: resumed after step {loop.step} of {settings.train.steps}")
    ranks.on_main(lambda: run.update(status="running", step=loop.step))
    try:
        loop.train(stop, command)
    except RgbenchError:
        with suppress(OSError, RgbenchError):  # a run that was removed, a full disk
            if ranks.is_main and loop.run.read()["status"] == "running":
                loop.run.update(status="failed")
        raise
    counts = loop.read_counts()
    loop.unshard()

    def finish() -> None:
        loop.trainer.export(run)
        exported = {"student_sha256": weights_sha256(run.pipeline)} if isinstance(settings, LCDRecipe) else {}
        run.update(status="finished", step=loop.step, **counts, **exported)

    ranks.on_main(finish)


def _begin(settings: BaseRecipe, run: RunDirectory, loop: Loop, contents: dict[str, Any]) -> None:
    """Create the run, or take over one that exists, with the steps that it now has."""
    config, is_new = settings.model_dump(mode="json"), not run.run_file.is_file()
    method = {"recipe_sha256": recipe_sha256(settings, contents), "steps": settings.train.steps}
    meta = {
        "name": run.path.name,
        "recipe": settings.name,
        "method": settings.kind,
        "seed": settings.seed,
        "world": settings.model.world,
        "status": "running",
        "step": 0,
        **method,
        "cost": loop.cost.read(),
        "sampling": _sampling(settings),
        **contents,
    }
    run.create(config, meta, device_type=loop.trainer.models.device.type)
    if not is_new:
        write_text_atomic(run.config_file, dump_yaml(config))
        run.update(**method)


@memory_explained("loading", "take a GPU with more memory that is free, or --device cpu")
def build_loop(settings: BaseRecipe, run: RunDirectory, ranks: Ranks) -> tuple[Loop, dict[str, Any]]:
    """The loop of a recipe, and the contents of its teacher, rewards and data; writes nothing.

    Args:
        settings: a validated recipe.
        run: where the loop will write.
        ranks: that share the batch.

    Returns:
        The loop, and fields of ``run.json``.

    Raises:
        UsageError: a part is missing or does not fit another.
    """
    check_split(settings.train, ranks.size)
    source, folder = open_source(settings.data), settings.model.teacher_folder()
    mesh = ranks.mesh() if settings.train.shard else None
    models = load_models(folder, ranks.device, torch.float32, settings.model.resolution, mesh=mesh)
    models.family.check_dtype(models, settings.train.dtype)
    if isinstance(source, TeacherSource):
        source.check_teacher(models.weights_sha256, models.config_sha256)
    trainer: Trainer = resolve("trainer", settings.kind).build(settings, models)
    contents, wanted = read_contents(settings, trainer, source), settings.train.latents_cache
    if run.run_file.is_file():
        check_contents(run, contents)
        if wanted == "auto":  # as it began, since a cache made meanwhile rounds differently
            wanted = "always" if run.read().get("latents_cache") else "never"
    feed = open_cached(settings, source, folder, wanted)
    loop = Loop(trainer, feed, settings, run, ranks, contents)
    loop.load_batch(0)  # data that does not fit the model is found before anything is written
    return loop, contents | {"latents_cache": feed is not source}


def _sampling(settings: BaseRecipe) -> dict[str, Any] | None:
    """How the student is sampled; None for a run without one."""
    if not isinstance(settings, LCDRecipe):
        return None
    sampling = settings.sampling
    how = {"sampler": "lcm"} if settings.gamma is None else {"sampler": "tcd", "gamma": settings.gamma}
    return {**how, "steps": sampling.steps, "guidance_scale": sampling.guidance_scale}


def _say(message: str) -> None:
    Console(stderr=True).print(message, soft_wrap=True, highlight=False, markup=False)


def export_run(path: Path, network: Network, out: Path | None = None, device: str = "cpu") -> Path:
    """Write a network of a run's newest checkpoint as a pipeline folder; the run itself stays as it is.

    Args:
        path: the run; it need not be finished.
        network: ``target`` (the EMA) or ``student`` (online).
        out: a new folder; ``{run}-{network}`` beside the run by default.
        device: where the networks are put.

    Returns:
        The folder.

    Raises:
        UsageError: no run, no checkpoint, another teacher than the run's, or something at ``out`` already.
    """
    run = RunDirectory.open(path)
    folder = out or path.resolve().with_name(f"{path.resolve().name}-{network}")
    if folder.exists():
        raise UsageError(f"{folder}: exists already; choose another place with --out")
    check_place(folder)
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        raise UsageError(f"{run.checkpoints}: no checkpoint yet; nothing to export")
    recipe, meta = load_recipe(str(run.config_file)), run.read()
    if not isinstance(recipe, LCDRecipe):
        raise UsageError(f"{path}: a run of {recipe.kind} has no student to export")
    models = load_models(recipe.model.teacher_folder(), device, torch.float32, recipe.model.resolution)
    if models.weights_sha256 != meta["teacher"]["sha256"]:
        raise UsageError(f"{models.path}: not the teacher of {path}; its weights have another sha256")
    trainer: StudentTrainer = resolve("trainer", recipe.plain)(recipe, models)
    tensors, state = checkpoint.load(newest)
    check_checkpoint(newest, state, recipe.model_dump(mode="json"), meta)
    for stem, module in trainer.modules().items():
        module.load_state_dict(tensors[stem])
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_pipeline(trainer, meta | {"step": state["step"]}, folder, network)
    return folder


@whole_float32()
def dry_run(recipe: str, overrides: list[str], *, out: Path | None = None, device: str = "auto") -> list[Row]:
    """Load and check everything that a run needs, and compute its first step's losses; trains and writes nothing.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        out: where the run would be.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        Rows of a table: name and description.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: a missing part, or data that does not fit the model.
        RgbenchError: a loss of the first step is not finite.
    """
    settings = load_recipe(recipe, overrides)
    run = RunDirectory(run_path(settings, out))
    if not os.path.isfile(run.run_file):
        run.check_place()
    loop, contents = build_loop(settings, run, Ranks(device=pick_device(device)))
    trainer, data = loop.trainer, {**contents["data"], "latents cache": contents["latents_cache"]}
    rewards = [("reward", f"{r['name']}, fingerprint {r['fingerprint_id']}, in-sample") for r in contents["rewards"]]
    has_student = isinstance(settings, LCDRecipe)
    return [
        ("run", f"{run.path}, {'exists already' if run.run_file.is_file() else 'new'}"),
        ("recipe", f"{settings.kind}, seed {settings.seed}, sha256 {recipe_sha256(settings, contents)[:12]}"),
        ("teacher", _describe_teacher(trainer, settings)),
        *([("student", _describe_student(trainer, settings))] if has_student else []),
        *_describe_groups(trainer),
        *rewards,
        ("data", ", ".join(f"{key} {value}" for key, value in data.items() if value is not None)),
        ("steps", _describe_steps(settings, loop.source.length)),
        ("checkpoints", _describe_checkpoints(trainer, settings)),
        *([("samples", _describe_samples(settings))] if has_student else []),
        ("device", f"{trainer.models.device}, {settings.train.dtype}"),
        ("first step", _first_losses(loop)),
    ]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _describe_teacher(trainer: Trainer, recipe: BaseRecipe) -> str:
    models, published = trainer.models, recipe.model.published()
    where = f"{published['repo']} at {published['revision'][:8]}" if published else str(models.path)
    size = f"{models.resolution} px, latents {'×'.join(map(str, models.latent_shape))}"
    weights = f"{_millions(_count(models.unet.parameters()))}, sha256 {models.weights_sha256[:12]}"
    return f"{where}: {weights}, {models.prediction_type}, {size}"


def _describe_student(trainer: Any, recipe: LCDRecipe) -> str:
    dim = recipe.lcd.time_cond_proj_dim
    how = f"LoRA of rank {recipe.lora.rank}" if recipe.lora and is_lora(trainer.student) else "full fine-tune"
    return f"{how}, {f'guidance embedding {dim}' if dim else 'no guidance embedding'}"


def _describe_groups(trainer: Any) -> Iterator[Row]:
    """Each optimiser: how much it trains, with what."""
    for name, group in trainer.optimiser_groups().items():
        total, section = _count(getattr(trainer, name).parameters()), group.section
        adamw = f"AdamW, lr {group.lr:g}, betas {section.betas}, weight decay {section.weight_decay:g}"
        yield f"{name} learns", f"{_millions(_count(group.parameters))} of {_millions(total)} parameters; {adamw}"


def _describe_steps(recipe: BaseRecipe, length: int | None) -> str:
    train = recipe.train
    images = train.steps * train.batch_size
    epochs = f", {images / length:.3g} epochs" if length else ""
    return f"{train.steps:,} of {train.batch_size} images: {images:,} images{epochs}"


def _describe_checkpoints(trainer: Trainer, recipe: BaseRecipe) -> str:
    """How often, how many, and how large: networks, and the optimisers' moments."""
    tensors = [value for module in trainer.modules().values() for value in module.state_dict().values()]
    size = sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))
    learned = [parameter for group in trainer.optimiser_groups().values() for parameter in group.parameters]
    size += ADAM_MOMENTS * sum(parameter.numel() * parameter.element_size() for parameter in learned)
    train = recipe.train
    return f"every {train.save_every} steps, {readable_size(size)} each, {train.keep_checkpoints} kept"


def _describe_samples(recipe: LCDRecipe) -> str:
    every, sampling = recipe.train.sample_every, recipe.sampling
    how = f"{sampling.steps} steps at guidance {sampling.guidance_scale:g} of the {sampling.network}"
    return f"a grid every {every} steps; {how}" if every else f"none; {how} is exported"


def _first_losses(loop: Loop) -> str:
    """Means of the loss terms of the first step of each kind, of its first micro-batch.

    Raises:
        RgbenchError: one is not finite.
    """
    means: dict[str, float] = {}
    for step in loop.recipe.trial_steps:
        batch = loop.load_batch(step)
        with memory_explained("first step", MEMORY_ADVICE), loop.updater.autocast():
            result = loop.trainer.step(batch, StepDraws(loop.recipe.seed, step, len(batch.ids)))
        found = {name: float(v.detach().mean()) for terms in result.losses.values() for name, v in terms.items()}
        wrong = [name for name, value in found.items() if not math.isfinite(value)]
        if wrong:
            ids = ", ".join(batch.ids[:8])
            raise RgbenchError(f"the first step's loss term {wrong[0]} is not finite; look at {ids}")
        means |= found
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())
