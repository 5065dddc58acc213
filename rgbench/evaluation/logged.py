"""What a run logged while it trained, kept beside its results as ``training.json``.

The report is made from the results folder alone, and runs are large and may be gone by
then. The log is thinned to at most 200 rows, each the mean of the steps up to its own:

    {"schema_version": 1, "rows": [{"step": 5, "loss/lcd": 0.03, "fidelity/kendall_tau": 0.6}, …]}

A row lacks what was not logged in its steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgbench.errors import UsageError
from rgbench.files import read_json, write_json_atomic
from rgbench.run import RunDirectory

FILE = "training.json"
SCHEMA_VERSION = 1
NUM_ROWS = 200

Row = dict[str, float]


def keep_log(run: Path, folder: Path) -> None:
    """Writes the thinned log of a run into the folder of its results; nothing where the run has no log.

    Raises:
        UsageError: ``run`` is no run.
    """
    logged = RunDirectory.open(run).read_log()
    if not logged:
        return
    content = {"schema_version": SCHEMA_VERSION, "rows": thin(logged, NUM_ROWS)}
    if not _holds(folder / FILE, content):  # results that are complete may lie where nothing can be written
        write_json_atomic(folder / FILE, content)


def _holds(path: Path, content: dict[str, Any]) -> bool:
    try:
        return path.is_file() and bool(read_json(path) == content)
    except UsageError:
        return False


def load_log(folder: Path) -> list[Row]:
    """Rows by step; none where nothing was kept.

    Raises:
        UsageError: not such a file, or one of another version.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    content = read_json(path)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{path}: schema version {version}, not {SCHEMA_VERSION}; evaluate the run again")
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise UsageError(f"{path}: rows must be objects of numbers with a step; evaluate the run again")
    return rows


def thin(rows: Sequence[dict[str, Any]], num: int) -> list[Row]:
    """At most `num` rows: means of consecutive rows' numbers, at the last step of each block.

    >>> thin([{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0, "b": 4.0}, {"step": 3, "a": 5.0}], 2)
    [{'step': 2, 'a': 2.0, 'b': 4.0}, {'step': 3, 'a': 5.0}]
    """
    size = max(1, -(-len(rows) // num))
    return [_mean(rows[start : start + size]) for start in range(0, len(rows), size)]


def _mean(block: Sequence[dict[str, Any]]) -> Row:
    values: dict[str, list[float]] = {}
    for row in block:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
                values.setdefault(key, []).append(value)
    return {"step": block[-1]["step"], **{key: math.fsum(found) / len(found) for key, found in values.items()}}


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and "step" in row
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in row.values())
    )
