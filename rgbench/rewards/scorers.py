"""Scorers that run in another Python environment: which there are, where they stand, what they need there."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rgbench.errors import UsageError, suggest
from rgbench.rewards.worker import Worker

WORKERS = ("hpsv3", "imagereward", "vqascore")  # files of rgbench.rewards.workers
LOOK_TIMEOUT_SEC = 120.0
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def look(python: str, worker: str, key: str = "reward") -> str:
    """What an environment has of what a scorer needs, in words; no weights are loaded.

    Raises:
        UsageError: no such interpreter or scorer, or a package is missing; says how to get it.
    """
    scorer = find_scorer(worker, key)
    running = Worker(python, scorer["worker"], key, LOOK_TIMEOUT_SEC)
    try:
        ready = started(running, {**scorer, "options": {}, "look": True, "path": None, "device": "cpu"}, key)
    finally:
        running.close()
    versions = ready["versions"]
    package = scorer_module(worker).PACKAGES[0] if worker in WORKERS else None
    if package and versions[package] is None:
        raise UsageError(_missing(running, f"no package {package}", ready["install"], key))
    found = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join([f"{running.python}: Python {ready['python']}", *found])


def find_scorer(worker: str, key: str) -> dict[str, Any]:
    """Of a scorer, what the runner's ``start`` wants: its name, its file if it is no module of the other environment,
    and the folder that the file may import from.

    Raises:
        UsageError: no such file, and no name of a module.
    """
    if worker in WORKERS:
        return {"worker": worker, "file": str(scorer_module(worker).__file__), "folder": None}
    if worker.endswith(".py"):
        file = Path(worker).expanduser().absolute()
        if not file.is_file():
            raise UsageError(f"{key}.worker {worker}: no such file")
        return {"worker": file.stem, "file": str(file), "folder": str(file.parent)}
    if not MODULE.fullmatch(worker):
        raise UsageError(f"{key}.worker {worker[:80]!r}: no .py file and no module; {suggest(worker, WORKERS)}")
    return {"worker": worker, "file": None, "folder": None}


def scorer_module(name: str) -> Any:
    """The module of a scorer that comes with rgbench; its ``INSTALL`` makes the environment."""
    return import_module(f"rgbench.rewards.workers.{name}")


def started(running: Worker, settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a worker says when it can score.

    Args:
        running: the worker.
        settings: what the runner's ``start`` has.
        key: of the recipe's section, for messages.

    Raises:
        UsageError: it cannot; says why.
    """
    header = running.start(dict(settings))
    if header["type"] == "ready":
        return header
    running.close()
    if header["what"] == "options":
        raise UsageError(f"{key}.options: {running.name} does not take them: {header['message']}")
    known = "" if settings["file"] else f"; {suggest(settings['worker'], WORKERS)}"
    raise UsageError(_missing(running, header["message"], header["install"], key) + known)


def _missing(running: Worker, what: str, install: str | None, key: str) -> str:
    place = f"{running.python} -m"
    if Path(running.python).parent == Path(sys.executable).parent:
        place = "in another environment than rgbench's own, which its pins would break:"
    command = "" if install is None else f"; install it with: {place} {install}"
    return f"{key}.python {running.python}: {running.name} cannot be imported there: {what}{command}"
