"""``rgbench bench gpu``: every figure of the page that needs a GPU, one command after the other.

Each runs in a process of its own, so that none finds memory taken by another, and one that fails leaves the others.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rgbench.errors import RgbenchError

FULL_SIZE = ("--preset", "sd21-base")
SAVING = "train.gradient_checkpointing=true"
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("train-step", *FULL_SIZE),
    ("train-step", SAVING, *FULL_SIZE, "--tag", "low-memory"),
    ("train-step", SAVING, "train.batch_size=4", *FULL_SIZE, "--method", "rg_lcd", "--tag", "batch-4"),
    ("generate", *FULL_SIZE, "--dtype", "bfloat16", "--tag", "bfloat16"),
    ("generate", *FULL_SIZE, "--dtype", "float32", "--tag", "float32"),
    ("eval", *FULL_SIZE, "--num", "1024"),
    ("levers", *FULL_SIZE),
    ("metrics", *FULL_SIZE, "--num", "512"),
    ("growth", "batch", *FULL_SIZE, "--values", "4,8,16"),
    ("growth", "resolution", *FULL_SIZE, "--values", "256,512,768"),
    ("growth", "proxy", *FULL_SIZE, "--values", "6,12,24"),
    ("compile", *FULL_SIZE, "--networks", "recipe"),
)


def words(command: Sequence[str], out: Path, device: str) -> list[str]:
    """The whole command line of one measurement, after ``rgbench``."""
    return ["bench", *command, "--device", device, "--out", str(out)]


def run_all(commands: Sequence[Sequence[str]], out: Path, device: str, say: Callable[[str], None]) -> None:
    """Carry the commands out.

    Args:
        commands: words after ``rgbench bench``.
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
