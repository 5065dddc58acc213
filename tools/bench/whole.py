"""``python -m tools.bench whole``: a recipe, or ``make demo``, from its command to its last file, in an empty folder.

What runs is the command itself, in fresh processes, with caches of its own that are empty. Stages are read afterwards
from the times of the files that end them, so nothing watches while it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgbench.core.config import packaged_recipes
from rgbench.core.errors import RgbenchError, UsageError, suggest
from rgbench.core.io import read_json
from rgbench.train.log import RSS_UNIT_BYTES

DEMO = "demo"
MAKEFILE = Path("Makefile")
DEMO_RECIPES = ("lcd", "rg_lcd", "lrm")
NUM_LAST_CHARACTERS = 800
# Runs a command and writes what it and all its children used. A small process stands between because Linux counts the
# memory of whoever starts a process as that process's own, and this one holds torch.
USED = """
import json, pathlib, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
text = json.dumps({"cpu_sec": used.ru_utime + used.ru_stime, "maxrss": used.ru_maxrss})
pathlib.Path(sys.argv[1]).write_text(text)
sys.exit(abs(code))
"""

Ends = Mapping[str, Callable[[], list[Path]]]


@dataclass(frozen=True)
class Plan:
    """What is run and how its stages are told apart.

    Attributes:
        before: a command that is not timed, or None.
        command: the words that are timed.
        ends: stage → the files whose last change ends it, in the order of the stages.
    """

    before: list[str] | None
    command: list[str]
    ends: Ends


def plan(subject: str, folder: Path, settings: list[str]) -> Plan:
    """The commands of a subject.

    Args:
        subject: ``demo``, or a recipe that comes with rgbench.
        folder: an empty one.
        settings: ``KEY=VALUE``: of the recipe, or variables of the Makefile.

    Raises:
        UsageError: no such recipe, or a demo where there is no Makefile.
    """
    if subject == DEMO:
        if not MAKEFILE.is_file():
            raise UsageError(f"{Path.cwd()}: has no Makefile; `make demo` is timed in rgbench's own source folder")
        command = ["make", "demo", f"DEMO={folder}", *settings]
        return Plan(["make", "install", *settings], command, _demo_ends(folder))
    if subject not in packaged_recipes():
        raise UsageError(f"{subject}: {suggest(subject, [DEMO, *packaged_recipes()])}")
    command = [sys.executable, "-m", "rgbench", "train", subject, *settings, "--out", str(folder)]
    return Plan(None, command, _run_ends(folder))


def _run_ends(run: Path) -> Ends:
    return {
        "start": lambda: [run / "environment.json"],
        "steps, checkpoints, samples": lambda: list((run / "checkpoints").glob("*/*")) + list(run.glob("samples/*")),
        "export": lambda: [run / "run.json"],
    }


def _demo_ends(demo: Path) -> Ends:
    trained = {f"train {name}": _one(demo / "runs" / f"{name}-s0" / "run.json") for name in DEMO_RECIPES}
    evaluated = {"eval": lambda: [p for p in (demo / "results").rglob("*.json") if ".cache" not in p.parts]}
    return trained | evaluated | {"report": _one(demo / "report" / "report.html")}


def _one(file: Path) -> Callable[[], list[Path]]:
    return lambda: [file]


def measure(subject: str, folder: Path, settings: list[str]) -> dict[str, Any]:
    """Seconds from the command to its end, by stage, and the largest resident size of any of its processes.

    Args:
        subject: ``demo``, or a recipe that comes with rgbench.
        folder: an empty one.
        settings: ``KEY=VALUE``: of the recipe, or variables of the Makefile.

    Raises:
        UsageError: no such recipe, or a demo where there is no Makefile.
        RgbenchError: the command failed; with the end of what it said.
    """
    planned = plan(subject, folder / "out", settings)
    if planned.before:
        _run(planned.before, folder)
    begun, start = time.time(), time.perf_counter()
    used = _run(planned.command, folder)
    whole = time.perf_counter() - start
    return {
        "subject": subject,
        "seconds": whole,
        "cpu_sec": used["cpu_sec"],
        "peak_rss_bytes": used["maxrss"] * RSS_UNIT_BYTES,
        "stages": stages(planned.ends, begun, begun + whole),
    }


def _run(command: list[str], folder: Path) -> dict[str, Any]:
    """A command to its end; the CPU seconds of it and all its children, and the largest resident size of one.

    Raises:
        RgbenchError: it failed.
    """
    log, used = folder / "log", folder / "used.json"
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    with log.open("w", encoding="utf-8") as file:
        words = [sys.executable, "-c", USED, str(used), *command]
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")[-NUM_LAST_CHARACTERS:]
        raise RgbenchError(f"{' '.join(command)} failed with exit code {code}: {said}")
    found: dict[str, Any] = read_json(used)
    return found


def stages(ends: Ends, begun: float, ended: float) -> dict[str, float]:
    """Seconds of each stage; what comes after the last one's files is the way out of the processes.

    Args:
        ends: stage → the files whose last change ends it.
        begun: time of the start, seconds since the epoch.
        ended: time of the end.

    Raises:
        RgbenchError: a stage left no file, or an earlier one than the stage before it.
    """
    found, last = {}, begun
    for name, files in ends.items():
        times = [path.stat().st_mtime for path in files() if path.is_file()]
        if not times or max(times) < last:
            raise RgbenchError(f"whole: the stage '{name}' left no file where one was expected")
        found[name], last = max(times) - last, max(times)
    return found | {"end": ended - last}
