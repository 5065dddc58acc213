"""Evaluation targets: runs and their checkpoints, diffusers pipelines, students on a base model, folders of images.

Imports no torch, so that a misspelt name is answered at once.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rgbench.core import checkpoint
from rgbench.core.config import load_yaml
from rgbench.core.errors import UsageError, suggest
from rgbench.core.io import (
    SUMS,
    check_tensors,
    inspect_image,
    is_folder_name,
    load_safetensors,
    save_safetensors_atomic,
)
from rgbench.core.run import RunDirectory
from rgbench.data.files import image_files
from rgbench.evaluate.config import EvalConfig
from rgbench.metrics.statistics import kl_best_of
from rgbench.models.folder import DENOISERS, check_folder, check_pipeline, image_side, is_stable_diffusion
from rgbench.models.presets import PRESETS, Preset, find_preset

TEACHER = "teacher"
DEFAULT = PRESETS["benchtop"]
FULL_SIZE = "full-size"  # world of models of unknown origin that do not make the benchtop's images
FINISHED = "finished"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of the denoising network
# Names that trainers and diffusers give to the parts of any model: they tell no two models apart.
LAYOUT = (
    *("pipeline", "unet", "lora", "pytorch_lora_weights.safetensors", "adapter_model.safetensors"),
    *(f"diffusion_pytorch_model{middle}.safetensors" for middle in ("", ".fp16")),
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NETWORKS = ("target", "student")  # of a checkpoint, which may be sampled
RUN_KEYS = ("method", "world", "seed", "status", "step", "steps", "teacher", "rewards", "sampling", "cost")
NO_STUDENT = "pre-trained a latent proxy and has no student; name its latent_proxy/ as proxy.path of an lrm recipe"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A model, or a folder of finished images.

    Attributes:
        name: its row in tables and its folder under the results.
        method: "teacher", a trainer's kind, or "external".
        folder: the diffusers pipeline, the student's part, or the images.
        world: tables compare models of one world.
        preset: its world's, whose prompts, reward and sampler settings are the defaults; None for other worlds.
        training_seed: None where nothing was trained here.
        recipe_sha256: of the run's recipe; None where it is unknown.
        config: the run's recipe as it was resolved; empty where it is unknown.
        training: ``step`` of the weights and ``steps`` of the run; empty where nothing was trained here.
        sampling: ``steps`` and ``guidance_scale`` of the run's recipe; empty where there is no run.
        rewards: those it was trained on, as in run.json.
        cost: of its training, as in run.json; ``selection_kl`` of one on the best of n samples.
        images: the folder holds images and no model.
        base: preset or folder of the base model of a student given as a part; None for a whole model.
        lora: the part is a LoRA, not a UNet.
        weights_sha256: of the student that its run exported; None where it is unknown.
    """

    name: str
    method: str
    folder: Path
    world: str
    preset: Preset | None
    training_seed: int | None = None
    recipe_sha256: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    rewards: tuple[Mapping[str, Any], ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    images: bool = False
    base: str | None = None
    lora: bool = False
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        for name in (self.name, self.world):
            if not is_folder_name(name):
                raise UsageError(f"{self.folder}: {name[:80]!r} cannot name a folder of results; rename it")


def check_inputs(config: EvalConfig) -> None:
    """Check that files and targets are there, before anything heavy is imported.

    Raises:
        UsageError: a file or target that does not exist, or a run that is not finished.
    """
    config.check_files()
    if config.base is not None:
        student_target(config.base, config.unet, config.lora)
    if config.targets:
        resolve_targets(config.targets, config.runs)
    elif config.base is None and not _run_folders(config.runs):
        raise _no_run(config.runs)


def config_targets(config: EvalConfig) -> list[Target]:
    """The targets of an evaluation; raises as :func:`resolve_targets` and :func:`student_target`."""
    if config.base is None:
        return resolve_targets(config.targets, config.runs)
    student = student_target(config.base, config.unet, config.lora)
    return [*(resolve_targets(config.targets, config.runs) if config.targets else ()), student]


def resolve_targets(names: Sequence[str], runs: Path) -> list[Target]:
    """Targets by name, in the order given; without names, the teachers of all finished runs, then the runs.

    Args:
        names: run folders, run names under ``runs``, pipeline folders, folders of images, hub ids of pipelines in the
            local cache, presets, whose teachers are meant, or "teacher", the benchtop's.
        runs: the folder of runs.

    Raises:
        UsageError: an unknown name, a run that is not finished, or no finished run at all.
    """
    distinct: dict[tuple[str, str], Target] = {}
    for target in [_named(name, runs) for name in names] if names else _all_finished(runs):
        other = distinct.setdefault((target.world, target.name), target)
        if other.folder.resolve() != target.folder.resolve():
            raise UsageError(
                f"{other.folder} and {target.folder} would both be {target.name!r}; evaluate one at a time"
            )
    return list(distinct.values())


def student_target(base: str, unet: Path | None, lora: Path | None) -> Target:
    """A student published as a part, or a LoRA, on its base model.

    Args:
        base: a preset, a pipeline folder, or a hub id in the local cache.
        unet: its UNet, or None.
        lora: its LoRA, where it has no UNet.

    Raises:
        UsageError: a part that does not exist, or a base that is none of these.
    """
    part = unet or lora
    assert part is not None
    if not part.exists():
        raise UsageError(f"{part}: no such {'LoRA' if unet is None else 'UNet'}; give a weight file or its folder")
    folder = Path(base) if Path(base).is_dir() else None if base in PRESETS else _cached_repository(base)
    if folder is None and HUB_ID.fullmatch(base):
        raise UsageError(f"{base!r} is no folder; if it is a hub id, get it with: hf download {base}")
    preset = find_preset(base) if folder is None else _preset_of(folder)
    base = base if folder is None else str(folder)
    world, path = preset.name if preset else FULL_SIZE, part.resolve()
    return Target(_model_name(path), "external", path, world, preset, base=base, lora=unet is None)


def base_folder(base: str) -> Path:
    """The folder of a target's ``base``; raises as :meth:`rgbench.models.presets.Preset.teacher_folder`."""
    return Path(base) if Path(base).is_dir() else find_preset(base).teacher_folder()


def checkpoint_targets(target: Target, scratch: Path) -> list[Target]:
    """The intact checkpoints of a finished run, from the first to the last before its end.

    A checkpoint holds networks and no pipeline: its target links to the finished pipeline's files, but for the
    network's weights.

    Args:
        target: a run; anything else has no checkpoints.
        scratch: an existing folder for their pipelines, needed until the last was evaluated.

    Returns:
        Targets of the run's own name, told apart by their weights and ``training["step"]``; empty for a target that is
        no run.

    Raises:
        UsageError: a run that kept no checkpoint before its last step, or one of another run or network.
    """
    from rgbench.train.identity import check_checkpoint  # torch: not wanted by those who only name a target

    if not target.training:
        return []
    run = target.folder.parent
    contents, (config, _) = RunDirectory.open(run).read(), load_yaml(run / "config.yaml")
    sampling = config.get("sampling")
    network = sampling.get("network", NETWORKS[0]) if isinstance(sampling, dict) else None
    if network not in NETWORKS:
        raise UsageError(f"{run / 'config.yaml'}: sampling.network is none of {', '.join(NETWORKS)}; correct it")
    found = []
    for folder in reversed(checkpoint.checkpoints(run / "checkpoints")):
        step = int(folder.name.removeprefix("step-"))
        if step >= target.training["steps"]:
            continue
        try:
            checkpoint.verify(folder)
        except checkpoint.CorruptCheckpoint as error:
            log.warning("%s; this checkpoint is left out", error)
            continue
        check_checkpoint(folder, checkpoint.read_meta(folder), config, contents)
        place = _checkpoint_pipeline(
            target.folder, folder / f"{network}.safetensors", scratch / target.name / folder.name
        )
        found.append(replace(target, folder=place, weights_sha256=None, training={**target.training, "step": step}))
    if not found:
        raise UsageError(f"{run}: has no checkpoint before its last step; train with a larger train.keep_checkpoints")
    return found


def _named(name: str, runs: Path) -> Target:
    if name == TEACHER:
        return preset_teacher(DEFAULT)
    if not name.strip():  # of a variable that is not set; as a path it would be this folder
        raise UsageError("a target without a name; give a run, a pipeline folder, a folder of images or teacher")
    for path in (Path(name), runs / name):
        if not path.is_dir():
            continue
        if (path / "run.json").is_file():
            return _finished_run(path)
        if (path / "model_index.json").is_file():
            run = path.resolve().parent
            return _finished_run(run) if (run / "run.json").is_file() else _pipeline(path, _model_name(path.resolve()))
        if images := image_files(path):
            return _images(path, images[0])
        raise UsageError(
            f"{path}: neither a run (no run.json) nor a diffusers pipeline (no model_index.json) nor a folder of images"
        )
    if name in PRESETS:
        return preset_teacher(PRESETS[name])
    fetch = ""
    if HUB_ID.fullmatch(name) and Path(name).parent != runs:
        folder = _cached_repository(name)
        if folder is not None:
            return _pipeline(folder, name.split("/")[1])
        fetch = (
            f"; or, if it is a hub id, get it with: hf download {name} (of a gated one, accept the licence on its page "
            "and run hf auth login first)"
        )
    known = [path.name for path in _run_folders(runs)]
    raise UsageError(
        f"{name!r} is no folder, no run under {runs}, no preset and not 'teacher'; "
        f"{suggest(name, [*known, TEACHER, *PRESETS])}{fetch}"
    )


def _run_folders(runs: Path) -> list[Path]:
    return sorted(file.parent for file in runs.glob("*/run.json"))


def _all_finished(runs: Path) -> list[Target]:
    finished = []
    for folder in _run_folders(runs):
        meta = _read(folder)
        if fault := _not_evaluable(folder, meta):
            log.warning("%s: left out: %s", folder, fault)
        else:
            finished.append((folder, meta))
    if not finished:
        raise _no_run(runs)
    teachers = [_teacher_of(meta) for _, meta in finished]
    return [*(teacher for teacher in teachers if teacher), *(_run(folder, meta) for folder, meta in finished)]


def _no_run(runs: Path) -> UsageError:
    return UsageError(
        f"no finished run under {runs}; train one with: rgbench train lcd, or name a target, such as: "
        "rgbench eval teacher"
    )


def _finished_run(folder: Path) -> Target:
    meta = _read(folder)
    if fault := _not_evaluable(folder, meta):
        raise UsageError(f"{folder}: {fault}")
    return _run(folder, meta)


def _read(folder: Path) -> dict[str, Any]:
    run = RunDirectory.open(folder)
    meta = run.read()
    missing = [key for key in RUN_KEYS if key not in meta]
    missing += [f"teacher.{key}" for key in ("path", "sha256") if key not in meta.get("teacher", {})]
    if missing:
        raise UsageError(f"{run.run_file}: lacks {', '.join(missing)}; not a whole run")
    return meta


def _not_evaluable(folder: Path, meta: Mapping[str, Any]) -> str | None:
    """Why a run cannot be evaluated; None where it can."""
    if meta["sampling"] is None:
        return NO_STUDENT
    if meta["status"] == FINISHED:
        return None
    resume = shlex.join(["rgbench", "train", str(folder / "config.yaml"), "--out", str(folder)])
    return f"{meta['status']} at step {meta['step']} of {meta['steps']}; finish it first with: {resume}"


def _run(folder: Path, meta: Mapping[str, Any]) -> Target:
    file = folder / "config.yaml"
    config = load_yaml(file)[0] if file.is_file() else {}
    num = meta.get("data", {}).get("samples") if config.get("weighted", {}).get("weights") == "best" else None
    return Target(
        name=folder.resolve().name,
        method=meta["method"],
        folder=folder / "pipeline",
        world=meta["world"],
        preset=PRESETS.get(meta["world"]),
        training_seed=meta["seed"],
        recipe_sha256=meta.get("recipe_sha256"),
        config=config,
        training={"step": meta["step"], "steps": meta["steps"]},
        sampling=meta["sampling"],
        rewards=tuple(meta["rewards"]),
        cost=meta["cost"] | ({"selection_kl": kl_best_of(num)} if num else {}),
        weights_sha256=meta.get("student_sha256"),
    )


def _teacher_of(meta: Mapping[str, Any]) -> Target | None:
    """The run's teacher; None, with a warning, where it is gone."""
    teacher = meta["teacher"]
    if teacher.get("preset"):
        return preset_teacher(find_preset(teacher["preset"]))
    folder = Path(teacher["path"])
    if not folder.is_dir():
        log.warning("%s: left out: the teacher that runs were trained from is gone", folder)
        return None
    name = f"{TEACHER}-{teacher['sha256'][:8]}"
    return Target(name, TEACHER, folder, meta["world"], PRESETS.get(meta["world"]))


def preset_teacher(preset: Preset) -> Target:
    """The teacher of a preset; raises as :meth:`rgbench.models.presets.Preset.teacher_folder`."""
    return Target(TEACHER, TEACHER, preset.teacher_folder(), preset.name, preset)


def _pipeline(folder: Path, name: str) -> Target:
    """A pipeline of unknown origin."""
    preset = _preset_of(folder)
    return Target(name, "external", folder, preset.name if preset else FULL_SIZE, preset)


def _preset_of(folder: Path) -> Preset | None:
    """A pipeline of unknown origin belongs to the benchtop only if it is like its teacher, of images of its size."""
    if not is_stable_diffusion(folder):
        check_pipeline(folder)
        return None
    check_folder(folder)
    return DEFAULT if image_side(folder) == DEFAULT.resolution else None


def _images(folder: Path, first: Path) -> Target:
    preset = DEFAULT if inspect_image(first).size == (DEFAULT.resolution,) * 2 else None
    return Target(folder.resolve().name, "external", folder, preset.name if preset else FULL_SIZE, preset, images=True)


def _cached_repository(name: str) -> Path | None:
    """The folder of a hub repository in the local Hugging Face cache; None where nothing of it was fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _model_name(path: Path) -> str:
    """The last part of a path that is the model's own and not its layout's: mine of mine/pipeline/unet."""
    for part in (path, *path.parents):
        if part.name and part.name not in LAYOUT:
            return part.name if part.is_dir() else part.stem
    return path.name


def _checkpoint_pipeline(finished: Path, weights: Path, place: Path) -> Path:
    """Links to the finished pipeline's files, but for the network's weights."""
    component = next((name for name in DENOISERS if (finished / name).is_dir()), DENOISERS[0])
    own = Path(component) / WEIGHTS
    final, ours = load_safetensors(finished / own), load_safetensors(weights)
    check_tensors(weights, ours, final, str(finished), "evaluate this run without --checkpoints")
    for file in sorted(path for path in finished.rglob("*") if path.is_file()):
        link = place / file.relative_to(finished)
        link.parent.mkdir(parents=True, exist_ok=True)
        if file not in (finished / own, finished / SUMS):
            os.symlink(file.resolve(), link)
    save_safetensors_atomic(ours, place / own)
    return place
