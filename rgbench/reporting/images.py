"""The images that evaluations kept: which prompts every model has, and where their files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rgbench.errors import UsageError
from rgbench.evaluation.results import Result
from rgbench.files import read_json
from rgbench.reporting.gather import Comparison, Row

Key = tuple[str, str, int]  # prompt id, prompt, seed


@dataclass(frozen=True)
class Kept:
    """Files by row and (prompt id, prompt, seed); `common` are those of all rows here, in order."""

    files: dict[Row, dict[Key, Path]]
    common: tuple[Key, ...]


def kept_images(comparison: Comparison, results: Path) -> Kept:
    """The rows that kept images of common prompts, in the order of the table, and what is common to them.

    Of a row with several training seeds the first seed's images stand for it.

    Raises:
        UsageError: an index that cannot be read, or that names files elsewhere.
    """
    files: dict[Row, dict[Key, Path]] = {}
    common: set[Key] = set()
    for row in comparison.rows:
        index = image_index(row.results[0], results)
        shared = common & set(index) if files else set(index)
        if shared:
            files[row], common = index, shared
    return Kept(files, tuple(sorted(common)))


def image_index(result: Result, results: Path) -> dict[Key, Path]:
    """The kept images of one generation; empty where none were kept.

    Raises:
        UsageError: an index that cannot be read, or that names files elsewhere.
    """
    folder = results / result.world / result.model / result.generation.id / "images"
    path = folder / "index.json"
    if not path.is_file():
        return {}
    index = {}
    for entry in read_json(path):
        name = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{path}: each entry needs a plain file name, not {name!r}; run `rgbench eval` again")
        index[(str(entry["prompt_id"]), str(entry["prompt"]), int(entry["seed"]))] = folder / name
    return index
