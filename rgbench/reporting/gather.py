"""Result files gathered into one comparison per world: rows, columns and their cells.

A row is a method at one sampler setting, with the training seeds that were run of it.
A column is one metric under one protocol id: two protocols of one metric are two
columns, never one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from rgbench.errors import UsageError
from rgbench.evaluation.logged import Row as Logged
from rgbench.evaluation.logged import load_log
from rgbench.evaluation.paired import badness, is_level, target_of
from rgbench.evaluation.results import Result, load_results, load_samples
from rgbench.evaluation.statistics import t_interval
from rgbench.metrics.contract import Metric
from rgbench.metrics.tracking import Track, untracked

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
