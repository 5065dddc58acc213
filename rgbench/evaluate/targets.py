"""What can be evaluated: a run, a diffusers pipeline folder, the teacher, or a folder of images.

A run's checkpoints as targets, so that rewards and images can be followed along its training.

A checkpoint holds the networks but no pipeline. Its target is the finished run's pipeline
with the checkpoint's weights in place of the final ones: everything else is linked, so that
a checkpoint costs no more room than its network.

Which image of a folder belongs to which prompt: one to one, or the names at fault are said.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rgbench.core import checkpoint
from rgbench.core.config import load_yaml
from rgbench.core.errors import UsageError, suggest
from rgbench.core.io import INDEX, file_stem, load_safetensors, normal_form, read_json, save_safetensors_atomic
from rgbench.core.run import RunDirectory
from rgbench.data.files import IMAGE_SUFFIXES, clean_text, image_files, is_image_name, read_captions
from rgbench.data.prompts import Prompt, PromptSet
from rgbench.models.presets import PRESETS, Preset, find_preset
from rgbench.models.student import Student

METADATA = "metadata.jsonl"  # the layout of Hugging Face's image folders
NUM_NAMED = 10  # names in a message


def holds_images(folder: Path) -> bool:
    """Whether a folder, or one just below it, holds an image."""
    return any(is_image_name(path.name) for pattern in ("*", "*/*") for path in folder.glob(pattern))


def list_images(folder: Path) -> dict[str, Path]:
    """Image files of a folder and its subfolders, by relative path without suffix, in order of their names.

    Raises:
        UsageError: no such folder, no image in it, or two files that differ in their suffix alone.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of images")
    found: dict[str, Path] = {}
    for path in image_files(folder):
        stem = _stem(path.relative_to(folder))
        if stem in found:
            raise UsageError(f"{folder}: {found[stem].name} and {path.name} would both be image {stem!r}; keep one")
        found[stem] = path
    if not found:
        raise UsageError(
            f"{folder}: no image found (looked for {', '.join(IMAGE_SUFFIXES)} in it and in its subfolders)"
        )
    return found


def own_rows(folder: Path, seed: int) -> list[dict[str, Any]] | None:
    """Rows ``stem``, ``id`` and ``text`` of a folder that says itself what its images show, else None.

    Read from ``index.json`` as rgbench writes it (its rows of one noise seed), or from
    ``metadata.jsonl`` with ``file_name`` and ``text``; the id is then the file's stem.

    Raises:
        UsageError: a table that is damaged, lacks a column, or names a prompt twice.
    """
    index, metadata = folder / INDEX, folder / METADATA
    if index.is_file():
        listed = read_json(index)
        if not isinstance(listed, list):
            raise UsageError(f"{index}: expected a list with file, prompt_id and prompt of each image")
        rows = [_row(entry, f"{index}: entry {i}") for i, entry in enumerate(listed)]
        rows = [row for row, entry in zip(rows, listed, strict=True) if entry.get("seed") == seed]
        table = index
    elif metadata.is_file():
        table = metadata
        listed = [{"file": row.file_name, "prompt": row.text, "where": row.where} for row in read_captions(metadata)]
        rows = [_row(entry | {"prompt_id": _stem(Path(entry["file"]))}, entry["where"]) for entry in listed]
    else:
        return None
    twice = [name for name, num in Counter(row["id"] for row in rows).items() if num > 1]
    if twice or not rows:
        fault = f"names {named(twice)} twice; one image per prompt" if twice else f"names no image of seed {seed}"
        raise UsageError(f"{table}: {fault}")
    return rows


def _row(entry: Any, where: str) -> dict[str, Any]:
    wanted = ("file", "prompt_id", "prompt")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) and entry[k].strip() for k in wanted):
        raise UsageError(f"{where}: expected an object with {', '.join(wanted)}, or file_name and text")
    text = clean_text(entry["prompt"], where)
    return {"stem": _stem(Path(entry["file"])), "id": entry["prompt_id"], "text": text}


def _stem(path: Path) -> str:
    """A relative path without suffix, in the form under which names are compared."""
    return normal_form(path.with_suffix("").as_posix())


def own_prompts(folder: Path, seed: int) -> PromptSet:
    """The prompts that a folder names itself, in the order of its table.

    Raises:
        UsageError: it names none (says how to give them), or its table is damaged.
    """
    rows = own_rows(folder, seed)
    if rows is None:
        raise UsageError(
            f"{folder}: nothing says what its images should show (no {INDEX}, no {METADATA}); "
            "give the prompts with --prompts FILE, or --prompts benchtop for the benchtop's"
        )
    return PromptSet(folder.resolve().name, tuple(Prompt(row["id"], row["text"]) for row in rows))


def match_images(folder: Path, prompts: PromptSet, known: PromptSet, seed: int) -> list[Path]:
    """The image of each prompt, in the order of the prompts.

    By the folder's own table; else by name, ``{id}`` or ``{id}-{seed}`` with slashes as they are or as
    underscores; else by number, where all names are the numbers from 0, or from 1, in the order of the prompts.

    Args:
        folder: of images.
        prompts: those whose images are wanted.
        known: all that the folder may hold images of; ``prompts`` are the first of them.
        seed: of the noise, part of the names that rgbench gives.

    Raises:
        UsageError: prompts without an image, images without a prompt, an image made from another text than the
            prompt's, or names that fit neither way. The files are named; nothing is left out in silence.
    """
    images, rows = list_images(folder), own_rows(folder, seed)
    if rows is not None:
        found = _by_table(folder, rows, known.prompts)
    else:
        found = _by_name(images, known.prompts, seed) or _by_number(images, known.prompts, len(prompts))
        if not found:
            strange = [stem for stem in images if not stem.isdigit()]  # among numbers, the few that are none
            raise UsageError(
                f"{folder}: {named(strange)} do not say which prompt they belong to; name the images by the "
                f"prompts' ids (such as {file_stem(prompts.prompts[0].id)}.png), or by their numbers from 0"
            )
    missing = [prompt.id for prompt in prompts.prompts if found.get(prompt.id) not in images]
    if missing:
        raise UsageError(
            f"{folder}: {len(missing)} of {len(prompts)} prompts have no image: {named(missing)}; make them, or take "
            "the first prompts alone with --num"
        )
    told = {row["stem"] for row in rows} if rows is not None else set(found.values())
    extra = [stem for stem in images if stem not in told]
    if extra:
        whose = f"no prompt of {known.name}" if rows is None else "no row of the folder's table"
        raise UsageError(f"{folder}: {len(extra)} images belong to {whose}: {named(extra)}; move them away")
    return [images[found[prompt.id]] for prompt in prompts.prompts]


def named(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(repr(name) for name in names[:NUM_NAMED]) + more


def _by_table(folder: Path, rows: Iterable[Mapping[str, Any]], prompts: Sequence[Prompt]) -> dict[str, str]:
    by_id = {row["id"]: row for row in rows}
    if any(prompt.id in by_id for prompt in prompts):
        other = [p for p in prompts if p.id in by_id and by_id[p.id]["text"] != clean_text(p.text, p.id)]
        if other:
            row = by_id[other[0].id]
            raise UsageError(
                f"{folder}: {len(other)} images were made from another text than their prompt's: {row['stem']!r} from "
                f"{row['text'][:80]!r}, where the prompt list says {other[0].text[:80]!r}; give the list they were "
                "made from with --prompts"
            )
        return {prompt.id: by_id[prompt.id]["stem"] for prompt in prompts if prompt.id in by_id}
    by_text: dict[str, list[str]] = {}
    for row in by_id.values():
        by_text.setdefault(row["text"], []).append(row["stem"])
    found = {}
    for prompt in prompts:  # a text that occurs twice takes its images in the order of the table
        stems = by_text.get(clean_text(prompt.text, prompt.id))
        if stems:
            found[prompt.id] = stems.pop(0)
    return found


def _by_name(images: Mapping[str, Path], prompts: Sequence[Prompt], seed: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for prompt in prompts:
        names = (f"{file_stem(prompt.id)}-{seed}", file_stem(prompt.id), normal_form(prompt.id))
        fitting = [name for name in dict.fromkeys(names) if name in images]
        if len(fitting) > 1:
            raise UsageError(
                f"{images[fitting[0]].parent}: both {named(fitting)} fit the prompt {prompt.id!r}; keep one"
            )
        if fitting:
            found[prompt.id] = fitting[0]
    return found


def _by_number(images: Mapping[str, Path], prompts: Sequence[Prompt], num_wanted: int) -> dict[str, str]:
    if not all(stem.isascii() and stem.isdigit() for stem in images):
        return {}
    numbers = {int(stem): stem for stem in images}
    if len(numbers) < len(images):
        raise UsageError(
            f"{next(iter(images.values())).parent}: two images have one number, such as 1 and 01; keep one"
        )
    first = 0 if 0 in numbers else 1
    positions = {number - first: stem for number, stem in numbers.items()}
    extra = [stem for position, stem in positions.items() if position >= len(prompts)]
    folder = next(iter(images.values())).parent
    if extra:
        raise UsageError(
            f"{folder}: {len(images)} numbered images for {len(prompts)} prompts: {named(extra)} belong to none; "
            "give the prompt list that they were made from"
        )
    if first == 1 and len(positions) not in (num_wanted, len(prompts)):  # each would be given its neighbour's prompt
        raise UsageError(
            f"{folder}: no image has the number 0, and {len(positions)} images are not all of {len(prompts)} counted "
            "from 1: does one fail, perhaps the first of a count from 0? number them from 0"
        )
    return {prompts[position].id: stem for position, stem in sorted(positions.items())}


TEACHER = "teacher"
DEFAULT = PRESETS["benchtop"]
FINISHED = "finished"
# What trainers and diffusers call the parts of any model: no name tells two models apart by these.
LAYOUT = (
    *("pipeline", "unet", "lora", "pytorch_lora_weights.safetensors", "adapter_model.safetensors"),
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


WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def checkpoint_targets(target: Target, scratch: Path) -> list[Target]:
    """The intact checkpoints of a finished run, from the first to the last before its end.

    Args:
        target: a run; anything else has no checkpoints.
        scratch: an existing folder for their pipelines, needed until the last was evaluated.

    Returns:
        Targets of the run's own name, told apart by their weights and ``training["step"]``;
        empty for a target that is no run.

    Raises:
        UsageError: a run that kept no checkpoint before its last step, or one of another network.
    """
    if not target.training:
        return []
    run = target.folder.parent
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
        place = _checkpoints_pipeline(
            target.folder, folder / f"{_network(run)}.safetensors", scratch / target.name / folder.name
        )
        found.append(replace(target, folder=place, training={**target.training, "step": step}))
    if not found:
        raise UsageError(
            f"{run}: no checkpoint before its last step is left; train with a larger train.keep_checkpoints"
        )
    return found


def _network(run: Path) -> str:
    """Which network the run exports: "target" or "student"."""
    config, _ = load_yaml(run / "config.yaml")
    return str(config["sampling"]["network"])


def _checkpoints_pipeline(finished: Path, weights: Path, place: Path) -> Path:
    """Links to the finished pipeline's files, but for the network's weights."""
    final, ours = load_safetensors(finished / WEIGHTS), load_safetensors(weights)
    if final.keys() != ours.keys() or any(final[key].shape != ours[key].shape for key in final):
        raise UsageError(f"{weights}: not the network of {finished}; evaluate this run without --checkpoints")
    for file in sorted(path for path in finished.rglob("*") if path.is_file()):
        link = place / file.relative_to(finished)
        link.parent.mkdir(parents=True, exist_ok=True)
        if file != finished / WEIGHTS:
            os.symlink(file.resolve(), link)
    save_safetensors_atomic(ours, place / WEIGHTS)
    return place
