"""Results in the shape of real ones, for the report's tests; their values mean nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from rgbench.evaluate.results import Generation, Head, Run, SheetImage, write_sheet, write_training_log, write_values
from rgbench.metrics.values import Family, Interval, MetricValue, Protocol, identify, metric_info

PROMPT = "a large red circle to the left of a small blue star"
METRICS = (
    *("hps", "hps_no_antialias", "oracle_all", "oracle_mean", "oracle_shape", "fd_efflite0", "hfer_db", "band_db"),
)
# what reward guidance does in this made-up world: name → (reward, oracle, distance, high frequencies)
LEVELS = {
    "teacher": (27.2, 93.0, 18.0, -1.1),
    "lcd": (26.8, 90.5, 24.0, -1.9),
    "rg_lcd": (29.4, 84.0, 41.0, 4.2),
    "lrm": (28.6, 90.1, 26.5, -0.6),
    "external": (26.0, 80.0, 60.0, -4.0),
}
REWARD = {"name": "hps", "weights_sha256": "ab" * 32}


def write_model(
    root: Path,
    method: str,
    seed: int | None = 0,
    *,
    model: str | None = None,
    world: str = "benchtop",
    steps: int = 4,
    metrics: tuple[str, ...] = METRICS,
    num: int = 64,
    protocol_num: int = 2048,
    rows: bool = True,
    images: int = 0,
    prompts: list[str] | None = None,
    size: int = 64,
    training: tuple[int, int] | None = None,
    shifts: dict[str, float] | None = None,
    cost: dict[str, float] | None = None,
    drops: bool = False,
    log: list[dict[str, float]] | None = None,
) -> Path:
    """Writes one model's result, and its images where asked; everything is a function of the arguments.

    Args:
        root: the results folder.
        method: sets the level of every metric.
        seed: of training.
        model: name; ``{method}-s{seed}`` by default.
        world: name.
        steps: of the sampler.
        metrics: names of values.
        num: prompts with per-image values.
        protocol_num: prompts by the protocol.
        rows: whether per-image values are kept.
        images: number of stored images.
        prompts: of those.
        size: of images in pixels.
        training: (step, steps) makes it a checkpoint: the reward rises all along, the oracle falls after the middle.
        shifts: added to the values of metrics; their intervals are then 2 wide.
        cost: over the usual one.
        drops: with the fragility of the reward.
        log: of the training.

    Returns:
        The result's folder.
    """
    name = model or (method if seed is None else f"{method}-s{seed}")
    weights = name if training is None or training[0] == training[1] else f"{name} at step {training[0]}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(weights.encode()).digest()[:4], "big"))
    trained = ("0a1b2c3d",) if method in ("rg_lcd", "lrm") else ()
    head = Head(
        world=world,
        model=name,
        method=method,
        generation=_generation(weights, method, steps, size),
        training_seed=seed,
        training={} if training is None else {"step": training[0], "steps": training[1]},
        trained_rewards=trained,
        cost=_cost(method) | (cost or {}),
    )
    provenance = {"git": None, "packages": {"torch": "2.15.0"}, "python": "3.11.7", "time": "2026-01-01T00:00:00"}
    run = Run(command=f"rgbench eval runs/{name} --metric fid,hps,oracle,spectrum", provenance=provenance)
    jitter = 0.0 if seed is None else 0.05 * rng.standard_normal()
    values = [
        _value(metric, method, num if rows else 0, protocol_num, rng, jitter, training, (shifts or {}).get(metric))
        for metric in metrics
    ]
    values += [_fragility(method)] * drops
    keys = [(f"test/{i}", 0, "test") for i in range(num)]
    for some in ([v for v in values if v.rows is None], [v for v in values if v.rows is not None]):
        folder = write_values(root, head, run, some, keys if some and some[0].rows is not None else [])
    if images:
        texts = prompts or [f"{PROMPT}, number {i}" for i in range(images)]
        sheet = [
            (SheetImage(prompt_id=f"test/{i}", prompt=texts[i], seed=0), _image(i, rng, size)) for i in range(images)
        ]
        write_sheet(folder, head, run, sheet)
    if log:
        write_training_log(folder, head, run, log)
    return folder


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


def _value(
    metric: str, method: str, num: int, protocol_num: int, rng: np.random.Generator, jitter: float,
    training: tuple[int, int] | None, shift: float | None,
) -> MetricValue:  # fmt: skip
    reward, oracle, distance, high = (level + jitter for level in LEVELS[method])
    if training is not None:
        done = training[0] / training[1]
        reward, oracle = reward - 3 * (1 - done), oracle + 9 * (min(done, 1 - done) - 0.2)
        distance, high = distance * (2 - done), high * done
    family = metric_info(metric).family
    value, half = {
        Family.REWARD: (reward - (0.8 if metric == "hps_no_antialias" else 0), 0.07),
        Family.ORACLE: (oracle + {"oracle_all": 0, "oracle_mean": 5}.get(metric, 3), 1.1),
        Family.SET_DISTANCE: (distance, 1.3),
        Family.SPECTRUM: (high + (0.4 if metric == "band_db" else 0), 0.12),
    }[family]
    value, half = (value, half) if shift is None else (value + shift, 1.0)
    scores = None
    if family in (Family.REWARD, Family.ORACLE) and num:
        scores = value + 0.5 * np.random.default_rng(7).standard_normal(num) + 0.1 * rng.standard_normal(num)
        value = float(scores.mean())
    fields: dict[str, Any] = {"prompts": {"name": "benchtop", "sha256": "ab" * 32, "num": protocol_num}, "jpeg": None}
    if family is Family.REWARD:
        fields["reward"] = REWARD | {"antialias": metric == "hps"}
    if family is Family.SPECTRUM:
        fields["reference"] = {"scenes": "test"}
    return MetricValue(
        metric=metric,
        protocol=Protocol.of(metric if family is not Family.SPECTRUM else "spectrum", fields),
        value=value,
        interval=Interval(low=value - half, high=value + half, level=0.95, method="jackknife, 20 groups"),
        num_images=protocol_num,
        reference="real" if family is Family.SPECTRUM else None,
        flags=("n<=d",) if family is Family.SET_DISTANCE and protocol_num < 1281 else (),
        in_sample=method in ("rg_lcd", "lrm") and family is Family.REWARD,
        extra=_extra(metric, value, high),
        rows=scores,
    )


def _fragility(method: str) -> MetricValue:
    level = LEVELS[method][3] / 4
    fields = {"prompts": {"name": "benchtop", "sha256": "ab" * 32, "num": 512}}
    return MetricValue(
        metric="fragility",
        protocol=Protocol.of("fragility", fields),
        value=level,
        interval=Interval(low=level - 0.1, high=level + 0.1, level=0.95, method="jackknife, 20 groups"),
        num_images=512,
        reference="real",
        extra={"drops": {"jpeg75": 1.0, "blur1": level}},
    )


def _extra(metric: str, value: float, high: float) -> dict[str, Any]:
    if metric in ("hfer_db", "band_db"):
        return {**_spectrum(high), "octave_gaps_db": {"0.125-0.25": -0.5, "0.25-0.5": 1.25}}
    if metric == "oracle_all":
        return {"groups": {"test": value + 1, "heldout": value - 3}, "classifiers_agree": {"mean": 98.2}}
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


def _cost(method: str) -> dict[str, int | float | None]:
    if method in ("teacher", "external"):
        return {"generate_images_per_sec": 3.5, "nfe": 100.0}
    wall = {"lcd": 210.0, "rg_lcd": 290.0, "lrm": 255.0}[method]
    calls = {"lcd": 0.0, "rg_lcd": 8000.0, "lrm": 2000.0}[method]
    return {
        "train_wall_sec": wall, "train_cpu_sec": 1.9 * wall, "reward_calls": calls, "nfe": 4.0,
        "generate_images_per_sec": 41.7,
    }  # fmt: skip


def _image(i: int, rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    scene = np.random.default_rng(100 + i)
    colour, (cx, cy) = scene.integers(60, 255, 3), scene.uniform(0.3, 0.7, 2)
    disc = ((x - cx) ** 2 + (y - cy) ** 2 < 0.05)[..., None]
    pixels = np.where(disc, colour, scene.integers(90, 160, 3)) + rng.normal(0, 14, (size, size, 3))
    return pixels.clip(0, 255).astype(np.uint8)
