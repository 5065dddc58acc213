"""Comparison of two models in one column: the one :class:`Delta` that compare, verdict, check and report show.

    value    model − base, in the metric's unit
    better   oriented(model) − oriented(base); above 0 the model is better
             oriented: v (higher is better), −v (lower), −|v| (difference to real images)

    basis        compared are                                  interval
    seeds        common training seeds, two or more            paired t over seeds
    spread       one run with n ≥ 3 seeds of the other side    (x − mean) ± t(n − 1) · s · √(1 + 1/n)
    images       two runs with per-image values                prompts resampled, each group by itself
    jackknife    two runs with jackknife replicates            replicates subtracted
    quadrature   two runs or means with intervals              half widths added in quadrature, usually too wide

Real images of no prompt are a third sample, which both models share: it is drawn, or left out, once for both.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from rgbench.evaluate.results import ModelResult
from rgbench.judge.models import TEACHER, Column, Model
from rgbench.metrics.statistics import (
    LEVEL,
    POWER,
    jackknife_interval_of_sides,
    paired_t,
    resampled_means,
    student_t_p,
    student_t_quantile,
    t_interval,
)
from rgbench.metrics.values import MetricValue

CACHED = 4096  # comparisons and replicates: tables, words and files ask for the same ones
REAL_SEED = 1  # of the draws of a real mean: the same for both models of a comparison
CLOSE = 1e-4  # per-image values whose mean is further from the value belong to another number

MIN_SPREAD = 3  # seeds whose spread one run is compared with

Pair = tuple[int | None, int | None]  # training seed of the model, of the base
Read = Callable[[np.ndarray], np.ndarray]  # values as they are, or oriented
Estimate = tuple[float, float | None, float | None, float | None]  # difference, low, high, p


@dataclass(frozen=True)
class Delta:
    """Model − base in one column.

    Attributes:
        column: what is compared.
        value: signed as it changed, in the metric's unit.
        low: of the 95 % interval; None where there is none.
        high: likewise.
        better: the oriented difference, above 0 where the model is better; None where no good end is known.
        better_low: of its 95 % interval.
        better_high: likewise.
        basis: what the interval rests on: "seeds", "spread", "images", "jackknife", "quadrature" or "none".
        num_pairs: training seeds, prompts or groups of prompts that were compared; 0 where none were.
        model: what the base's side was subtracted from: a value, or the mean over what was paired.
        base: likewise of the base.
        p: two-sided, over seeds, of ``better``, or of ``value`` where no good end is known.
    """

    column: Column
    value: float
    low: float | None
    high: float | None
    better: float | None
    better_low: float | None
    better_high: float | None
    basis: str
    num_pairs: int
    model: float
    base: float
    p: float | None = None

    @property
    def detectable(self) -> float | None:
        """The smallest true difference found with probability .8 (Bloom, 1995); None without a spread."""
        if self.low is None or self.high is None or self.high <= self.low:
            return None
        found, half = 0.5 + LEVEL / 2, (self.high - self.low) / 2
        if self.basis in ("seeds", "spread"):
            degrees = self.num_pairs - 1
            return half * (1 + student_t_quantile(POWER, degrees) / student_t_quantile(found, degrees))
        return half * (1 + NormalDist().inv_cdf(POWER) / NormalDist().inv_cdf(found))

    @property
    def is_better(self) -> bool:
        """Whether the whole interval says better."""
        return self.better_low is not None and self.better_low > 0

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval says worse."""
        return self.better_high is not None and self.better_high < 0

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the value excludes no change."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def arrow(self) -> str:
        """▲ better, ▼ worse, beyond the interval; else ""."""
        return "▲" if self.is_better else "▼" if self.is_worse else ""


@lru_cache(maxsize=CACHED)
def delta(model: Model, base: Model, column: Column) -> Delta | None:
    """Compare two models over their common training seeds; one run with all seeds of the other side.

    A teacher, which has no luck of training here, is paired with each seed of the other side. Two sides of several
    seeds that share none are compared by their means, unpaired.

    Args:
        model: of one world.
        base: of the same world.
        column: of that world.

    Returns:
        None where either side has no value.

    Raises:
        DamagedResult: per-image values are not what was written.
    """
    pairs = common_seeds(model, base, column)
    ours, theirs = _values(model, column), _values(base, column)
    if not ours or not theirs:
        return None
    if len(pairs) > 1:
        return seeds_delta(column, [ours[a] for a, _ in pairs], [theirs[b] for _, b in pairs])
    if len(ours) == 1 and len(theirs) >= MIN_SPREAD:
        return spread_delta(column, next(iter(ours.values())), list(theirs.values()))
    if len(theirs) == 1 and len(ours) >= MIN_SPREAD:
        return spread_delta(column, next(iter(theirs.values())), list(ours.values()), swapped=True)
    if pairs or len(ours) == len(theirs) == 1:
        a, b = pairs[0] if pairs else (next(iter(ours)), next(iter(theirs)))
        return run_delta(model.results[a], base.results[b], column)
    mine, other = model.value(column), base.value(column)
    assert mine is not None and other is not None, "both sides have a value"
    return _quadrature(column, mine, other, LEVEL)


def common_seeds(model: Model, base: Model, column: Column) -> list[Pair]:
    """Pairs of training seeds that both sides have a value of; a teacher is paired with each seed of the other."""
    ours, theirs = model.seeds(column), base.seeds(column)
    if base.method == TEACHER and theirs:
        return [(seed, theirs[0]) for seed in ours]
    if model.method == TEACHER and ours:
        return [(ours[0], seed) for seed in theirs]
    return [(seed, seed) for seed in ours if seed in theirs]


def seeds_delta(column: Column, ours: Sequence[float], theirs: Sequence[float]) -> Delta:
    """Paired t over seeds.

    Args:
        column: of the values.
        ours: value of the model for each seed, two or more.
        theirs: of the base, for the same seeds.
    """

    def estimate(read: Read) -> Estimate:
        good, base = read(np.array(ours)), read(np.array(theirs))
        return *t_interval((good - base).tolist()), paired_t(good.tolist(), base.tolist())

    return _delta(column, "seeds", len(ours), ours, theirs, estimate)


def spread_delta(column: Column, one: float, seeds: Sequence[float], swapped: bool = False) -> Delta:
    """One run against the seeds of another method: z = (x − mean)/(s · √(1 + 1/n)) against t(n − 1).

    Args:
        column: of the values.
        one: value of the run, whose own luck is not in the interval.
        seeds: values of the n seeds, two or more.
        swapped: whether the difference is seeds − run.
    """
    num = len(seeds)

    def estimate(read: Read) -> Estimate:
        (good,), base = read(np.array([one])).tolist(), read(np.array(seeds))
        error = float(base.std(ddof=1)) * math.sqrt(1 + 1 / num)
        change = (good - float(base.mean())) * (-1 if swapped else 1)
        half = student_t_quantile(0.5 + LEVEL / 2, num - 1) * error
        p = student_t_p(change / error, num - 1) if error else float(change == 0)
        return change, change - half, change + half, p

    ours, theirs = (seeds, [one]) if swapped else ([one], seeds)
    return _delta(column, "spread", num, ours, theirs, estimate)


def run_delta(model: ModelResult, base: ModelResult, column: Column, level: float = LEVEL) -> Delta | None:
    """Compare two runs, or two checkpoints, by the images that they share.

    Args:
        model: a result.
        base: of the same world.
        column: of both.
        level: coverage of the intervals.

    Returns:
        None where either has no value.

    Raises:
        DamagedResult: per-image values are not what was written.
    """
    ours, theirs = model.by_key.get(column.key), base.by_key.get(column.key)
    if ours is None or theirs is None or ours.value is None or theirs.value is None:
        return None
    left, right = replicates(model, column), replicates(base, column)
    if left is None or right is None or (left.kind, left.digest) != (right.kind, right.digest):
        return _quadrature(column, ours, theirs, level)

    def estimate(read: Read) -> Estimate:
        a, b = read(np.array([ours.value, theirs.value])).tolist()
        drawn = read(left.values) - read(right.values)
        return a - b, *_ends(a - b, drawn, left, level), None

    return _delta(column, left.kind, left.num_pairs, [ours.value], [theirs.value], estimate)


@dataclass(frozen=True)
class PromptMeans:
    """A value for each prompt, the mean over its noise seeds: images of one prompt are no independent draws.

    Attributes:
        images: digest of the images; two models pair only where it is the same.
        groups: (P,) group of each prompt, "" where there is none.
        means: (P,) in the order of prompt ids.
    """

    images: str
    groups: tuple[str, ...]
    means: np.ndarray


@lru_cache(maxsize=CACHED)
def prompt_means(result: ModelResult, column: Column) -> PromptMeans | None:
    """Values of each prompt; None where none were stored, or their mean is not the value.

    Raises:
        DamagedResult: they are not what was written.
    """
    value = result.by_key[column.key]
    rows = result.rows(*column.key) if value.value is not None else None
    if rows is None or len(rows.values) < 2:
        return None
    if not math.isclose(rows.values.mean(), value.value or 0, rel_tol=CLOSE, abs_tol=1e-6):
        return None
    digest, groups, prompt = _layout(rows.keys)
    return PromptMeans(digest, groups, np.bincount(prompt, rows.values) / np.bincount(prompt))


@dataclass(frozen=True)
class Replicates:
    """A value as it might have come out: prompts resampled, or groups of prompts left out.

    Attributes:
        kind: "images" or "jackknife".
        digest: of the images or groups; values pair only where it is the same.
        values: (R,) replicates.
        num_pairs: prompts, or groups of them.
        num_real: the last ones left out groups of real images, by themselves; 0 for none.
    """

    kind: str
    digest: str
    values: np.ndarray
    num_pairs: int
    num_real: int = 0


@lru_cache(maxsize=CACHED)
def replicates(result: ModelResult, column: Column) -> Replicates | None:
    """Replicates of a value from its per-image values, else from its jackknife; None where it has neither.

    Raises:
        DamagedResult: per-image values are not what was written.
    """
    value = result.by_key[column.key]
    found = prompt_means(result, column)
    if found is not None:
        drawn = resampled_means(found.means, found.groups)
        error = value.extra.get("real_error")
        if isinstance(error, float):  # add the reference set's sampling error; one shared draw per protocol
            drawn = drawn - error * np.random.default_rng(REAL_SEED).standard_normal(len(drawn))
        return Replicates("images", found.images, drawn, len(found.means))
    left, real = (value.extra.get(name) for name in ("jackknife", "jackknife_real"))
    if not isinstance(left, list) or len(left) < 2:
        return None
    real = real if isinstance(real, list) else []
    digest = f"{column.protocol.id} {len(left)} {len(real)}"
    return Replicates("jackknife", digest, np.asarray([*left, *real], dtype=np.float64), len(left), len(real))


def _values(model: Model, column: Column) -> dict[int | None, float]:
    found = {seed: model.result(column, seed) for seed in model.results}
    return {seed: value.value for seed, value in found.items() if value is not None and value.value is not None}


def _delta(
    column: Column,
    basis: str,
    num_pairs: int,
    ours: Sequence[float],
    theirs: Sequence[float],
    estimate: Callable[[Read], Estimate],
) -> Delta:
    """A delta, estimated from the values as they are and as oriented ones."""
    model, base = (math.fsum(side) / len(side) for side in (ours, theirs))
    change, low, high, p = estimate(lambda values: values)
    if not column.has_good_end:
        return Delta(column, change, low, high, None, None, None, basis, num_pairs, model, base, p)
    oriented = estimate(lambda values: np.array([column.oriented(x) for x in values.tolist()], dtype=np.float64))
    return Delta(column, change, low, high, *oriented[:3], basis, num_pairs, model, base, oriented[3])


def _quadrature(column: Column, ours: MetricValue, theirs: MetricValue, level: float) -> Delta:
    ends = (ours.interval, theirs.interval)
    half = None
    if ends[0] is not None and ends[1] is not None:
        half = _normal(level) * math.hypot(*((each.high - each.low) / 2 / _normal(each.level) for each in ends if each))

    def estimate(read: Read) -> Estimate:
        a, b = read(np.array([ours.value, theirs.value], dtype=np.float64)).tolist()
        return (a - b, None, None, None) if half is None else (a - b, a - b - half, a - b + half, None)

    basis = "none" if half is None else "quadrature"
    return _delta(column, basis, 0, [float(ours.value or 0)], [float(theirs.value or 0)], estimate)


def _ends(value: float, drawn: np.ndarray, of: Replicates, level: float) -> tuple[float | None, float | None]:
    if of.kind == "images":
        low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
        return float(low), float(high)
    sides = [side.tolist() for side in (drawn[: of.num_pairs], drawn[of.num_pairs :]) if len(side)]
    interval = jackknife_interval_of_sides(value, sides, level)
    return (interval.low, interval.high) if interval else (None, None)


def _normal(level: float) -> float:
    """Half width of a normal interval, in standard errors."""
    return NormalDist().inv_cdf(0.5 + level / 2)


@lru_cache(maxsize=16)
def _layout(keys: tuple[tuple[str, int, str], ...]) -> tuple[str, tuple[str, ...], np.ndarray]:
    """Of images as they are stored: digest, group of each prompt, and the prompt's number of each image."""
    prompts = sorted({(prompt, group) for prompt, _, group in keys})
    number = {key: i for i, key in enumerate(prompts)}
    digest = hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()
    return digest, tuple(group for _, group in prompts), np.array([number[p, group] for p, _, group in keys])
