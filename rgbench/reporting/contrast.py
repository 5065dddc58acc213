"""Differences between two rows of one column, with an interval, and which rows a column separates.

Over several training seeds the seed is the unit (paired t). Between single runs it is the
prompt with all its images, as in :mod:`rgbench.evaluation.paired`: a paired bootstrap,
stratified by group, where both kept per-image scores; a paired jackknife where both kept
what the figure is without each group of prompts. Else the half widths are added in
quadrature, which ignores that both sides drew the same prompts and noise, and is usually
too wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rgbench.evaluation.paired import ByPrompt, badness, by_prompt, difference
from rgbench.evaluation.statistics import Wins, count_wins, holm, paired_t, t_interval
from rgbench.metrics.contract import Interval
from rgbench.metrics.intervals import LEVEL
from rgbench.reporting.gather import Column, Figure, Row, Scores

MIN_SEEDS = 6  # with fewer, not even all signs agreeing is a two-sided p under 5 %
ALPHA = 0.05
KEPT = 4096  # differences kept: the tables, the words and the CSV ask for the same ones


@dataclass(frozen=True)
class Contrast:
    """`value` = row − base in the metric's unit, with its 95 % interval where there is one.

    `gain` is positive where the row is nearer the metric's good end; of a level the base is that end, so
    that it is never positive. `basis` is the unit of the interval: "seeds", "images", "jackknife", "quadrature"
    or "none".
    """

    row: float
    base: float
    low: float | None
    high: float | None
    gain: float
    basis: str

    @property
    def value(self) -> float:
        return self.row - self.base

    @property
    def clear(self) -> bool:
        """Whether the interval excludes no difference."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@lru_cache(maxsize=KEPT)
def contrast(row: Row, base: Row, column: Column) -> Contrast | None:
    """The difference row − base in `column`; None where either has no value."""
    ours, theirs = row.figure(column), base.figure(column)
    if ours is None or theirs is None:
        return None
    pairs = _pairs(row, base, column)
    if len(pairs) > 1:
        ours_mean, theirs_mean = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
        _, low, high = t_interval([a - b for a, b in pairs])
        return Contrast(ours_mean, theirs_mean, low, high, _gain(column, ours_mean, theirs_mean), "seeds")
    gain = _gain(column, ours.value, theirs.value)
    if len(ours.results) == len(theirs.results) == 1:
        paired = difference(ours.results[0], theirs.results[0])
        if paired is not None and paired.basis in ("images", "jackknife"):
            return Contrast(ours.value, theirs.value, paired.low, paired.high, gain, paired.basis)
    ends = _quadrature(ours, theirs)
    if ends is None:
        return Contrast(ours.value, theirs.value, None, None, gain, "none")
    return Contrast(ours.value, theirs.value, *ends, gain, "quadrature")


def win_rate(row: Row, other: Row, column: Column) -> Wins | None:
    """Share of the prompts that both have on which `row` is better, ties half.

    Over one pair of runs with its Wilson interval; over several common training seeds their mean, with a t interval
    over the seeds. A model without training seeds (the teacher) meets each seed of the other one. None where they
    share no images.
    """
    found = [
        count_wins(*(-np.asarray(badness(column.metric, side.means, column.target)) for side in (ours, theirs)))
        for seed in row.members
        for against in other.members
        if (seed == against or None in (seed, against))
        and (ours := _prompts(row, seed, column)) is not None
        and (theirs := _prompts(other, against, column)) is not None
        and ours.images == theirs.images
    ]
    if len(found) < 2:
        return found[0] if found else None
    mean, low, high = t_interval([wins.rate for wins in found])
    return Wins(mean, Interval(low=max(0.0, low), high=min(1.0, high), level=LEVEL, method="t over training seeds"))


def _prompts(row: Row, seed: int | None, column: Column) -> ByPrompt | None:
    result = row.result(column, seed)
    return by_prompt(result) if result is not None else None


def scores_of(row: Row, seed: int | None, column: Column) -> Scores | None:
    """Per-image values of one of the row's training seeds, where they were kept."""
    result = row.result(column, seed)
    return row.scores(result) if result is not None else None


@lru_cache(maxsize=KEPT)
def leaders(rows: tuple[Row, ...], column: Column) -> tuple[Row | None, Row | None]:
    """The best and second-best rows of a column that training seeds separate from all behind them, else None."""
    able = [row for row in rows if len(row.seeds(column)) >= MIN_SEEDS and not column.level]
    ranked = sorted(able, key=lambda row: column.goodness(_mean(row, column)), reverse=True)
    if len(ranked) < 2 or not _separated(ranked[0], ranked[1:], column):
        return None, None
    second = ranked[1] if len(ranked) > 2 and _separated(ranked[1], ranked[2:], column) else None
    return ranked[0], second


def _separated(row: Row, others: list[Row], column: Column) -> bool:
    pairs = [_pairs(row, other, column) for other in others]
    if any(len(pair) < MIN_SEEDS for pair in pairs):
        return False
    p_values = [paired_t([a for a, _ in pair], [b for _, b in pair]) for pair in pairs]
    return all(p < ALPHA for p in holm(p_values))


def _pairs(row: Row, base: Row, column: Column) -> list[tuple[float, float]]:
    """Values of common training seeds; a base without training seeds (the teacher) pairs with each seed."""
    pairs = []
    for seed in row.seeds(column):
        other = base.result(column, None if list(base.members) == [None] else seed)
        found = row.result(column, seed)
        if found is not None and other is not None and found.value is not None and other.value is not None:
            pairs.append((found.value, other.value))
    return pairs


def _gain(column: Column, value: float, base: float) -> float:
    return -abs(value - base) if column.level else column.goodness(value) - column.goodness(base)


def _mean(row: Row, column: Column) -> float:
    figure = row.figure(column)
    return figure.value if figure else math.nan


def _quadrature(ours: Figure, theirs: Figure) -> tuple[float, float] | None:
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return None
    low = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    high = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return ours.value - theirs.value - low, ours.value - theirs.value + high
