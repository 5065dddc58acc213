"""Results of made-up models, for what reads results and makes none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rgbench.evaluate.results import Generation, Head, ModelResult, Run, load_result, write_training_log, write_values
from rgbench.metrics.values import Direction, Family, Interval, MetricValue, Protocol, identify, metric_info
from rgbench.rewards.base import fingerprint_id

REWARD = {"name": "hps", "antialias": False, "weights_sha256": "made up"}
TRAINED = fingerprint_id(REWARD)
RUN = Run(command="made up", provenance={"time": "2026-01-01T00:00:00"})
UNGUIDED = ("lcd", "teacher", "external")
NUM = 64


def make_result(
    root: Path | None,
    model: str,
    method: str | None = None,
    seed: int | None = None,
    *,
    values: Mapping[str, float | None] | None = None,
    rows: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    half: float | Mapping[str, float] = {},
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    flags: Mapping[str, Sequence[str]] | None = None,
    world: str = "benchtop",
    recipe_sha256: str | None = None,
    training: Mapping[str, int] | None = None,
    step: int = 100,
    steps: int = 100,
    sampling: Mapping[str, Any] | None = None,
    trained_rewards: Sequence[str] | None = None,
    reference: Mapping[str, Any] | None = {"kind": "made up"},
    protocol: Mapping[str, Any] | None = None,
    per_prompt: int = 1,
    copies: bool = False,
    log: Sequence[Mapping[str, Any]] = (),
    weights: str | None = None,
    head: Mapping[str, Any] | None = None,
) -> ModelResult:
    """One model's result, stored and read again; only in memory, and without rows, where there is no root.

    Args:
        root: the results folder.
        model: name; ``lcd-s3`` is method lcd, seed 3.
        method: of the name by default; other than LCD, teacher and external it was trained on ``REWARD``.
        seed: of the name by default.
        values: by metric.
        rows: per-image values by metric; the value is their mean.
        half: half width of the interval, of all or by metric.
        extra: by metric.
        flags: by metric; a value of None is flagged anyway.
        world: name.
        recipe_sha256: of the recipe.
        training: instead of step and steps.
        step: of the weights.
        steps: of the run.
        sampling: fields of the generation that differ from the usual ones.
        trained_rewards: fingerprint ids.
        reference: of metrics with direction "reference"; None for values without a good end.
        protocol: fields that differ from the usual ones, of all metrics.
        per_prompt: images of each prompt.
        copies: whether those are copies of the prompt instead of noise seeds.
        log: training log.
        weights: what the weights' digest is made of.
        head: further fields of the head.
    """
    stem, _, named = model.partition("-s")
    method = stem if method is None else method
    seed = int(named) if seed is None and named and method != "external" else seed
    guided = method not in UNGUIDED
    fields = {"sampler": "lcm", "steps": 4, "guidance_scale": 5.0, "resolution": 64, **(sampling or {})}
    fields["weights_sha256"] = weights or f"{model} {step}"
    about = Head(
        world=world,
        model=model,
        method=method,
        generation=Generation(id=identify("lcm4", fields), fields=fields),
        training_seed=seed,
        recipe_sha256=recipe_sha256,
        training=dict(training) if training is not None else {} if seed is None else {"step": step, "steps": steps},
        trained_rewards=tuple(trained_rewards if trained_rewards is not None else [TRAINED] * guided),
        **(head or {}),
    )
    given: dict[str, float | None] = {name: float(np.mean(x)) for name, x in (rows or {}).items()}
    found = []
    for name, value in {**given, **(values or {})}.items():
        width = half if isinstance(half, int | float) else half.get(name)
        found.append(
            MetricValue(
                metric=name,
                protocol=_protocol(name, reference, protocol or {}),
                value=value,
                interval=_interval(value, width),
                num_images=len((rows or {}).get(name, range(8))),
                reference=_reference(name, reference),
                flags=tuple((flags or {}).get(name, ())) or (("made up",) if value is None else ()),
                in_sample=guided and metric_info(name).family is Family.REWARD,
                extra=dict((extra or {}).get(name, {})),
                rows=np.asarray(rows[name], dtype=np.float64) if rows and name in rows else None,
            )
        )
    if root is None:
        return ModelResult(about, tuple(found), (RUN,))
    folder = root / world / model / about.generation.id
    for same in _by_length(found):
        num = 0 if same[0].rows is None else len(same[0].rows)
        folder = write_values(root, about, RUN, same, image_keys(num, per_prompt, copies))
    if log:
        write_training_log(folder, about, RUN, log)
    return load_result(folder)


def image_keys(num: int, per_prompt: int = 1, copies: bool = False) -> list[tuple[str, int, str]]:
    """(prompt id, seed, group) of images; every other prompt is held out."""
    return [
        (
            f"p/{i // per_prompt}{f'#{i % per_prompt}' if copies else ''}",
            0 if copies else i % per_prompt,
            "test" if i // per_prompt % 2 else "heldout",
        )
        for i in range(num)
    ]


def _protocol(name: str, reference: Mapping[str, Any] | None, given: Mapping[str, Any]) -> Protocol:
    info = metric_info(name)
    fields: dict[str, Any] = {"metric": name, "prompts": {"num": 8}}
    if info.direction is Direction.REFERENCE:
        fields["reference"] = None if reference is None else dict(reference)
    if name.startswith("hps") and info.family is Family.REWARD:
        fields["reward"] = REWARD | {"antialias": "no_antialias" not in name}
    elif info.family is Family.HELD_OUT:
        fields["reward"] = {"name": name, "weights_sha256": f"of {name}"}
    return Protocol.of(name, fields | dict(given))


def _reference(name: str, reference: Mapping[str, Any] | None) -> str | None:
    return "real" if metric_info(name).direction is Direction.REFERENCE and reference is not None else None


def _interval(value: float | None, half: float | None) -> Interval | None:
    if value is None or half is None:
        return None
    return Interval(low=value - half, high=value + half, level=0.95, method="made up")


def _by_length(values: Sequence[MetricValue]) -> list[list[MetricValue]]:
    """Values that may be written together: of one number of rows."""
    groups: dict[int, list[MetricValue]] = {}
    for value in values:
        groups.setdefault(0 if value.rows is None else len(value.rows), []).append(value)
    return list(groups.values())


DECLARED = ("hps", "oracle_all", "kd_efflite0", "recall_efflite0", "band_db", "saturation")
CLEAN = {"hps": 70.0, "oracle_all": 80.0, "kd_efflite0": 200.0, "recall_efflite0": 0.4, "band_db": -4, "saturation": -2}
SPREAD = {"hps": 0.6, "oracle_all": 2.0, "kd_efflite0": 8.0, "recall_efflite0": 0.02, "band_db": 0.1, "saturation": 0.2}
HACKED = {"hps": 6.0, "oracle_all": -15.0, "kd_efflite0": 60.0, "band_db": -1.0}
HONEST = {"hps": 6.0, "oracle_all": 15.0}


def make_students(
    root: Path | None, name: str, shifts: Mapping[str, float], seeds: Sequence[int] = range(6), **given: Any
) -> list[ModelResult]:
    """Students of one method, ``name-s0`` …, in the declared metrics, shifted from what LCD has.

    Each seed's luck is shared by all methods; the rest is a tenth of it, up and down by turns.
    """
    made = []
    for seed in seeds:
        luck = np.random.default_rng(seed)
        own = np.random.default_rng([seed, *map(ord, name)])
        prompts = np.random.default_rng(7).normal(size=NUM)
        values, rows = {}, {}
        for metric in DECLARED:
            alone = 0.1 * (-1) ** seed * (1 + 0.2 * own.normal())
            level = CLEAN[metric] + shifts.get(metric, 0.0) + SPREAD[metric] * (luck.normal() + alone)
            if metric == "hps":
                rows[metric] = level + prompts - prompts.mean()
            elif metric == "oracle_all":
                right = round(min(1.0, max(0.0, level / 100)) * NUM)
                rows[metric] = 100.0 * (np.argsort(np.argsort(prompts)) < right)
            else:
                values[metric] = level
        left = {name: {"jackknife": (value + 0.01 * prompts[:20]).tolist()} for name, value in values.items()}
        made.append(make_result(root, f"{name}-s{seed}", values=values, rows=rows, extra=left, half=0.5, **given))
    return made


def seeds_and_students(root: Path) -> Path:
    """Seven LCD students, six hacked ones, six honest ones, the teacher; the folder again."""
    make_students(root, "lcd", {}, range(7))
    make_students(root, "rg_lcd", HACKED)
    make_students(root, "lrm", HONEST)
    values = CLEAN | {"band_db": -1.0}
    make_result(root, "teacher", values=values, half=0.5, sampling={"sampler": "ddim", "steps": 50})
    return root
