"""A run's figures along its training: the trained reward (proxy) beside what it was not trained on (gold).

The points are the results of a run's checkpoints (``rgbench eval --checkpoints``) and of
the finished model, under one protocol for each metric; figures of two protocols are never
joined to a curve.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from rgbench.evaluation.curves import Curve, Hack, find_hack
from rgbench.evaluation.results import Result
from rgbench.evaluation.verdict import trained_keys
from rgbench.reporting.gather import Column, Comparison, Row, column_of, sampling_of

GOLD = ("oracle_mean", "oracle_all")
HELD_OUT = ("reward", "oracle")  # families of which a metric that was not trained on is gold


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One training seed of `row`: by optimiser step the results of each metric by its name, under one protocol."""

    row: Row
    seed: int | None
    points: dict[int, dict[str, Result]]
    columns: dict[str, Column]

    @property
    def model(self) -> str:
        """The run's name."""
        return next(iter(self.row.members[self.seed].values())).model

    def curve(self, metric: str) -> dict[int, float]:
        """Values by step; a step without a value is left out."""
        return {step: result.value for step, result in self._results(metric).items() if result.value is not None}

    @property
    def proxy(self) -> str | None:
        """The reward that the run was trained on, at the very antialias where that was measured."""
        return self._fullest([name for name, _ in trained_keys(self._figures)])

    @property
    def gold(self) -> str | None:
        """What it was not trained on: the oracle, else a reward that it never met."""
        oracle = [name for name in GOLD if name in self.columns]
        held_out = [
            name
            for name, column in self.columns.items()
            if column.metric.family in HELD_OUT
            and column.metric.direction == "higher"
            and column.key in self._figures
            and not self._figures[column.key].in_sample
        ]
        return self._fullest(oracle) or self._fullest(held_out)

    @cached_property
    def hack(self) -> Hack | None:
        """The hack step between this run's proxy and its gold."""
        if self.proxy is None or self.gold is None:
            return None
        return find_hack(self._results(self.gold), self._results(self.proxy))

    @cached_property
    def _figures(self) -> dict[tuple[str, str], Result]:
        """One result of each column, for what those of all steps share."""
        results = {column.key: list(self._results(name).values()) for name, column in self.columns.items()}
        return {key: found[-1] for key, found in results.items() if found}

    def _results(self, metric: str) -> Curve:
        """Results that have a value, by step."""
        found = {step: results[metric] for step, results in self.points.items() if metric in results}
        return {step: result for step, result in found.items() if result.value is not None}

    def _fullest(self, names: list[str]) -> str | None:
        return max(names, key=lambda name: len(self.curve(name)), default=None)


@lru_cache(maxsize=16)
def trajectories(comparison: Comparison) -> tuple[Trajectory, ...]:
    """One for each training seed whose checkpoints were evaluated with the settings of a row of the table."""
    found = []
    for row in comparison.rows:
        for seed, final in row.members.items():
            earlier = [result for result in comparison.checkpoints if _belongs(result, row, seed, final)]
            if earlier:
                found.append(_trajectory(row, seed, earlier, list(final.values())))
    return tuple(found)


def _belongs(result: Result, row: Row, seed: int | None, final: dict[tuple[str, str], Result]) -> bool:
    model = next(iter(final.values())).model
    return (result.model, result.method, result.training_seed) == (model, row.method, seed) and (
        sampling_of(result) == row.sampling
    )


def _trajectory(row: Row, seed: int | None, earlier: list[Result], final: list[Result]) -> Trajectory:
    """Of each metric the protocol under which most checkpoints were measured."""
    count = Counter((result.metric.name, result.protocol.id) for result in earlier)
    protocols: dict[str, str] = {}
    for (name, protocol), _ in sorted(count.items(), key=lambda item: (-item[1], item[0])):
        protocols.setdefault(name, protocol)
    points: dict[int, dict[str, Result]] = {}
    columns: dict[str, Column] = {}
    last = earlier[0].training["steps"]
    for result in [*earlier, *final]:
        name = result.metric.name
        if protocols.get(name) == result.protocol.id:
            points.setdefault(result.training.get("step", last), {})[name] = result
            columns[name] = column_of(result)
    ordered = sorted(columns.values())
    return Trajectory(row, seed, dict(sorted(points.items())), {column.metric.name: column for column in ordered})
