"""``python -m tools.bench gpu``: every figure of the page that needs a GPU, one command after the other.

Each runs in a process of its own, so that none finds memory taken by another, and one that fails leaves the others.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rgbench.core.errors import RgbenchError
from tools.bench.targets import GPU_SETTINGS, LOW_MEMORY_SETTINGS

FULL_SIZE = ("--preset", "sd21-base")
# What a card of 80 GB takes.
BATCHES = {"lcd": "4,8,16", "rg_lcd": "1,2,4", "lrm": "4,8,16"}
SIDES = {"lcd": "256,512,768", "rg_lcd": "256,512", "lrm": "256,512"}


def _each(words: Sequence[str], own: Mapping[str, Sequence[str]], name: str = "") -> Iterator[tuple[str, ...]]:
    """A command for each method with its own words, into a file of its own."""
    for method, more in own.items():
        yield (*words, *more, *FULL_SIZE, "--method", method, "--tag", name + method)


COMMANDS: tuple[tuple[str, ...], ...] = (
    *_each(("train-step",), GPU_SETTINGS),
    *_each(("train-step",), LOW_MEMORY_SETTINGS, "low-memory-"),
    ("generate", *FULL_SIZE, "--dtype", "bfloat16", "--tag", "bfloat16"),
    ("generate", *FULL_SIZE, "--dtype", "float32", "--tag", "float32"),
    ("eval", *FULL_SIZE, "--num", "1024"),
    ("levers", *FULL_SIZE),
    ("metrics", *FULL_SIZE, "--num", "512"),
    *_each(("growth", "batch"), {method: ("--values", values) for method, values in BATCHES.items()}),
    *_each(("growth", "resolution"), {m: (*GPU_SETTINGS[m], "--values", values) for m, values in SIDES.items()}),
    ("growth", "proxy", *FULL_SIZE, "--values", "6,12,24"),
    *_each(("compile", "--networks", "recipe"), GPU_SETTINGS),
)


def words(command: Sequence[str], out: Path, device: str) -> list[str]:
    """The whole command line of one measurement, after ``rgbench``."""
    return ["bench", *command, "--device", device, "--out", str(out)]


def run_all(commands: Sequence[Sequence[str]], out: Path, device: str, say: Callable[[str], None]) -> None:
    """Carry the commands out.

    Args:
        commands: words after ``python -m tools.bench``.
        out: folder of the result files.
        device: for all of them.
        say: prints a line.

    Raises:
        RgbenchError: some failed; names them, after all others have run.
    """
    failed = []
    for number, command in enumerate(commands, 1):
        line = words(command, out, device)
        say(f"[{number}/{len(commands)}] rgbench {' '.join(line)}")
        if subprocess.run([sys.executable, "-m", "rgbench", *line]).returncode:
            failed.append(f"rgbench {' '.join(line)}")
    if failed:
        raise RgbenchError(f"{len(failed)} of {len(commands)} failed, as they say above: {'; '.join(failed)}")
