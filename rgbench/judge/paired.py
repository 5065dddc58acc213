"""One figure of two models, compared on the prompts and seeds that they share.

    badness        value (lower is better), −value (higher is better), |value − target| (nearest is better)
    deterioration  badness of the model − badness of its base; above 0 the model is worse
    level          a figure whose target is not known, for want of real images of its size, or because lossy
                   compression had changed those: the base is the target, and deterioration is the distance
                   to it in either direction

Where both results kept per-image rows, the prompts are resampled with all their seeds, the same
ones on both sides; where both kept jackknife replicates of the same prompts, those are subtracted;
else the half widths are added in quadrature, which ignores that the sides share prompts
and noise and is usually too wide. Real images of no prompt are a third sample, which both models
share: it is drawn, or left out, once for both, by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import Result, read_columns
from rgbench.metrics.base import Metric
from rgbench.metrics.statistics import LEVEL, jackknife_interval_of_sides, resampled_means

Value = float | np.ndarray
Read = Callable[[Value], Value]

KEPT = 4096  # results whose replicates are remembered: every pair of seeds asks for the same ones
REAL_SEED = 1  # of the draws of a real mean: the same for both models of a comparison
CLOSE = 1e-4  # a mean of rows that is further from the value is another figure


@dataclass(frozen=True)
class Paired:
    """What a model differs by from its base.

    Attributes:
        value: in the metric's unit; of a deterioration, above 0 where the model is worse.
        low: of the interval, at 95 % unless another level was asked for; None where there is none.
        high: likewise.
        basis: "images", "jackknife", "quadrature" or "none": what the interval rests on.
    """

    value: float
    low: float | None
    high: float | None
    basis: str

    def clear_of(self, delta: float) -> bool:
        """Whether the whole interval lies above ``delta``."""
        return self.low is not None and self.low > delta


@dataclass(frozen=True)
class Replicates:
    """A figure as it might have come out: resampled images, or groups of prompts left out.

    Attributes:
        kind: "images" or "jackknife".
        digest: of the images or groups; figures pair only where it is the same.
        values: (R,) replicates.
        num_real: the last ones left out groups of real images, by themselves; 0 for none.
    """

    kind: str
    digest: str
    values: np.ndarray
    num_real: int = 0

    @property
    def num_own(self) -> int:
        """Those that left out groups of prompts."""
        return len(self.values) - self.num_real


def badness(metric: Metric, value: Value, target: float = 0.0) -> Value:
    """The figure as something of which less is better, in the metric's unit."""
    if metric.direction == "target":
        return np.abs(value - target)
    return value if metric.direction == "lower" else -value


def deterioration(model: Result, base: Result, level: float = LEVEL) -> Paired | None:
    """How much worse the model is than its base in one figure; None where either has no value.

    Args:
        model: a figure.
        base: the same figure of the model that it is compared with.
        level: coverage of the interval.

    Raises:
        ValueError: results of two metrics or protocols, which cannot be compared.
        UsageError: per-image rows that cannot be read.
    """
    if not is_level(base):
        target = target_of(base)
        return _paired(model, base, lambda value: badness(model.metric, value, target), level)
    found = difference(model, base, level)
    if found is None or found.low is None or found.high is None:
        return found and Paired(abs(found.value), None, None, found.basis)
    return Paired(abs(found.value), max(0.0, found.low, -found.high), max(-found.low, found.high), found.basis)


def difference(model: Result, base: Result, level: float = LEVEL) -> Paired | None:
    """Model − base in one figure; None where either has no value.

    Args:
        model: a figure.
        base: the same figure of the model that it is compared with.
        level: coverage of the interval.

    Raises:
        ValueError: results of two metrics or protocols, which cannot be compared.
        UsageError: per-image rows that cannot be read.
    """
    return _paired(model, base, lambda value: value, level)


def _paired(model: Result, base: Result, read: Read, level: float) -> Paired | None:
    if (model.metric.name, model.protocol.id) != (base.metric.name, base.protocol.id):
        raise ValueError(f"{model.protocol.id} and {base.protocol.id} are two protocols; nothing to subtract")
    if model.value is None or base.value is None:
        return None
    value = float(read(model.value) - read(base.value))
    ours, theirs = replicates(model), replicates(base)
    if ours is None or theirs is None or (ours.kind, ours.digest) != (theirs.kind, theirs.digest):
        return _quadrature(model, base, value, level)
    drawn = np.asarray(read(ours.values) - read(theirs.values))
    if ours.kind == "jackknife":
        sides = [side.tolist() for side in (drawn[: ours.num_own], drawn[ours.num_own :]) if len(side)]
        interval = jackknife_interval_of_sides(value, sides, level)
        return Paired(value, interval.low, interval.high, "jackknife") if interval else None
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    return Paired(value, float(low), float(high), "images")


def is_level(result: Result) -> bool:
    """Whether a figure should be near a target that nobody knows: no real reference, or one that was lossy."""
    reference = result.protocol.fields.get("reference", "")
    unknown = reference is None or (isinstance(reference, dict) and reference.get("lossy") is True)
    return result.metric.direction == "target" and unknown


def has_prompt_targets(result: Result) -> bool:
    """Whether each prompt's own value should be near the target, and not their mean alone."""
    return not is_level(result) and "real_error" not in result.extra


def target_of(result: Result) -> float:
    """The good end of a figure whose direction is "target"."""
    return float(result.extra.get("target") or 0.0)


def replicates(result: Result) -> Replicates | None:
    """Replicates of a figure from its per-image rows, else from its jackknife; None where it kept neither.

    Raises:
        UsageError: rows that cannot be read.
    """
    if result.path is not None and result.samples is not None and result.value is not None:
        found = _bootstrap(result.path.with_name(Path(result.samples).name), result.value)
        if found is not None:
            return _with_real(found, result.extra.get("real_error"))
    left, real = (result.extra.get(name) for name in ("jackknife", "jackknife_real"))
    if not isinstance(left, list) or len(left) < 2:
        return None
    real = real if isinstance(real, list) else []
    digest = f"{result.protocol.id} {len(left)} {len(real)}"
    return Replicates("jackknife", digest, np.asarray([*left, *real], dtype=np.float64), len(real))


def _with_real(found: Replicates, error: object) -> Replicates:
    """With the luck of which real images there were: one draw for all figures of a protocol."""
    if not isinstance(error, float):
        return found
    drawn = np.random.default_rng(REAL_SEED).standard_normal(len(found.values))
    return replace(found, values=found.values - error * drawn)


Image = tuple[str, int, str]  # prompt id, noise seed, group (a style)


@dataclass(frozen=True)
class ByPrompt:
    """A figure's value for each prompt, the mean over its seeds: images of one prompt are no independent draws.

    Attributes:
        images: digest of the images; two figures pair only where it is the same.
        groups: (P,) group of each prompt, "" where there is none.
        means: (P,) in the order of prompt ids.
    """

    images: str
    groups: tuple[str, ...]
    means: np.ndarray


def by_prompt(result: Result) -> ByPrompt | None:
    """Values of each prompt; None where the result kept none, or their mean is not its value.

    Raises:
        UsageError: rows that cannot be read.
    """
    if result.path is None or result.samples is None or result.value is None:
        return None
    return _read(result.path.with_name(Path(result.samples).name), result.value)


@lru_cache(maxsize=KEPT)
def _read(path: Path, value: float) -> ByPrompt | None:
    try:
        table = read_columns(path)
        keys = tuple(zip(table["prompt_id"], table["seed"], table["group"], strict=True))
        values = np.asarray(table["value"], dtype=np.float64)
        if len(values) != len(keys):
            raise ValueError(f"{len(values)} values of {len(keys)} images")
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UsageError(f"{path}: per-image rows cannot be read ({error}); measure again with --force") from error
    if len(values) < 2 or not math.isclose(values.mean(), value, rel_tol=CLOSE, abs_tol=1e-6):
        return None
    digest, groups, prompt = _layout(keys)
    return ByPrompt(digest, groups, np.bincount(prompt, values) / np.bincount(prompt))


@lru_cache(maxsize=16)
def _layout(keys: tuple[Image, ...]) -> tuple[str, tuple[str, ...], np.ndarray]:
    """Of images as a file lists them: digest, group of each prompt, and the prompt's number of each image."""
    prompts = sorted({(prompt, group) for prompt, _, group in keys})
    number = {key: i for i, key in enumerate(prompts)}
    digest = hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()
    return digest, tuple(group for _, group in prompts), np.array([number[p, group] for p, _, group in keys])


@lru_cache(maxsize=KEPT)
def _bootstrap(path: Path, value: float) -> Replicates | None:
    """Means of resampled prompts, each group (style) resampled by itself; the same prompts for every model."""
    found = _read(path, value)
    if found is None:
        return None
    return Replicates("images", found.images, resampled_means(found.means, found.groups))


def _quadrature(model: Result, base: Result, value: float, level: float) -> Paired:
    if model.interval is None or base.interval is None:
        return Paired(value, None, None, "none")
    halves = [(found.high - found.low) / 2 / _normal(found.level) for found in (model.interval, base.interval)]
    half = math.hypot(*halves) * _normal(level)
    return Paired(value, value - half, value + half, "quadrature")


def _normal(level: float) -> float:
    """Half width of a normal interval, in standard errors."""
    return NormalDist().inv_cdf(0.5 + level / 2)
