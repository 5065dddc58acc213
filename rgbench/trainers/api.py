"""``rgbench train``: from a recipe to a run directory with a student in it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rgbench.data import open_source, prepare_source
from rgbench.errors import UsageError
from rgbench.launch.ranks import Ranks
from rgbench.models import load_models
from rgbench.pipeline_folder import weights_sha256
from rgbench.process import end_with_parent, launched, pick_device
from rgbench.registry import resolve
from rgbench.rewards.contract import fingerprint_id
from rgbench.run import RunDirectory
from rgbench.trainers.caching import open_cached
from rgbench.trainers.contract import Trainer
from rgbench.trainers.loop import Loop, check_split
from rgbench.trainers.proxy_folder import PROXY_FOLDER
from rgbench.trainers.recipe import FREE_KEYS, BaseRecipe, LCDRecipe, load_recipe
from rgbench.trainers.stop import StopRequest


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
