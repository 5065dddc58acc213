"""``rgbench bench``: measure, write, print."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rgbench.bench import document
from rgbench.bench.machine import Machine, describe
from rgbench.bench.subject import METHODS, RECIPES, load_subject
from rgbench.bench.train_step import measure
from rgbench.errors import UsageError, suggest

ROUNDS = 8


def train_step(
    *,
    preset: str,
    methods: Sequence[str],
    device: str,
    overrides: list[str],
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the step of each method.

    Raises:
        UsageError: an unknown preset or method.
    """
    _check_names(preset, methods)
    rows = []
    for method in methods:
        say(f"train-step {preset} {method} on {device}")
        with tempfile.TemporaryDirectory(prefix="rgbench-bench-") as folder:
            subject = load_subject(preset, method, overrides, device, Path(folder))
            machine = Machine(torch.device(device), subject.loop.recipe.train.dtype)
            rows.append(measure(subject, machine, rounds))
            del subject
    return {"what": "train-step", "preset": preset, "overrides": overrides, "rounds": rounds, "rows": rows}


def _check_names(preset: str, methods: Sequence[str]) -> None:
    if preset not in RECIPES:
        raise UsageError(f"--preset {preset}: {suggest(preset, RECIPES)}")
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"--method {method}: {suggest(method, METHODS)}")


def save(out: Path, command: list[str], device: str, tag: str | None, measured: dict[str, Any]) -> Path:
    """Write a measurement under ``out``.

    Args:
        out: folder.
        command: words that repeat it.
        device: it ran on.
        tag: added to the file's name, for settings that are kept beside others.
        measured: what a function above gave.
    """
    words = [measured["what"], measured["preset"], device, *([tag] if tag else [])]
    return document.write(out, "-".join(words), command, describe(torch.device(device)), measured)
