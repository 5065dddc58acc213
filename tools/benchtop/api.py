"""Build the benchtop, check its quality, show its physics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from rgbench.core.errors import UsageError
from rgbench.core.io import read_json, write_json_atomic
from rgbench.models.presets import WEIGHTS
from tools.benchtop.checking import check_world
from tools.benchtop.physics import METHODS, SCALES, run_physics
from tools.benchtop.stages import SHIPPED, WorldRecipe, run_stages


def build(
    out: Path,
    stages: list[str],
    *,
    device: str,
    quick: bool = False,
    force: bool = False,
    install: bool = False,
) -> Path:
    """Build a world from its seeds, stage by stage; stages that are done are skipped.

    Args:
        out: the build folder, kept between calls.
        stages: names of the stages to run, all if empty.
        device: torch device.
        quick: a few steps of each stage.
        force: run the stages even if they are done.
        install: copy the finished parts over the package's own.

    Returns:
        The build folder.

    Raises:
        UsageError: unknown stage, or a stage whose inputs are missing.
    """
    recipe = WorldRecipe.quick() if quick else WorldRecipe()
    run_stages(recipe, out, stages, torch.device(device), force)
    if install:
        install_world(out, WEIGHTS)
    return out


def install_world(out: Path, target: Path) -> None:
    """Copy the shipped parts and the manifest of a finished build.

    Raises:
        UsageError: a part has not been built.
    """
    missing = [name for name in SHIPPED if not (out / name).exists()]
    if missing:
        raise UsageError(f"{out}: not built yet: {', '.join(missing)}")
    for name in SHIPPED:
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(out / name, target / name)
    write_json_atomic(target / "manifest.json", read_json(out / "manifest.json"))


def check(
    path: Path | None = None,
    *,
    device: str,
    num: int = 512,
    student: Path | None = None,
    as_json: bool = False,
    out: Path | None = None,
) -> bool:
    """Measure the quality table of a world.

    Args:
        path: folder of its parts; the package's own if None.
        device: torch device.
        num: scenes per split.
        student: the ``pipeline`` folder of a finished LCD run; trained first if None.
        as_json: print the rows as one JSON list instead of a table.
        out: where to write the rows with their provenance; not written if None.

    Returns:
        Whether every bounded row holds.
    """
    rows = check_world(path or WEIGHTS, student, num, torch.device(device), out, quiet=as_json)
    if as_json:
        print(json.dumps([row.to_dict() for row in rows], indent=1))
    return all(row.ok for row in rows)


def physics(
    out: Path,
    *,
    seeds: int = 3,
    num: int = 512,
    device: str,
    overrides: list[str] | None = None,
    methods: list[str] | None = None,
    scales: list[float] | None = None,
) -> bool:
    """Train LCD, direct and LRM students at several reward scales and read them.

    Args:
        out: folder of the runs and of ``physics.json``.
        seeds: training seeds per cell, at least 2.
        num: test prompts per student.
        device: torch device.
        overrides: ``key=value`` settings for every recipe, such as ``train.steps=100``.
        methods: ``rg_lcd``, ``lrm`` or both, the default.
        scales: reward scales; 1, 3 and 10 by default.

    Returns:
        Whether direct optimisation hacked the reward in every seed at some scale.

    Raises:
        UsageError: fewer than two seeds, or an unknown method.
    """
    if seeds < 2:
        raise UsageError(f"--seeds {seeds}: the spread between LCD seeds needs at least 2")
    methods, scales = methods or list(METHODS), scales or list(SCALES)
    if wrong := sorted(set(methods) - set(METHODS)):
        raise UsageError(f"--method {wrong[0]}: use {' or '.join(METHODS)}; LCD is always trained")
    document = run_physics(
        WEIGHTS, out, seeds, num, torch.device(device), overrides or [], methods=methods, scales=scales
    )
    print(f"{'method':8} {'scale':>6} {'hacked':>8} {'reward gain':>12} {'all right':>10} {'>0.22 dB':>9}")
    for row in document["verdict"]:
        print(
            f"{row['method']:8} {row['scale']:6g} {row['hacked']:>4}/{row['seeds']:<3} {row['reward_gain']:+12.4f}"
            f" {-100 * row['all_right_fall']:+9.1f}p {row['high_energy_rise_db']:+9.2f}"
        )
    return any(r["method"] == "rg_lcd" and r["hacked"] == r["seeds"] for r in document["verdict"])
