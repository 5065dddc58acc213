"""The documents are true: their runnable blocks run, their commands parse, their links lead somewhere.

A block fenced as ```bash run or ```python run is executed, all of one page in order and in
one empty folder. Other blocks that start with ``rgbench`` are parsed against the command line.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rgbench.cli.main import app
from tests.conftest import ROOT
from tests.fork_server import write_programs
from tools.bench.__main__ import app as bench
from tools.benchtop.__main__ import app as benchtop
from tools.study.__main__ import app as study

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("README.md")])
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#\s]+)")
BLOCK_TIMEOUT_SEC = 600
PROGRAMS = {"rgbench": app, "python -m tools.bench": bench, "python -m tools.benchtop": benchtop}
PROGRAMS |= {"python -m tools.study": study}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, whether it is to be run, its code and its line."""

    language: str
    run: bool
    code: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        language, *rest = match["info"].split() or [""]
        yield Block(language, rest == ["run"], match["code"], text.count("\n", 0, match.start()) + 1)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUNNABLE = [page for page in PAGES if any(block.run for block in blocks(page))]


REAL = "docs/how-to/read-the-report.md"  # train, eval, report, each in a process of its own as a reader has it


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No network, a cache shared by the pages, and what is installed from here for all."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "PIP_NO_INDEX": "1",
        "COLUMNS": "120",
    }


@pytest.fixture
def programs(page: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Folder of ``python``, ``rgbench`` and ``tensorboard`` with this interpreter's rgbench."""
    forks: Path = request.getfixturevalue("fork_server").folder
    if named(page) != REAL:
        return forks
    folder = tmp_path_factory.mktemp("bin")
    write_programs(folder, [sys.executable])
    shutil.copy(forks / "python", folder / "python")
    return folder


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUNNABLE, ids=named)
def test_every_runnable_block_runs(page: Path, tmp_path: Path, programs: Path, environment: dict[str, str]) -> None:
    found = environment | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks(page):
        if not block.run:
            continue
        program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [programs / "python", "-c"]}[block.language]
        code, output = run([*program, block.code], tmp_path, found)
        assert code == 0, f"{named(page)}:{block.line}\n{block.code}\n{output}"


CELLS = """
import json, sys
names = {"__name__": "__main__"}
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
"""


@pytest.mark.long
@pytest.mark.parametrize("notebook", sorted((ROOT / "docs").rglob("*.ipynb")), ids=named)
def test_every_notebook_runs(notebook: Path, tmp_path: Path, fork_server: Any, environment: dict[str, str]) -> None:
    """Cell by cell, in one process and one empty folder."""
    command = [fork_server.folder / "python", "-c", CELLS, notebook]
    code, output = run(command, tmp_path, environment | {"MPLBACKEND": "agg"})
    assert code == 0, f"{named(notebook)}\n{output}"
    assert (tmp_path / "results" / "report" / "report.md").is_file(), "its last cell"


def run(command: list[str | Path], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output; past the time limit the whole process group ends, not the shell alone."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        output, _ = process.communicate(timeout=BLOCK_TIMEOUT_SEC)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\nstopped after {BLOCK_TIMEOUT_SEC} seconds"
    return process.returncode, output


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_exists(page: Path) -> None:
    """Verbs and options that a page names exist, in blocks that are too slow to run as well."""
    for block in blocks(page):
        if block.language not in ("", "bash", "sh", "console"):
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            program = next((name for name in PROGRAMS if line.startswith(f"{name} ")), None)
            words = shlex.split(line.removeprefix(program), comments=True) if program else []
            if program and words and not words[0].startswith("-"):
                verbs = words[:2] if words[0] == "probes" else words[:1]
                text = help_of(program, tuple(verbs))
                missing = [word for word in words if word.startswith("--") and f"{word} " not in text]
                assert not missing, f"{named(page)}:{block.line}: {line}: no option {missing}"


@cache
def help_of(program: str, verbs: tuple[str, ...]) -> str:
    shown = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(PROGRAMS[program], [*verbs, "--help"])
    assert shown.exit_code == 0, (verbs, shown.output)
    return shown.output


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        assert (page.parent / match["target"]).exists(), f"{named(page)}: {match['target']}"


def test_all_pages_are_seen() -> None:
    """The how-tos are there and each runs something."""
    assert REAL in map(named, RUNNABLE)
    how_tos = {page.stem for page in RUNNABLE if page.parent.name == "how-to"}
    assert how_tos == {
        "add-a-metric",
        "add-a-probe",
        "add-a-reward",
        "ask-people-in-an-arena",
        "evaluate-a-folder-of-images",
        "evaluate-any-pipeline",
        "evaluate-my-own-model",
        "judge-over-optimisation",
        "measure-headroom",
        "read-the-report",
        "resume-and-move-a-run",
        "score-in-another-environment",
        "train-from-my-own-tars",
        "train-on-my-own-teacher",
        "use-from-python",
        "watch-a-run",
    }
