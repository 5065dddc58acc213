"""Result files of benchmarks: one JSON file per command, schema-versioned, with machine, versions and command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rgbench.core.errors import UsageError
from rgbench.core.io import read_json, write_json_atomic

SCHEMA_VERSION = 1
DOES_NOT_FIT = "does_not_fit"  # key of a row without figures: the words of the device that has too little memory


def write(folder: Path, name: str, command: list[str], machine: dict[str, Any], measured: dict[str, Any]) -> Path:
    """Write ``name.json``.

    Args:
        folder: made where it is missing.
        name: of the file, without suffix.
        command: words that repeat the measurement.
        machine: from :func:`tools.bench.machine.describe`.
        measured: ``what``, ``preset`` and the figures.

    Returns:
        The file.
    """
    from rgbench.core.run import provenance

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    origin = provenance()
    head = {"schema_version": SCHEMA_VERSION, "command": " ".join(command), "git": origin["git"]}
    write_json_atomic(file, head | {"time": origin["time"], "machine": machine} | measured)
    return file


def fitting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have figures."""
    return [row for row in rows if DOES_NOT_FIT not in row]


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every benchmark result of a folder, by file name without suffix.

    Raises:
        UsageError: a damaged file, or one of another version.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        content = read_json(file)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise UsageError(f"{file}: schema version {version}; this rgbench reads {SCHEMA_VERSION}: measure it again")
        found[file.stem] = content
    return found
