"""Result files of made-up models, for what reads results and makes none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rgbench.evaluate.results import Generation, Protocol, Result, identify, write_result
from rgbench.metrics.base import Direction, Interval, Metric
from rgbench.rewards.base import fingerprint_id

REWARD = {"name": "hps", "antialias": False}
FAMILIES: dict[str, tuple[str, Direction]] = {
    "hps_aa0": ("reward", "higher"),
    "hps_aa1": ("reward", "higher"),
    "oracle_mean": ("oracle", "higher"),
    "hfer_gap_db": ("spectrum", "target"),
    "hfer_db": ("spectrum", "target"),
    "grid_vae_gap_db": ("spectrum", "target"),
    "wavelet_noise_gap": ("pixel and colour", "target"),
    "fd_efflite0": ("set distance", "lower"),
}


def make(model: str, metric: str, value: float | None = None, **given: Any) -> Result:
    """One result, in memory, of a model such as "lcd-s3"; ``rows`` (``per_prompt`` images of each, as seeds or
    ``copies``), ``jackknife``, ``half`` (of the interval), ``step`` as given.

    Models other than LCD students and the teacher were trained on ``REWARD``; ``elsewhere`` ones say nothing of it.
    """
    elsewhere = given.get("elsewhere", False)
    stem, _, seed = model.partition("-s")
    stem, seed = ("external", "") if elsewhere else (stem, seed)
    method = given.get("method", stem)
    guided = method not in ("lcd", "teacher", "external")
    family, direction = FAMILIES[metric]
    rows = given.get("rows")
    value = float(np.mean(rows)) if value is None and rows is not None else value
    step, steps = given.get("step", 100), given.get("steps", 100)
    sampling = {"sampler": "lcm", "steps": given.get("sampler_steps", 4), "guidance_scale": 5.0}
    fields = {**sampling, "weights_sha256": f"{model} {step}"}
    protocol: dict[str, Any] = {"metric": metric, "num": 8, "version": given.get("version", 1)}
    if given.get("level"):  # no real images of that size
        protocol["reference"] = None
    if family == "reward":
        protocol["reward"] = REWARD | {"antialias": metric == "hps_aa1"}
    half = given.get("half")
    return Result(
        world=given.get("world", "benchtop"),
        model=model,
        method=method,
        training_seed=int(seed) if seed else None,
        training={"step": step, "steps": steps} if seed else {},
        generation=Generation(id=identify("lcm4", fields), fields=fields),
        metric=Metric(name=metric, label=metric.upper(), direction=direction, unit="dB", family=family, decimals=2),
        protocol=Protocol(id=identify(metric, protocol), fields=protocol),
        value=value,
        interval=Interval(low=value - half, high=value + half, level=0.95, method="made up") if half else None,
        num_samples=8,
        flags=() if value is not None else ("made up",),
        in_sample=guided and family == "reward",
        trained_rewards=(fingerprint_id(REWARD),) if guided else (),
        extra={"jackknife": list(given["jackknife"])} if "jackknife" in given else {},
    )


NUM = 64
BASE = np.random.default_rng(0).normal(size=NUM)
ROWS = ("hps_aa0", "hps_aa1", "oracle_mean", "wavelet_noise_gap")
LEFT = ("hfer_gap_db", "grid_vae_gap_db")
HACKED = {"hps_aa0": 2, "hfer_gap_db": 3, "wavelet_noise_gap": 1, "oracle_mean": -1}


def measured(root: Path, model: str, shifts: dict[str, float], **given: Any) -> None:
    """All metrics of a model; each shifted from what all models share, with a little noise of its own."""
    own = np.random.default_rng(sum(map(ord, model)))
    for name in ROWS:
        put(root, model, name, rows=1 + BASE + 0.05 * own.normal(size=NUM) + shifts.get(name, 0), **given)
    for name in LEFT:
        value = 1 + 0.02 * own.normal() + shifts.get(name, 0)
        put(root, model, name, value, jackknife=value + 0.01 * BASE[:20], half=0.5, **given)
    put(root, model, "fd_efflite0", 10 + 0.1 * own.normal() + shifts.get("fd_efflite0", 0), half=0.2, **given)


def put(root: Path, model: str, metric: str, value: float | None = None, **given: Any) -> Path:
    """The same, written with its rows under a results folder."""
    result, rows = make(model, metric, value, **given), given.get("rows")
    table = None
    if rows is not None:
        images, each = range(len(rows)), given.get("per_prompt", 1)
        table = {
            "prompt_id": [f"p/{i // each}{f'#{i % each}' if given.get('copies') else ''}" for i in images],
            "seed": [0 if given.get("copies") else i % each for i in images],
            "group": ["test" if i // each % 2 else "heldout" for i in images],
            "value": [float(x) for x in rows],
        }
    return write_result(root, result, table)


def seeds_and_students(root: Path) -> Path:
    """Seven LCD students, a hacked student, an honest one, the teacher; the folder again."""
    for seed in range(7):
        measured(root, f"lcd-s{seed}", {})
    measured(root, "rg_lcd-s1", HACKED)
    measured(root, "lrm-s1", {"hps_aa0": 2, "oracle_mean": 1})
    measured(root, "teacher", {"hfer_gap_db": -1})
    return root
