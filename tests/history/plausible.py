"""Result files in the shape of real ones, for the report's tests; their figures mean nothing."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rgbench.evaluate.results import Generation, Protocol, Result, identify, write_result
from rgbench.metrics.base import Interval, Metric

PROMPT = "a large red circle to the left of a small blue star"
METRICS = {
    "hps_aa1": Metric(name="hps_aa1", label="HPS aa1", direction="higher", unit="", family="reward", decimals=2),
    "hps_aa0": Metric(name="hps_aa0", label="HPS aa0", direction="higher", unit="", family="reward", decimals=2),
    "oracle_all": Metric(
        name="oracle_all", label="Oracle, all right", direction="higher", unit="%", family="oracle", decimals=1
    ),
    "oracle_mean": Metric(
        name="oracle_mean", label="Oracle, mean", direction="higher", unit="%", family="oracle", decimals=1
    ),
    "oracle_shape": Metric(
        name="oracle_shape", label="Oracle, shape", direction="higher", unit="%", family="oracle", decimals=1
    ),
    "fd_efflite0": Metric(
        name="fd_efflite0", label="FD-EffLite0", direction="lower", unit="", family="set distance", decimals=2
    ),
    "hfer_gap_db": Metric(
        name="hfer_gap_db", label="HFER gap", direction="target", unit="dB", family="spectrum", decimals=2
    ),
    "band_gap_db": Metric(
        name="band_gap_db", label="Energy gap above 1/4", direction="target", unit="dB", family="spectrum", decimals=2
    ),
}
# what reward guidance does in this made-up world: name → (reward, oracle, distance, high frequencies)
LEVELS = {
    "teacher": (27.2, 93.0, 18.0, -1.1),
    "lcd": (26.8, 90.5, 24.0, -1.9),
    "rg_lcd": (29.4, 84.0, 41.0, 4.2),
    "lrm": (28.6, 90.1, 26.5, -0.6),
    "external": (26.0, 80.0, 60.0, -4.0),
}


def write_model(
    root: Path,
    method: str,
    seed: int | None = 0,
    *,
    model: str | None = None,
    world: str = "benchtop",
    steps: int = 4,
    metrics: tuple[str, ...] = tuple(METRICS),
    num: int = 64,
    protocol_num: int = 2048,
    rows: bool = True,
    images: int = 0,
    prompts: list[str] | None = None,
    size: int = 64,
    training: tuple[int, int] | None = None,
) -> None:
    """Writes one model's results, and its images where asked; everything is a function of the arguments.

    `training` (step, steps) makes it a checkpoint: the reward rises all along, the oracle falls after the middle.
    """
    name = model or (method if seed is None else f"{method}-s{seed}")
    weights = name if training is None or training[0] == training[1] else f"{name} at step {training[0]}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(weights.encode()).digest()[:4], "big"))
    generation = _generation(weights, method, steps, size)
    jitter = 0.0 if seed is None else 0.05 * rng.standard_normal()
    for metric in metrics:
        result, table = _result(world, name, method, seed, generation, metric, num, protocol_num, rng, jitter, training)
        write_result(root, result, table if rows else None)
    if images:
        folder = root / world / name / generation.id / "images"
        _images(folder, images, prompts or [f"{PROMPT}, number {i}" for i in range(images)], rng, size)


def write_fragility(root: Path, method: str, seed: int = 0, world: str = "benchtop", model: str | None = None) -> None:
    """Writes the fragility of a model whose other results :func:`write_model` wrote."""
    name = model or f"{method}-s{seed}"
    level = LEVELS[method][3] / 4
    metric = Metric(
        name="fragility_gap", label="Fragility gap", direction="lower", unit="", family="fragility", decimals=2
    )
    fields = {"prompts": {"name": "benchtop", "sha256": "ab" * 32, "num": 512}}
    result = Result(
        world=world, model=name, method=method, training_seed=seed, generation=_generation(name, method, 4, 64),
        metric=metric, protocol=Protocol(id=identify("fragility_gap-512", fields), fields=fields), value=level,
        interval=Interval(low=level - 0.1, high=level + 0.1, level=0.95, method="jackknife, 20 groups"),
        num_samples=512, extra={"drops": {"jpeg75": 1.0, "blur1": level}},
    )  # fmt: skip
    write_result(root, result)


def _generation(name: str, method: str, steps: int, size: int) -> Generation:
    teacher = method == "teacher"
    fields: dict[str, Any] = {
        "sampler": "ddim" if teacher else "lcm",
        "steps": 50 if teacher else steps,
        "guidance_scale": 3.0 if teacher else 5.0,
        "resolution": size,
        "dtype": "float32",
        "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
    }
    return Generation(id=identify(f"{fields['sampler']}{fields['steps']}", fields), fields=fields)


def _result(
    world: str, name: str, method: str, seed: int | None, generation: Generation, metric: str, num: int,
    protocol_num: int, rng: np.random.Generator, jitter: float, training: tuple[int, int] | None,
) -> tuple[Result, dict[str, list[Any]] | None]:  # fmt: skip
    reward, oracle, distance, high = (level + jitter for level in LEVELS[method])
    if training is not None:
        done = training[0] / training[1]
        reward, oracle = reward - 3 * (1 - done), oracle + 9 * (min(done, 1 - done) - 0.2)
        distance, high = distance * (2 - done), high * done
    what = METRICS[metric]
    scores = None
    value, half = {
        "reward": (reward - (0.8 if metric == "hps_aa0" else 0), 0.07),
        "oracle": (oracle + {"oracle_all": 0, "oracle_mean": 5}.get(metric, 3), 1.1),
        "set distance": (distance, 1.3),
        "spectrum": (high + (0.4 if metric == "band_gap_db" else 0), 0.12),
    }[what.family]
    if what.family in ("reward", "oracle"):
        scores = value + 0.5 * np.random.default_rng(7).standard_normal(num) + 0.1 * rng.standard_normal(num)
        value = math.fsum(scores) / num
    fields = {
        "prompts": {"name": "benchtop", "sha256": "ab" * 32, "num": protocol_num},
        "antialias": metric != "hps_aa0",
        "jpeg": None,
    }
    trained = method in ("rg_lcd", "lrm") and what.family == "reward"
    result = Result(
        world=world, model=name, method=method, training_seed=seed, generation=generation, metric=what,
        training={} if training is None else {"step": training[0], "steps": training[1]},
        protocol=Protocol(id=identify(f"{metric}-{protocol_num}", fields), fields=fields), value=value,
        interval=Interval(low=value - half, high=value + half, level=0.95, method="jackknife, 20 groups"),
        num_samples=protocol_num, in_sample=trained, trained_rewards=("0a1b2c3d",) if trained else (),
        flags=("n<=d",) if what.family == "set distance" and protocol_num < 1281 else (),
        extra=_extra(metric, value, high), cost=_cost(method),
        provenance={"git": None, "packages": {"torch": "2.15.0"}, "python": "3.11.7", "time": "2026-01-01T00:00:00"},
        command=f"rgbench eval runs/{name} --metric fid,hps,oracle,spectrum",
    )  # fmt: skip
    if scores is None:
        return result, None
    keys = {"prompt_id": [f"test/{i}" for i in range(num)], "seed": [0] * num, "group": ["test"] * num}
    return result, {**keys, "value": scores.tolist()}


def _extra(metric: str, value: float, high: float) -> dict[str, Any]:
    if metric == "hfer_gap_db":
        return {**_spectrum(high), "octave_gaps_db": {"0.125-0.25": -0.5, "0.25-0.5": 1.25}}
    if metric == "oracle_all":
        return {"groups": {"test": value + 1, "heldout": value - 3}, "judges_agree": {"mean": 98.2}}
    return {"split_half_null": 3.1} if metric == "fd_efflite0" else {}


def _spectrum(high: float) -> dict[str, Any]:
    radius = np.arange(1, 33) / 64
    real = 1e-3 * radius**-2.2
    tail = 1 / (1 + np.exp(-(np.log2(radius) + 2) * 3))
    return {
        "radius": radius.tolist(),
        "reference_power": real.tolist(),
        "power": (real * 10 ** (high * tail / 10)).tolist(),
    }


def _cost(method: str) -> dict[str, float | None]:
    if method in ("teacher", "external"):
        return {"generate_images_per_sec": 3.5, "nfe": 100.0}
    wall = {"lcd": 210.0, "rg_lcd": 290.0, "lrm": 255.0}[method]
    calls = {"lcd": 0.0, "rg_lcd": 8000.0, "lrm": 2000.0}[method]
    return {
        "train_wall_sec": wall, "train_cpu_sec": 1.9 * wall, "reward_calls": calls, "nfe": 4.0,
        "generate_images_per_sec": 41.7,
    }  # fmt: skip


def _images(folder: Path, num: int, prompts: list[str], rng: np.random.Generator, size: int) -> None:
    folder.mkdir(parents=True)
    y, x = np.mgrid[0:size, 0:size] / size
    index = []
    for i in range(num):
        scene = np.random.default_rng(100 + i)
        colour, (cx, cy) = scene.integers(60, 255, 3), scene.uniform(0.3, 0.7, 2)
        disc = ((x - cx) ** 2 + (y - cy) ** 2 < 0.05)[..., None]
        pixels = np.where(disc, colour, scene.integers(90, 160, 3)) + rng.normal(0, 14, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"test_{i}-0.png")
        index.append({"file": f"test_{i}-0.png", "prompt_id": f"test/{i}", "prompt": prompts[i], "seed": 0})
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
