"""Result files gathered into one comparison per world: rows, columns and their cells.

A row is a method at one sampler setting, with the training seeds that were run of it.
A column is one metric under one protocol id: two protocols of one metric are two
columns, never one.

Differences between two rows of one column, with an interval, and which rows a column separates.

Over several training seeds the seed is the unit (paired t). Between single runs it is the
prompt with all its images, as in :mod:`rgbench.judge.paired`: a paired bootstrap,
stratified by group, where both kept per-image scores; a paired jackknife where both kept
what the figure is without each group of prompts. Else the half widths are added in
quadrature, which ignores that both sides drew the same prompts and noise, and is usually
too wide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rgbench.core.errors import UsageError
from rgbench.core.progress import Track, untracked
from rgbench.evaluate.results import Result, load_log, load_results, load_samples
from rgbench.evaluate.results import Row as Logged
from rgbench.judge.paired import ByPrompt, badness, by_prompt, difference, is_level, target_of
from rgbench.metrics.base import Interval, Metric
from rgbench.metrics.statistics import LEVEL, Wins, count_wins, holm, paired_t, t_interval

METHODS = {"teacher": "Teacher", "lcd": "LCD", "rg_lcd": "RG-LCD", "lrm": "LRM", "external": "External"}
Scores = dict[tuple[str, int], float]
FAMILIES = ("reward", "oracle", "set distance", "spectrum")
LEADS = ("hps_aa1", "hps_aa0", "oracle_all", "oracle_mean", "hfer_gap_db", "band_gap_db")


@dataclass(frozen=True)
class Figure:
    """One cell: a value over images (one training seed) or the mean over training seeds.

    `low` and `high` bound the 95 % interval where there is one. `results` are the files that it was made from, in
    the order of their training seeds.
    """

    value: float
    low: float | None
    high: float | None
    results: tuple[Result, ...]

    @property
    def in_sample(self) -> bool:
        """Whether a model behind this figure was trained on this very reward."""
        return any(result.in_sample for result in self.results)

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(sorted({flag for result in self.results for flag in result.flags}))


@dataclass(frozen=True, order=True)
class Column:
    """A metric under one protocol, in the order of tables. `target` is the good end; of a `level` nobody knows it."""

    rank: tuple[int, str, int, str]
    protocol_id: str
    metric: Metric = field(compare=False)
    protocol: dict[str, Any] = field(compare=False)
    target: float = field(compare=False, default=0.0)
    level: bool = field(compare=False, default=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.metric.name, self.protocol_id

    def goodness(self, value: float) -> float:
        """Higher is better, whatever the metric's direction."""
        return -float(badness(self.metric, value, self.target))


@dataclass(frozen=True, eq=False)
class Row:
    """One method at one sampler setting; `members` maps training seed to that run's results by column key. Rows
    are equal only to themselves, so that what is computed for them can be kept.
    """

    method: str
    stem: str
    sampling: dict[str, Any]
    members: dict[int | None, dict[tuple[str, str], Result]]
    distinct: str = ""
    _scores: dict[Path | None, Scores | None] = field(default_factory=dict, repr=False)

    @property
    def results(self) -> list[Result]:
        return [result for member in self.members.values() for result in member.values()]

    @property
    def first_results(self) -> list[Result]:
        """One result of each training seed, for what its results share."""
        return [next(iter(member.values())) for member in self.members.values()]

    @property
    def method_label(self) -> str:
        return METHODS.get(self.method, self.method)

    @property
    def sampler_label(self) -> str:
        """Such as ``LCM, 4 steps, g 5``."""
        parts = [str(self.sampling.get("sampler") or "").upper()]
        if (steps := self.sampling.get("steps")) is not None:
            parts.append(f"{steps} step{'s' if steps != 1 else ''}")
        if (guidance := self.sampling.get("guidance_scale")) is not None:
            parts.append(f"g {guidance:g}")
        return ", ".join(part for part in parts if part) or "—"

    @property
    def model_label(self) -> str:
        label = self.results[0].model if len(self.members) == 1 else f"{self.stem}, {len(self.members)} seeds"
        return f"{label} ({self.distinct})" if self.distinct else label

    @property
    def short_name(self) -> str:
        """Method and model."""
        return f"{self.method_label} ({self.model_label})"

    @property
    def name(self) -> str:
        """Method, model and sampler in one line, for captions and prose."""
        return f"{self.method_label} ({self.model_label}; {self.sampler_label})"

    def result(self, column: Column, seed: int | None) -> Result | None:
        """The result of one training seed, or None where there is no value."""
        found = self.members.get(seed, {}).get(column.key)
        return found if found is not None and found.value is not None else None

    def scores(self, result: Result) -> Scores | None:
        """Per-image values of one of this row's results by (prompt id, seed), read once."""
        if result.path not in self._scores:
            self._scores[result.path] = load_samples(result)
        return self._scores[result.path]

    def seeds(self, column: Column) -> list[int | None]:
        return [seed for seed in self.members if self.result(column, seed) is not None]

    def figure(self, column: Column) -> Figure | None:
        """The cell of `column`: mean and t interval over seeds, or the one run's own interval."""
        results = tuple(found for seed in self.members if (found := self.result(column, seed)) is not None)
        values = [result.value for result in results if result.value is not None]
        if not values:
            return None
        if len(values) > 1:
            mean, low, high = t_interval(values)
            return Figure(mean, low, high, results)
        interval = results[0].interval
        return Figure(values[0], interval.low if interval else None, interval.high if interval else None, results)


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured in one world.

    `checkpoints` are results of runs before their last step, which are in no row; `logs` what runs logged in
    training, by generation id.
    """

    world: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    checkpoints: tuple[Result, ...] = field(default=(), compare=False)
    logs: dict[str, list[Logged]] = field(default_factory=dict, compare=False)

    @property
    def title(self) -> str:
        return f"World: {self.world}"

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """Fields of each protocol by its id, in the order of the columns; those of checkpoints alone are last."""
        found = {column.protocol_id: column.protocol for column in self.columns}
        return found | {r.protocol.id: r.protocol.fields for r in self.checkpoints if r.protocol.id not in found}

    @cached_property
    def protocol_numbers(self) -> dict[str, int]:
        """Footnote number of each protocol id."""
        return {name: i for i, name in enumerate(self.protocols, start=1)}

    @property
    def all_results(self) -> list[tuple[Row | None, Result]]:
        """Every result with its row; those of checkpoints, which are in no row, last."""
        return [*((row, result) for row in self.rows for result in row.results), *((None, r) for r in self.checkpoints)]

    @cached_property
    def teacher(self) -> Row | None:
        """The teacher at its most steps, the baseline of the deltas."""
        rows = [row for row in self.rows if row.method == "teacher"]
        return max(rows, key=lambda row: row.sampling.get("steps") or 0, default=None)

    def lcd(self, row: Row) -> Row | None:
        """The LCD student at the sampler settings of `row`: the comparator of equal budget and steps."""
        same = [other for other in self.rows if other.method == "lcd" and other.sampling == row.sampling]
        return min(same, key=lambda other: (other.stem != "lcd", other.stem), default=None)

    def column(self, *names: str) -> Column | None:
        """The fullest column of the first metric among `names` that was measured at all."""
        for name in names:
            if found := [column for column in self.columns if column.metric.name == name]:
                return max(found, key=self.num_figures)
        return None

    def num_figures(self, column: Column) -> int:
        return sum(bool(row.seeds(column)) for row in self.rows)

    def trained_reward(self) -> Column | None:
        """The reward column that most rows were trained on; without any, the first reward column."""
        rewards = [column for column in self.columns if column.metric.family == "reward"]
        return max(rewards, key=lambda column: self.num_trained(column), default=None)

    def num_trained(self, column: Column) -> int:
        figures = (row.figure(column) for row in self.rows)
        return sum(figure.in_sample for figure in figures if figure is not None)


def gather(results: Path, track: Track = untracked) -> list[Comparison]:
    """Reads every result file under `results`, which `track` shows; one comparison per world, by name.

    Raises:
        UsageError: the folder is missing or holds no result; or a file is not a result.
    """
    loaded = load_results(results, track) if results.is_dir() else []
    if not loaded:
        raise UsageError(f"{results}: no result files here; run `rgbench eval` first, or name the folder that has them")
    ordered = sorted(loaded, key=lambda result: result.world)
    return [_compare(world, list(members)) for world, members in groupby(ordered, key=lambda result: result.world)]


def _compare(world: str, loaded: list[Result]) -> Comparison:
    checkpoints = tuple(result for result in loaded if is_checkpoint(result))
    results = [result for result in loaded if not is_checkpoint(result)]
    columns = {(r.metric.name, r.protocol.id): r for r in results}
    by_row: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        by_row.setdefault((result.method, _stem(result), _canonical(sampling_of(result))), []).append(result)
    rows = [row for (method, stem, _), found in by_row.items() for row in _rows(method, stem, found)]
    ordered = tuple(sorted(rows, key=_row_rank)), tuple(sorted(map(column_of, columns.values())))
    folders = {result.generation.id: result.path.parent for result in results if result.path is not None}
    logs = {generation: logged for generation, folder in folders.items() if (logged := load_log(folder))}
    return Comparison(world, *ordered, checkpoints, logs)


def is_checkpoint(result: Result) -> bool:
    """Whether the weights are those of a step before the run's last."""
    return bool(result.training) and result.training["step"] < result.training["steps"]


def _rows(method: str, stem: str, results: list[Result]) -> Iterable[Row]:
    """One row of several seeds; or one row each, told apart by generation id, where a seed has two sets of weights."""
    sampling = sampling_of(results[0])
    runs: dict[tuple[int | None, str, str], dict[tuple[str, str], Result]] = {}
    for result in results:
        key = (result.training_seed, result.model, result.generation.id)
        runs.setdefault(key, {})[(result.metric.name, result.protocol.id)] = result
    ordered = dict(sorted(runs.items(), key=lambda item: (item[0][0] is not None, item[0][0] or 0, item[0][1:])))
    seeds = [seed for seed, _, _ in ordered]
    if len(set(seeds)) == len(seeds):
        return [Row(method, stem, sampling, {seed: found for (seed, _, _), found in ordered.items()})]
    return [
        Row(method, stem, sampling, {seed: found}, distinct=generation)
        for (seed, _, generation), found in ordered.items()
    ]


def _row_rank(row: Row) -> tuple[Any, ...]:
    order = list(METHODS)
    method = order.index(row.method) if row.method in order else len(order)
    steps = row.sampling.get("steps") or 0
    return method, row.stem, -steps if row.method == "teacher" else steps, _canonical(row.sampling), row.distinct


def column_of(result: Result) -> Column:
    """The column that a result belongs to."""
    metric = result.metric
    family = FAMILIES.index(metric.family) if metric.family in FAMILIES else len(FAMILIES)
    lead = LEADS.index(metric.name) if metric.name in LEADS else len(LEADS)
    rank = (family, metric.family, lead, metric.name)
    return Column(rank, result.protocol.id, metric, result.protocol.fields, target_of(result), is_level(result))


def file_of(result: Result) -> str:
    """World/model/generation/file."""
    return "/".join(result.path.parts[-4:]) if result.path else ""


def _stem(result: Result) -> str:
    return result.model if result.training_seed is None else result.model.removesuffix(f"-s{result.training_seed}")


def sampling_of(result: Result) -> dict[str, Any]:
    """The generation's fields without the weights: what two training seeds of one method share."""
    return {key: value for key, value in result.generation.fields.items() if key != "weights_sha256"}


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, default=str)


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
