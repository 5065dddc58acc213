"""``rgbench train``: from a recipe to a run directory with a student in it.

``rgbench train --dry-run``: what a run would do, and one step's losses to show that its parts fit together.

``rgbench export``: a network of a run's newest checkpoint as a pipeline folder.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from rgbench.core import checkpoint
from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.launch import Ranks
from rgbench.core.process import StopRequest, end_with_parent, launched, pick_device
from rgbench.core.registry import resolve
from rgbench.core.run import RunDirectory
from rgbench.data.sources import open_source, prepare_source
from rgbench.models.folder import weights_sha256
from rgbench.models.pipeline import load_models
from rgbench.models.presets import readable_size
from rgbench.models.student import is_lora
from rgbench.rewards.base import fingerprint_id
from rgbench.train.base import StepDraws, Trainer
from rgbench.train.cache import open_cached
from rgbench.train.export import Network, export_pipeline
from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop, check_split
from rgbench.train.recipe import FREE_KEYS, PROXY_FOLDER, BaseRecipe, LCDRecipe, load_recipe


def train(
    recipe: str,
    overrides: list[str],
    *,
    out: Path | None = None,
    resume: str = "auto",
    device: str = "auto",
    launch: Sequence[str] = (),
) -> Path:
    """Train the student of a recipe, or go on with it.

    Under torchrun this is one rank of the run, and every rank calls it with the same arguments.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        out: run directory; ``runs/{recipe name}-s{seed}`` by default.
        resume: ``auto`` goes on with an unfinished run of the same config; ``never`` refuses any existing run.
        device: ``auto``, ``cpu`` or ``cuda``.
        launch: words of the command line that started several processes, for the resume command.

    Returns:
        The run directory; its student is in ``pipeline/``.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: a missing part, an existing run of another config, teacher, data or reward.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
        RgbenchError: a loss or gradient is not finite.
        SystemExit: on all ranks but the main one, in place of any of these.
    """
    if resume not in ("auto", "never"):
        raise UsageError(f"--resume {resume}: use auto or never")
    settings = load_recipe(recipe, overrides)
    run = RunDirectory(run_path(settings, out))
    command = resume_command(recipe, overrides, out, device, launch)
    with StopRequest(deaf_after=launched()) as stop:
        if launched():
            end_with_parent()
        ranks = Ranks.join(pick_device(device))
        if not ranks.is_main:
            logging.getLogger("rgbench").setLevel(logging.ERROR)  # the main rank has said it
        if not ranks.together(lambda: _is_finished(run, settings, resume, ranks.is_main)):
            _train(settings, run, ranks, stop, command)
        ranks.leave()
    return run.path


def run_path(settings: BaseRecipe, out: Path | None) -> Path:
    """Where a recipe's run lies."""
    return out or Path("runs") / f"{settings.name}-s{settings.seed}"


def _is_finished(run: RunDirectory, settings: BaseRecipe, resume: str, is_main: bool) -> bool:
    """Whether there is nothing left to do.

    Raises:
        UsageError: a run is there and may not be gone on with.
    """
    if not run.run_file.is_file():
        return False
    if resume == "never":
        raise UsageError(f"{run.path}: a run is there; use --resume auto to go on with it, or --out for another place")
    if is_main:
        run.create(settings.model_dump(mode="json"), {}, free=FREE_KEYS)  # refuses another config
    if run.read()["status"] != "finished":
        return False
    _check_same(run, {"teacher": _teacher(settings)})
    if is_main:
        made = run.pipeline if isinstance(settings, LCDRecipe) else run.path / PROXY_FOLDER
        _say(f"{run.path}: finished already; see {made}")
    return True


def _train(settings: BaseRecipe, run: RunDirectory, ranks: Ranks, stop: StopRequest, command: str) -> None:
    if ranks.size > 1:
        ranks.together(lambda: prepare_source(settings.data, ranks.rank, ranks.size))
    loop, origin = ranks.together(lambda: build_loop(settings, run, ranks))

    def begin() -> None:
        meta, kind = _first_meta(settings, run, loop) | origin, loop.trainer.models.device.type
        run.create(settings.model_dump(mode="json"), meta, free=FREE_KEYS, device_type=kind)

    ranks.on_main(begin)
    loop.restore()
    if loop.step and ranks.is_main:
        _say(f"{run.path}: going on after step {loop.step} of {settings.train.steps}")
    ranks.on_main(lambda: run.update(status="running", step=loop.step))
    loop.train(stop, command)
    counts = loop.read_counts()

    def finish() -> None:
        loop.trainer.export(run)
        run.update(status="finished", step=loop.step, **counts)

    ranks.on_main(finish)


def build_loop(settings: BaseRecipe, run: RunDirectory, ranks: Ranks) -> tuple[Loop, dict[str, Any]]:
    """The loop of a recipe, and what identifies its teacher, rewards and data; writes nothing.

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
    source = open_source(settings.data)
    models = load_models(settings.model.teacher_folder(), ranks.device, torch.float32)
    trainer: Trainer = resolve("trainer", settings.kind).build(settings, models)
    origin = {"teacher": _teacher(settings), "rewards": _rewards(trainer), "data": source.fingerprint()}
    if run.run_file.is_file():
        _check_same(run, origin)
    wanted = settings.train.latents_cache
    if run.run_file.is_file() and wanted == "auto":  # as it began, since a cache made meanwhile rounds differently
        wanted = "always" if run.read().get("latents_cache") else "never"
    feed = open_cached(settings, source, settings.model.teacher_folder(), wanted)
    loop = Loop(trainer, feed, settings, run, ranks)
    loop.load_batch(0)  # data that does not fit the model is found before anything is written
    return loop, origin | {"latents_cache": feed is not source}


def _say(message: str) -> None:
    Console(stderr=True).print(message, soft_wrap=True, highlight=False, markup=False)


def resume_command(recipe: str, overrides: list[str], out: Path | None, device: str, launch: Sequence[str] = ()) -> str:
    """The command line that goes on with a run."""
    words = ["rgbench", "train", recipe, *overrides]
    words += ["--out", str(out)] if out else []
    words += ["--device", device] if device != "auto" else []
    return shlex.join([*words, *launch])


def _teacher(settings: BaseRecipe) -> dict[str, Any]:
    folder = settings.model.teacher_folder()
    own = {"preset": settings.model.preset, "path": str(folder), "sha256": weights_sha256(folder)}
    return own | settings.model.published()


def _rewards(trainer: Trainer) -> list[dict[str, Any]]:
    fingerprints = trainer.reward_fingerprints()
    return [{"name": f["name"], "fingerprint": f, "fingerprint_id": fingerprint_id(f)} for f in fingerprints]


def _first_meta(settings: BaseRecipe, run: RunDirectory, loop: Loop) -> dict[str, Any]:
    return {
        "name": run.path.name,
        "recipe": settings.name,
        "method": settings.kind,
        "seed": settings.seed,
        "world": settings.model.world,
        "status": "running",
        "step": 0,
        "steps": settings.train.steps,
        "cost": loop.cost.read(),
        "sampling": _sampling(settings),
    }


def _sampling(settings: BaseRecipe) -> dict[str, Any] | None:
    """How the student is sampled; None for a run without one."""
    if not isinstance(settings, LCDRecipe):
        return None
    sampling = settings.sampling
    return {"sampler": "lcm", "steps": sampling.steps, "guidance_scale": sampling.guidance_scale}


def _check_same(run: RunDirectory, origin: dict[str, Any]) -> None:
    """Refuse to go on with another teacher, reward or data than the run began with; paths may differ.

    Raises:
        UsageError: names what changed.
    """
    kept = run.read()
    for part, now in origin.items():
        before = kept.get(part)
        if _without_paths(before) != _without_paths(now):
            raise UsageError(
                f"{run.path}: its {part} changed since the run began; train with --out in another place, or move the "
                "old run away"
            )


def _without_paths(part: Any) -> Any:
    return {k: v for k, v in part.items() if k != "path"} if isinstance(part, dict) else part


Row = tuple[str, str]
MOMENTS = 2  # of AdamW, as large as what learns


def dry_run(recipe: str, overrides: list[str], *, out: Path | None = None, device: str = "auto") -> list[Row]:
    """Resolve, load and check everything that a run needs, and compute its first step's losses.

    Nothing is trained and nothing is written.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        out: where the run would lie.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        Names and what there is to say of each.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: a missing part, or data that does not fit the model.
        RgbenchError: a loss of the first step is not finite.
    """
    settings = load_recipe(recipe, overrides)
    run = RunDirectory(run_path(settings, out))
    loop, origin = build_loop(settings, run, Ranks(device=pick_device(device)))
    trainer, data = loop.trainer, {**origin["data"], "latents cache": origin["latents_cache"]}
    rewards = [("reward", f"{r['name']}, fingerprint {r['fingerprint_id']}, in-sample") for r in origin["rewards"]]
    return [
        ("run", f"{run.path}{' is there already' if run.run_file.is_file() else ', new'}"),
        ("recipe", f"{settings.kind}, seed {settings.seed}"),
        ("teacher", _plan_teacher(trainer, settings)),
        *([("student", _student(trainer, settings))] if isinstance(settings, LCDRecipe) else []),
        *_learners(trainer, settings),
        *rewards,
        ("data", ", ".join(f"{key} {value}" for key, value in data.items())),
        ("steps", _steps(settings, loop.source.length)),
        ("checkpoints", _checkpoints(trainer, settings)),
        *([("samples", _samples(settings))] if isinstance(settings, LCDRecipe) else []),
        ("device", f"{trainer.models.device}, {settings.train.dtype}"),
        ("first step", _losses(loop)),
    ]


def _count(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _plan_teacher(trainer: Trainer, recipe: BaseRecipe) -> str:
    models, published = trainer.models, recipe.model.published()
    where = f"{published['repo']} at {published['revision'][:8]}" if published else str(models.path)
    size = f"{models.resolution} px, latents {'×'.join(map(str, models.latent_shape))}"
    weights = f"{_millions(_count(models.unet.parameters()))}, sha256 {models.weights_sha256[:12]}"
    return f"{where}: {weights}, {models.prediction_type}, {size}"


def _student(trainer: Trainer, recipe: LCDRecipe) -> str:
    dim = recipe.lcd.time_cond_proj_dim
    how = f"LoRA of rank {recipe.lora.rank}" if recipe.lora and is_lora(trainer.student) else "all weights"
    return f"{how}; {f'told w by an embedding of {dim}' if dim else 'not told w'}"


def _learners(trainer: Trainer, recipe: BaseRecipe) -> Iterator[Row]:
    """Each optimiser: how much it trains, with what."""
    for name, learner in trainer.learners().items():
        module = trainer.modules()[name]
        held = _count(module.parameters()) if isinstance(module, nn.Module) else _count(trainer.student.parameters())
        number, train = _count(learner.parameters), recipe.train
        settings = f"AdamW, lr {learner.lr:g}, betas {train.betas}, weight decay {train.weight_decay:g}"
        yield f"{name} learns", f"{_millions(number)} of {_millions(held)} parameters; {settings}"


def _steps(recipe: BaseRecipe, length: int | None) -> str:
    train = recipe.train
    images = train.steps * train.batch_size
    epochs = f", {images / length:.3g} epochs" if length else ""
    return f"{train.steps:,} of {train.batch_size} images: {images:,} images{epochs}"


def _checkpoints(trainer: Trainer, recipe: BaseRecipe) -> str:
    """How often, how many, how large: networks, and the optimisers' moments."""
    tensors = [value for module in trainer.modules().values() for value in module.state_dict().values()]
    size = sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))
    learned = [parameter for learner in trainer.learners().values() for parameter in learner.parameters]
    size += MOMENTS * sum(parameter.numel() * parameter.element_size() for parameter in learned)
    train = recipe.train
    return f"every {train.save_every} steps, {readable_size(size)} each, {train.keep_checkpoints} kept"


def _samples(recipe: LCDRecipe) -> str:
    every, sampling = recipe.train.sample_every, recipe.sampling
    how = f"{sampling.steps} steps at guidance {sampling.guidance_scale:g} of the {sampling.network}"
    return f"every {every} steps; {how}" if every else f"none; {how} is exported"


def _losses(loop: Loop) -> str:
    """The means of the first step's loss terms, of its first micro-batch; nothing is learned from them.

    Raises:
        RgbenchError: one is not finite.
    """
    batch = loop.load_batch(0)
    with loop.updater.autocast():
        result = loop.trainer.step(batch, StepDraws(loop.recipe.seed, 0, len(batch.ids)))
    means = {name: float(v.detach().mean()) for terms in result.losses.values() for name, v in terms.items()}
    wrong = [name for name, value in means.items() if not math.isfinite(value)]
    if wrong:
        raise RgbenchError(f"the first step's loss term {wrong[0]} is not finite; look at {', '.join(batch.ids[:8])}")
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())


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
        raise UsageError(f"{folder}: exists already; nothing was overwritten. Choose another place with --out")
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        raise UsageError(f"{run.checkpoints}: no checkpoint yet; nothing to export")
    recipe, meta = load_recipe(str(run.config_file)), run.read()
    if not isinstance(recipe, LCDRecipe):
        raise UsageError(f"{path}: a run of {recipe.kind} has no student to export")
    models = load_models(recipe.model.teacher_folder(), device, torch.float32)
    if models.weights_sha256 != meta["teacher"]["sha256"]:
        raise UsageError(
            f"{models.path}: not the teacher that {path} was trained from; its weights have another sha256"
        )
    trainer = LCD(recipe, models)
    tensors, state = checkpoint.load(newest)
    for stem, module in trainer.modules().items():
        module.load_state_dict(tensors[stem])
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_pipeline(trainer, recipe, meta | {"step": state["step"]}, folder, network)
    return folder
