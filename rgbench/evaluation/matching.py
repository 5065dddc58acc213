"""Which image of a folder belongs to which prompt: one to one, or the names at fault are said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rgbench.data.prompts import Prompt, PromptSet
from rgbench.errors import UsageError
from rgbench.evaluation.names import INDEX, file_stem
from rgbench.files import parse_json, read_json
from rgbench.metrics.real_images import SUFFIXES, image_files

METADATA = "metadata.jsonl"  # the layout of Hugging Face's image folders
NUM_NAMED = 10  # names in a message


def holds_images(folder: Path) -> bool:
    """Whether a folder, or one just below it, holds an image."""
    return any(path.suffix.lower() in SUFFIXES for pattern in ("*", "*/*") for path in folder.glob(pattern))


def list_images(folder: Path) -> dict[str, Path]:
    """Image files of a folder and its subfolders, by relative path without suffix, in order of their names.

    Raises:
        UsageError: no such folder, no image in it, or two files that differ in their suffix alone.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of images")
    found: dict[str, Path] = {}
    for path in image_files(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise UsageError(f"{folder}: {found[stem].name} and {path.name} would both be image {stem!r}; keep one")
        found[stem] = path
    if not found:
        raise UsageError(f"{folder}: no image found (looked for {', '.join(SUFFIXES)} in it and in its subfolders)")
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
        rows = [_row(row, ("file", "prompt_id", "prompt"), f"{index}: entry {i}") for i, row in enumerate(listed)]
        rows = [row for row, entry in zip(rows, listed, strict=True) if entry.get("seed") == seed]
        table = index
    elif metadata.is_file():
        rows, table = _metadata_rows(metadata), metadata
    else:
        return None
    twice = [name for name, num in Counter(row["id"] for row in rows).items() if num > 1]
    if twice or not rows:
        fault = f"names {named(twice)} twice; one image per prompt" if twice else f"names no image of seed {seed}"
        raise UsageError(f"{table}: {fault}")
    return rows


def _metadata_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        parsed = [(i, parse_json(line)) for i, line in enumerate(lines, 1) if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not UTF-8 lines of JSON: {error}") from error
    return [_row(row, ("file_name", "", "text"), f"{path}:{i}") for i, row in parsed]


def _row(row: Any, keys: tuple[str, str, str], where: str) -> dict[str, Any]:
    file, identity, text = keys
    wanted = [key for key in keys if key]
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in wanted):
        raise UsageError(f"{where}: expected an object with {', '.join(wanted)}")
    stem = Path(row[file]).with_suffix("").as_posix()
    return {"stem": stem, "id": row[identity] if identity else stem, "text": row[text].strip()}


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
        other = [p for p in prompts if p.id in by_id and by_id[p.id]["text"] != p.text.strip()]
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
        stems = by_text.get(prompt.text.strip())
        if stems:
            found[prompt.id] = stems.pop(0)
    return found


def _by_name(images: Mapping[str, Path], prompts: Sequence[Prompt], seed: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for prompt in prompts:
        names = (f"{file_stem(prompt.id)}-{seed}", file_stem(prompt.id), prompt.id)
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
