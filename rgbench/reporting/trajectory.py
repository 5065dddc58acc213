"""A run's figures along its training: the trained reward (proxy) beside what it was not trained on (gold).

The points are the results of a run's checkpoints (``rgbench eval --checkpoints``) and of
the finished model, under one protocol for each metric; figures of two protocols are never
joined to a curve.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from rgbench.evaluation.results import Result
from rgbench.reporting.contrast import Contrast, contrast
from rgbench.reporting.gather import Column, Comparison, Row, column_of, sampling_of

GOLD = ("oracle_mean", "oracle_all")
HELD_OUT = ("reward", "oracle")  # families of which a metric that was not trained on is gold
MIN_POINTS = 3  # a peak needs a figure on either side


@dataclass(frozen=True)
class Hack:
    """Gold peaked at step `peak`; `fall` and `rise` are the changes of gold and of the trained reward until `last`."""

    peak: int
    last: int
    fall: Contrast
    rise: Contrast

    @property
    def clear(self) -> bool:
        """Whether the intervals of both changes exclude no change."""
        return self.fall.clear and self.rise.clear


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
        return {
            step: result.value
            for step, found in self.points.items()
            if (result := found.get(metric)) is not None and result.value is not None
        }

    @property
    def proxy(self) -> str | None:
        """The metric that the run was trained on; the one with most points."""
        return self._fullest([name for name in self.columns if self._trained(name)])

    @property
    def gold(self) -> str | None:
        """What it was not trained on: the oracle, else a reward that it never met."""
        oracle = [name for name in GOLD if name in self.columns]
        held_out = [
            name
            for name, column in self.columns.items()
            if column.metric.family in HELD_OUT and column.metric.direction == "higher" and not self._trained(name)
        ]
        return self._fullest(oracle) or self._fullest(held_out)

    @property
    def hack(self) -> Hack | None:
        """Where gold peaks while the trained reward still rises after it; None where that does not happen.

        PROTOCOLS: "the step where gold peaks while the trained reward still rises". The last
        point is no such step: nothing is known of what comes after it.
        """
        if self.proxy is None or self.gold is None:
            return None
        proxy, gold = self.curve(self.proxy), self.curve(self.gold)
        steps = sorted(proxy.keys() & gold.keys())
        if len(steps) < MIN_POINTS:
            return None
        peak, last = max(steps, key=lambda step: (gold[step], -step)), steps[-1]
        changes = [self._change(name, peak, last) for name in (self.gold, self.proxy)]
        fall, rise = changes
        if fall is None or rise is None or not (fall.value < 0 < rise.value):
            return None
        return Hack(peak, last, fall, rise)

    def _change(self, name: str, first: int, last: int) -> Contrast | None:
        """From step `first` to step `last`, paired over images where they kept per-image scores."""
        column = self.columns[name]
        ends = [
            Row(self.row.method, self.row.stem, self.row.sampling, {self.seed: {column.key: self.points[step][name]}})
            for step in (last, first)
        ]
        return contrast(ends[0], ends[1], column)

    def _trained(self, name: str) -> bool:
        return any(found[name].in_sample for found in self.points.values() if name in found)

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
