"""What can be evaluated: a run, a diffusers pipeline folder, the teacher, or a folder of images."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rgbench.errors import UsageError, suggest
from rgbench.evaluation.matching import holds_images
from rgbench.evaluation.on_base import Student
from rgbench.run import RunDirectory
from rgbench.worlds.presets import PRESETS, Preset, find_preset

TEACHER = "teacher"
DEFAULT = PRESETS["benchtop"]
FINISHED = "finished"
# What trainers and diffusers call the parts of any model: no name tells two models apart by these.
LAYOUT = (
    *("pipeline", "unet", "pytorch_lora_weights.safetensors"),
    *(f"diffusion_pytorch_model{middle}.safetensors" for middle in ("", ".fp16")),
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
RUN_KEYS = ("method", "world", "seed", "status", "step", "steps", "teacher", "rewards", "sampling", "cost")

NO_STUDENT = "pre-trained a latent proxy and has no student; name its latent_proxy/ as proxy.path of an lrm recipe"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A model to evaluate.

    Attributes:
        name: its row in tables and its folder under ``results/``.
        method: "teacher", a trainer's kind, or "external".
        folder: the diffusers pipeline, or the images.
        world: tables compare models of one world.
        preset: whose prompts, reward and judges it is measured with.
        training_seed: None where nothing was trained here.
        training: ``step`` of the weights and ``steps`` of the run; empty where nothing was trained here.
        sampling: ``steps`` and ``guidance_scale`` of the run's recipe; empty where there is no run.
        rewards: what it was trained on, as in run.json.
        cost: of its training, as in run.json.
        images: the folder holds images and no model.
        student: a UNet or LoRA on a base model; ``folder`` is then the part's.
    """

    name: str
    method: str
    folder: Path
    world: str
    preset: Preset
    training_seed: int | None = None
    training: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    rewards: tuple[Mapping[str, Any], ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    images: bool = False
    student: Student | None = None


def resolve_targets(names: Sequence[str], runs: Path) -> list[Target]:
    """Targets by name, in the order given; without names, the teachers of all finished runs, then the runs.

    Args:
        names: run folders, run names under ``runs``, pipeline folders, folders of images, hub ids of pipelines that
            were fetched, or "teacher".
        runs: the folder of runs.

    Raises:
        UsageError: an unknown name, a run that is not finished, or no finished run at all.
    """
    distinct: dict[str, Target] = {}
    for target in [_named(name, runs) for name in names] if names else _all_finished(runs):
        other = distinct.setdefault(target.name, target)
        if other.folder.resolve() != target.folder.resolve():
            raise UsageError(
                f"{other.folder} and {target.folder} would both be {target.name!r}; evaluate one at a time"
            )
    return list(distinct.values())


def cached_repository(name: str) -> Path | None:
    """The folder of a hub repository in the local Hugging Face cache; None where nothing of it was fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def student_target(base: str, unet: Path | None, lora: Path | None) -> Target:
    """A student published as a part, on its base model.

    Args:
        base: a preset, or a pipeline folder.
        unet: its UNet, or None.
        lora: its LoRA, or None.

    Raises:
        UsageError: not exactly one of the two, or a base that is neither a folder nor a preset.
    """
    if (unet is None) == (lora is None):
        raise UsageError("--base takes one of --unet PATH and --lora PATH: the student that was trained from it")
    student = Student(base, unet, lora)
    preset = DEFAULT if Path(base).is_dir() else find_preset(base)
    path = student.path.resolve()
    return Target(_model_name(path), "external", path, preset.name, preset, student=student)


def _named(name: str, runs: Path) -> Target:
    if name == TEACHER:
        return _preset_teacher(DEFAULT)
    if not name.strip():  # of a variable that is not set; as a path it would be this folder
        raise UsageError("a target without a name; give a run, a pipeline folder, a folder of images or teacher")
    for path in (Path(name), runs / name):
        if not path.is_dir():
            continue
        if (path / "run.json").is_file():
            return _finished_run(path)
        if (path / "model_index.json").is_file():
            run = path.resolve().parent
            return _finished_run(run) if (run / "run.json").is_file() else _pipeline(path)
        if holds_images(path):
            return Target(path.resolve().name, "external", path, DEFAULT.name, DEFAULT, images=True)
        raise UsageError(
            f"{path}: neither a run (no run.json) nor a diffusers pipeline (no model_index.json) nor a folder of images"
        )
    if HUB_ID.fullmatch(name):
        folder = cached_repository(name)
        if folder is not None:
            return Target(name.split("/")[1], "external", folder, DEFAULT.name, DEFAULT)
    known = [path.name for path in _run_folders(runs)]
    fetch = f"; or, if it is a hub id, get it with: hf download {name}" if HUB_ID.fullmatch(name) else ""
    raise UsageError(
        f"{name!r} is no folder, no run under {runs} and not 'teacher'; {suggest(name, [*known, TEACHER])}{fetch}"
    )


def _run_folders(runs: Path) -> list[Path]:
    return sorted(file.parent for file in runs.glob("*/run.json"))


def _all_finished(runs: Path) -> list[Target]:
    finished = []
    for folder in _run_folders(runs):
        meta = _read(folder)
        if meta["sampling"] is None:
            log.warning("%s: left out: %s", folder, NO_STUDENT)
        elif meta["status"] == FINISHED:
            finished.append((folder, meta))
        else:
            log.warning("%s: left out: %s", folder, _unfinished(folder, meta))
    if not finished:
        raise UsageError(
            f"no finished run under {runs}; train one with: rgbench train lcd, "
            "or name a target, such as: rgbench eval teacher"
        )
    teachers = [_teacher_of(meta) for _, meta in finished]
    return [*(teacher for teacher in teachers if teacher), *(_run(folder, meta) for folder, meta in finished)]


def _finished_run(folder: Path) -> Target:
    meta = _read(folder)
    if meta["sampling"] is None:
        raise UsageError(f"{folder}: {NO_STUDENT}")
    if meta["status"] != FINISHED:
        raise UsageError(f"{folder}: {_unfinished(folder, meta)}")
    return _run(folder, meta)


def _read(folder: Path) -> dict[str, Any]:
    run = RunDirectory.open(folder)
    meta = run.read()
    missing = [key for key in RUN_KEYS if key not in meta]
    if missing:
        raise UsageError(f"{run.run_file}: lacks {', '.join(missing)}; not a whole run")
    return meta


def _run(folder: Path, meta: Mapping[str, Any]) -> Target:
    return Target(
        name=folder.resolve().name,
        method=meta["method"],
        folder=folder / "pipeline",
        world=meta["world"],
        preset=PRESETS.get(meta["world"], DEFAULT),
        training_seed=meta["seed"],
        training={"step": meta["step"], "steps": meta["steps"]},
        sampling=meta["sampling"],
        rewards=tuple(meta["rewards"]),
        cost=meta["cost"],
    )


def _unfinished(folder: Path, meta: Mapping[str, Any]) -> str:
    resume = shlex.join(["rgbench", "train", str(folder / "config.yaml"), "--out", str(folder)])
    return f"{meta['status']} at step {meta['step']} of {meta['steps']}; finish it first with: {resume}"


def _teacher_of(meta: Mapping[str, Any]) -> Target | None:
    """The run's teacher; None, with a warning, where it is gone."""
    teacher = meta["teacher"]
    if teacher.get("preset"):
        return _preset_teacher(find_preset(teacher["preset"]))
    folder = Path(teacher["path"])
    if not folder.is_dir():
        log.warning("%s: a teacher that runs were trained from is gone; left out", folder)
        return None
    preset = PRESETS.get(meta["world"], DEFAULT)
    return Target(f"{TEACHER}-{teacher['sha256'][:8]}", TEACHER, folder, meta["world"], preset)


def _preset_teacher(preset: Preset) -> Target:
    return Target(TEACHER, TEACHER, preset.teacher_folder(), preset.name, preset)


def _pipeline(folder: Path) -> Target:
    return Target(_model_name(folder.resolve()), "external", folder, DEFAULT.name, DEFAULT)


def _model_name(path: Path) -> str:
    """The last part of a path that is the model's own and not its layout's: mine of mine/pipeline/unet."""
    for part in (path, *path.parents):
        if part.name and part.name not in LAYOUT:
            return part.name if part.is_dir() else part.stem
    return path.name
