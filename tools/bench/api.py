"""``python -m tools.bench``: measure, write, print."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rgbench.core.errors import UsageError, suggest
from rgbench.core.registry import names
from rgbench.evaluate.evaluate import default_metrics
from rgbench.models.pipeline import load_models
from rgbench.train.recipe import load_recipe
from tools.bench import compiled, counted, dimensions, document, evaluation, fid, generate, levers, ranks, start, whole
from tools.bench import data as data_rates
from tools.bench import metric_costs as metric_cost
from tools.bench import train_step as train_steps
from tools.bench.fitting import row_of
from tools.bench.jobs import benchtop_job, full_size_job
from tools.bench.machine import DTYPES, Machine, describe
from tools.bench.random_models import random_models
from tools.bench.subject import FULL_SIZE, METHODS, RANDOM, RECIPES, load_subject, recipe_of


def train_step(
    *,
    preset: str,
    methods: Sequence[str],
    device: str,
    overrides: list[str],
    rounds: int,
    say: Callable[[str], None],
    neighbour: bool = False,
) -> dict[str, Any]:
    """Measure the step of each method.

    Raises:
        UsageError: an unknown preset or method.
    """
    _check_names(preset, methods)
    rows = []
    for method in methods:
        say(f"train-step {preset} {method} on {device}")
        with _folder() as folder:

            def measure(method: str = method, folder: Path = folder) -> dict[str, Any]:
                subject = load_subject(preset, method, overrides, device, folder)
                machine = Machine(torch.device(device), subject.loop.recipe.train.dtype)
                return train_steps.measure(subject, machine, rounds, neighbour=neighbour)

            rows.append(row_of(_head(preset, method, overrides), measure))
    return {"what": "train-step", "preset": preset, "overrides": overrides, "rounds": rounds, "rows": rows}


def cost_growth(
    *, over: str, values: Sequence[int], preset: str, methods: Sequence[str], device: str, overrides: list[str],
    rounds: int, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure how the cost of a step grows in one dimension.

    Raises:
        UsageError: an unknown dimension, preset or method, values of ranks, or a size that the networks cannot take.
    """
    known = (*dimensions.VALUES, "ranks")
    if over not in known:
        raise UsageError(f"growth {over}: {suggest(over, known)}")
    _check_names(preset, methods)
    if over == "ranks":
        if values or preset in RANDOM:
            raise UsageError("growth ranks: takes no --values, and the benchtop alone; 1 and 2 ranks are measured")
        rows = ranks.measure(methods, overrides, rounds, device, ranks.PLANS, say)
    else:
        with _folder() as folder:
            rows = dimensions.measure(
                over, values or dimensions.VALUES[over], preset=preset, methods=methods, device=device,
                overrides=overrides, rounds=rounds, folder=folder, say=say,
            )  # fmt: skip
    found = {"what": "growth", "preset": preset, "over": over, "overrides": overrides, "rounds": rounds}
    return found | {"rows": rows}


def lever_gains(
    *, preset: str, names: Sequence[str], device: str, overrides: list[str], rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure each lever alone.

    Raises:
        UsageError: an unknown preset or lever.
    """
    _check_names(preset, ())
    for name in names:
        if name not in levers.LEVERS:
            raise UsageError(f"--lever {name}: {suggest(name, levers.LEVERS)}")
    chosen = list(names) or list(levers.LEVERS)
    say(f"levers {preset} on {device}: {', '.join(chosen)}")
    with _folder() as folder:
        subject = load_subject(preset, "lrm", overrides, device, folder)
        rows = levers.measure(subject, chosen, rounds)
    return {"what": "levers", "preset": preset, "overrides": overrides, "rounds": rounds, "rows": rows}


def compile_gains(
    *, preset: str, methods: Sequence[str], choices: Sequence[str], device: str, overrides: list[str], rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure whole steps with and without ``torch.compile``.

    Raises:
        UsageError: an unknown preset, method or choice, no compiler, or a recipe that compiles already.
    """
    _check_names(preset, methods)
    for choice in choices:
        if choice not in compiled.CHOICES:
            raise UsageError(f"--networks {choice}: {suggest(choice, compiled.CHOICES)}")
    compiled.check_compiler(device)
    rows = []
    for method in methods:
        say(f"compile {preset} {method} on {device}")
        with _folder() as folder:

            def measure(method: str = method, folder: Path = folder) -> dict[str, Any]:
                subject = load_subject(preset, method, overrides, device, folder)
                return compiled.measure(subject, choices or compiled.CHOICES, rounds, folder / "inductor")

            rows.append(row_of(_head(preset, method, overrides), measure))
    return {"what": "compile", "preset": preset, "overrides": overrides, "rounds": rounds, "rows": rows}


def generation(
    *, preset: str, device: str, dtype: str, batch_size: int, steps: int, guidance: float, rounds: int
) -> dict[str, Any]:
    """Measure the sampler beside diffusers' pipeline.

    Raises:
        UsageError: an unknown preset or dtype.
    """
    _check_names(preset, ())
    _check_dtype(dtype)
    place, kind = torch.device(device), DTYPES[dtype]
    models = random_models(RANDOM[preset], place, kind) if preset in RANDOM else load_models(preset, place, kind)
    student = generate.untrained_student(models)
    row = generate.measure(student, batch_size=batch_size, steps=steps, guidance=guidance, rounds=rounds)
    return {"what": "generate", "preset": preset, "rounds": rounds, "rows": [row]}


def evaluation_share(
    *, preset: str, num: int, metrics: list[str], device: str, dtype: str, rounds: int
) -> dict[str, Any]:
    """Measure an evaluation beside the generation in it.

    Raises:
        UsageError: an unknown preset or dtype.
    """
    _check_names(preset, ())
    _check_dtype(dtype)
    with _folder() as folder:
        if preset in RANDOM:
            row = evaluation.measure_full_size(
                RANDOM[preset], folder, num=num, metrics=metrics or None, device=device, dtype=dtype
            )
        else:
            row = evaluation.measure(folder, num=num, metrics=metrics or None, device=device, rounds=rounds)
    return {"what": "eval", "preset": preset, "rounds": rounds, "rows": [row]}


def metric_costs(*, preset: str, num: int, metrics: list[str], device: str, dtype: str) -> dict[str, Any]:
    """Measure what each metric costs by image.

    Raises:
        UsageError: an unknown preset, dtype or metric.
    """
    _check_names(preset, ())
    _check_dtype(dtype)
    with _folder() as folder:
        if preset in RANDOM:
            chosen = metrics or list(default_metrics(own_images=True))
            settings: Any = full_size_job(RANDOM[preset], folder, num=num, metrics=chosen, device=device, dtype=dtype)
        else:
            chosen = metrics or list(default_metrics(own_images=False))
            settings = benchtop_job(folder, num=num, metrics=chosen, device=device)
        with settings as (target, job):
            probes = [name for name in names("probe") if not metrics and "probes" in chosen]
            row = metric_cost.measure(target, job, [*chosen, *probes])
    return {"what": "metrics", "preset": preset, "rows": [row]}


def frechet(*, dim: int, num: int, images: int, device: str, rounds: int) -> dict[str, Any]:
    """Measure the Fréchet distance: its solve, its memory, its way from images."""
    with _folder() as folder:
        row = {
            "solve": fid.solve(dim, num, rounds),
            "moments_peak_bytes": fid.memory(dim),
            "end_to_end": fid.end_to_end(folder, num=images, side=256, device=device, rounds=rounds),
        }
    return {"what": "fid", "preset": "random", "rounds": rounds, "rows": [row]}


def data(*, num: int, width: int, height: int, resolution: int, rounds: int) -> dict[str, Any]:
    """Measure decoding from tars beside PIL."""
    with _folder() as folder:
        row = data_rates.measure(folder, num=num, width=width, height=height, resolution=resolution, rounds=rounds)
    return {"what": "data", "preset": "webdataset", "rounds": rounds, "rows": [row]}


def startup(*, device: str, rounds: int) -> dict[str, Any]:
    """Measure the way from a command to its first step."""
    with _folder() as folder:
        row = start.measure(folder, device, rounds)
    return {"what": "start", "preset": "benchtop", "rounds": rounds, "rows": [row]}


def whole_run(*, subject: str, settings: list[str]) -> dict[str, Any]:
    """Measure a recipe or the demo from its command to its last file.

    Raises:
        UsageError: no such recipe, or a demo outside the source folder.
        RgbenchError: it failed.
    """
    with _folder() as folder:
        row = whole.measure(subject, folder, settings)
    return {"what": "whole", "preset": subject.replace("/", "-"), "overrides": settings, "rows": [row]}


def counts(
    *, preset: str, methods: Sequence[str], overrides: list[str], steps: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Count the steps of a full-size preset without computing them.

    Raises:
        UsageError: an unknown method, or a preset that is not measured with random weights.
    """
    if preset not in RANDOM:
        raise UsageError(f"--preset {preset}: is counted by train-step as it runs; here {suggest(preset, RANDOM)}")
    _check_names(preset, methods)
    rows = []
    for method in methods:
        say(f"count {preset} {method}")
        without = [] if method == "lcd" else ["gradients.at_prediction=false"]  # reads values, and fakes have none
        recipe = load_recipe(RECIPES[preset].format(method), [*FULL_SIZE, *without, *overrides])
        rows.append(counted.count_step(RANDOM[preset], recipe))
    rows.append(counted.count_generation(RANDOM[preset], steps))
    return {"what": "count", "preset": preset, "overrides": overrides, "rows": rows}


def _head(preset: str, method: str, overrides: list[str]) -> dict[str, Any]:
    """What a row says even if the step does not fit."""
    train = recipe_of(preset, method, overrides).train
    return {"method": method, "batch_size": train.batch_size, "dtype": train.dtype}


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rgbench-bench-") as folder:
        yield Path(folder)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: {suggest(dtype, DTYPES)}")


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
