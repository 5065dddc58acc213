"""``python -m tools.bench growth``: one step of each method at several batches, resolutions or sizes of the proxy.

| over | a value is | weights |
|---|---|---|
| batch | images of a step | the preset's |
| resolution | image side in pixels, networks of the preset's layout at that side | random |
| proxy | layers of the latent proxy's image tower, which learns whole or as the recipe says | random |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rgbench.core.errors import UsageError
from rgbench.train.lrm import LRM
from tools.bench.clock import Clock, Spread, alternate
from tools.bench.counting import count
from tools.bench.fitting import row_of
from tools.bench.machine import Machine
from tools.bench.random_models import HeldImages, Shape, benchtop_shape
from tools.bench.subject import RANDOM, Subject, load_subject, make_subject, random_trainer, recipe_of

VALUES = {"batch": (8, 32, 64), "resolution": (64, 128), "proxy": (2, 4, 8)}
LATENT_PIXELS = 8  # image pixels of one latent pixel


def measure(
    over: str, values: Sequence[int], *, preset: str, methods: Sequence[str], device: str, overrides: list[str],
    rounds: int, folder: Path, say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each method at each value.

    Args:
        over: ``batch``, ``resolution`` or ``proxy``.
        values: of it.
        preset: ``benchtop`` or one that is measured with random weights.
        methods: those whose step is timed; for ``proxy`` LRM alone.
        device: ``cpu`` or ``cuda``.
        overrides: ``key.path=value`` settings of the recipe.
        rounds: how often each step is timed.
        folder: an empty one.
        say: prints a line.

    Raises:
        UsageError: a resolution that is no multiple of the networks' strides.
    """
    rows = []
    for method in ("lrm",) if over == "proxy" else methods:
        for value in values:
            say(f"growth {preset} {method} {over} {value} on {device}")
            place = folder / f"{method}-{value}"
            place.mkdir()
            make = partial(_subject, over, value, preset, method, device, overrides, place)
            rows.append(row_of({"method": method, "over": over, "value": value}, partial(_made, make, rounds)))
    return rows


def _made(make: Callable[[], Subject], rounds: int) -> dict[str, Any]:
    return _row(make(), rounds)


def _subject(
    over: str, value: int, preset: str, method: str, device: str, overrides: list[str], folder: Path
) -> Subject:
    if over == "batch":
        return load_subject(preset, method, [*overrides, f"train.batch_size={value}"], device, folder)
    shape = grown(over, value, RANDOM[preset] if preset in RANDOM else benchtop_shape())
    recipe = recipe_of(preset, method, overrides)
    torch.manual_seed(0)
    trainer = random_trainer(shape, recipe, torch.device(device))
    return make_subject(method, trainer, HeldImages(shape.side), folder, "random")


def grown(over: str, value: int, shape: Shape) -> Shape:
    """A layout at another resolution, or with another proxy.

    Raises:
        UsageError: a resolution that is no multiple of the networks' strides.
    """
    if over == "proxy":
        return replace(shape, proxy=shape.proxy | {"layers": value})
    stride = LATENT_PIXELS * max(2 ** (len(shape.unet["block_out_channels"]) - 1), shape.proxy["patch_size"])
    if value % stride:
        raise UsageError(f"growth: {value} px is no multiple of {stride}, as these networks need")
    side = value // LATENT_PIXELS
    return replace(shape, unet=shape.unet | {"sample_size": side}, proxy=shape.proxy | {"image_size": side})


def _row(subject: Subject, rounds: int) -> dict[str, Any]:
    """Our step from images: seconds, FLOPs, and the rate of large products measured between."""
    trainer, train = subject.trainer, subject.loop.recipe.train
    machine, clock = Machine(torch.device(trainer.models.device), train.dtype), Clock(trainer.models.device)
    rates: list[float] = []
    counted = count(subject.loop.train_step)
    work = {"step": subject.loop.train_step, "machine": lambda: rates.append(machine.large_rate())}
    spread = Spread.of(alternate(work, rounds, clock)["step"])
    rate = median(rates[1:])
    return {
        "batch_size": train.batch_size,
        "resolution": trainer.models.resolution,
        "dtype": train.dtype,
        "weights": subject.weights,
        "proxy_parameters": sum(p.numel() for p in trainer.proxy.parameters()) if isinstance(trainer, LRM) else 0,  # type: ignore[attr-defined]
        "seconds": spread.to_json(),
        "images_per_sec": train.batch_size / spread.median,
        "flops": counted.flops,
        "matmul_flop_per_sec": rate,
        "share_of_matmul_rate": counted.flops / rate / spread.median,
    }
