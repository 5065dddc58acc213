"""``rgbench train``: from a recipe to a run directory with a student in it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rgbench.data import open_source
from rgbench.errors import UsageError
from rgbench.models import load_models, weights_sha256
from rgbench.process import pick_device
from rgbench.registry import resolve
from rgbench.rewards.contract import fingerprint_id
from rgbench.run import RunDirectory
from rgbench.trainers.contract import Trainer
from rgbench.trainers.export import export_pipeline
from rgbench.trainers.loop import Loop
from rgbench.trainers.recipe import LCDRecipe, load_recipe
from rgbench.trainers.stop import StopRequest

DTYPES = {"float32": torch.float32}


def train(
    recipe: str, overrides: list[str], *, out: Path | None = None, resume: str = "auto", device: str = "auto"
) -> Path:
    """Train the student of a recipe, or go on with it.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        out: run directory; ``runs/{recipe name}-s{seed}`` by default.
        resume: ``auto`` goes on with an unfinished run of the same config; ``never`` refuses any existing run.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The run directory; its student is in ``pipeline/``.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: a missing part, an existing run of another config, teacher, data or reward.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
        RgbenchError: a loss or gradient is not finite.
    """
    if resume not in ("auto", "never"):
        raise UsageError(f"--resume {resume}: use auto or never")
    settings = load_recipe(recipe, overrides)
    path = out or Path("runs") / f"{settings.name}-s{settings.seed}"
    command = resume_command(recipe, overrides, out, device)
    with StopRequest() as stop:
        run = RunDirectory(path)
        config = settings.model_dump(mode="json")
        if run.run_file.is_file():
            if resume == "never":
                raise UsageError(
                    f"{path}: a run is there; use --resume auto to go on with it, or --out for another place"
                )
            run.create(config, {})  # refuses another config
            if run.read()["status"] == "finished":
                _check_same(run, {"teacher": _teacher(settings)})
                _say(f"{path}: finished already; its student is in {run.pipeline}")
                return path
        _train(settings, config, run, device, stop, command)
    return path


def _train(
    settings: LCDRecipe, config: dict[str, Any], run: RunDirectory, device: str, stop: StopRequest, command: str
) -> None:
    source = open_source(settings.data)
    dtype = DTYPES[settings.train.dtype]
    models = load_models(settings.model.teacher_folder(), pick_device(device), dtype)
    trainer: Trainer = resolve("trainer", settings.kind).build(settings, models)
    origin = {"teacher": _teacher(settings), "rewards": _rewards(trainer), "data": source.fingerprint()}
    if run.run_file.is_file():
        _check_same(run, origin)
    loop = Loop(trainer, source, settings, run)
    loop.load_batch(0)  # data that does not fit the model is found before anything is written
    run.create(config, _first_meta(settings, run, loop) | origin)
    loop.restore()
    if loop.step:
        _say(f"{run.path}: going on after step {loop.step} of {settings.train.steps}")
    run.update(status="running", step=loop.step)
    loop.train(stop, command)
    export_pipeline(trainer, settings, run.read(), run.pipeline)
    run.update(status="finished", step=loop.step, cost=loop.cost.read())


def _say(message: str) -> None:
    Console(stderr=True).print(message, soft_wrap=True, highlight=False, markup=False)


def resume_command(recipe: str, overrides: list[str], out: Path | None, device: str) -> str:
    """The command line that goes on with a run."""
    words = ["rgbench", "train", recipe, *overrides]
    words += ["--out", str(out)] if out else []
    words += ["--device", device] if device != "auto" else []
    return shlex.join(words)


def _teacher(settings: LCDRecipe) -> dict[str, Any]:
    folder = settings.model.teacher_folder()
    return {"preset": settings.model.preset, "path": str(folder), "sha256": weights_sha256(folder)}


def _rewards(trainer: Trainer) -> list[dict[str, Any]]:
    fingerprints = trainer.reward_fingerprints()
    return [{"name": f["name"], "fingerprint": f, "fingerprint_id": fingerprint_id(f)} for f in fingerprints]


def _first_meta(settings: LCDRecipe, run: RunDirectory, loop: Loop) -> dict[str, Any]:
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
        "sampling": {
            "sampler": "lcm",
            "steps": settings.sampling.steps,
            "guidance_scale": settings.sampling.guidance_scale,
        },
    }


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
