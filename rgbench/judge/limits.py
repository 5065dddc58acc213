"""Limits on metric values, for people's own continuous integration (``rgbench check``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rgbench.core.errors import UsageError, suggest
from rgbench.core.progress import Track, untracked
from rgbench.judge.models import Column, Model, ResultSet, load_result_sets
from rgbench.judge.paired import delta
from rgbench.judge.verdict import Outcome, current_verdicts
from rgbench.metrics.values import Direction

HIGH_FREQUENCY = "hfer_db"
PASSED = (Outcome.ALIGNED, Outcome.PAID_FOR, Outcome.NO_GAIN)  # verdicts that do not fail a check


@dataclass(frozen=True)
class Limit:
    """A bound on one metric.

    Attributes:
        metric: its name.
        bound: in the metric's unit.
        most: whether the value may not lie above it; else not below.
    """

    metric: str
    bound: float
    most: bool

    def holds(self, value: float) -> bool:
        """Whether a value respects the bound."""
        return value <= self.bound if self.most else value >= self.bound


@dataclass(frozen=True)
class Checked:
    """One limit, or the verdict, on one model, in words."""

    ok: bool
    words: str


def parse_limits(texts: Sequence[str], most: bool) -> list[Limit]:
    """Limits from ``name=value`` texts.

    Raises:
        UsageError: no ``=``, or no finite number behind it.
    """
    limits = []
    for text in texts:
        name, _, number = text.partition("=")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not name or not math.isfinite(bound):
            option = "--max" if most else "--min"
            raise UsageError(f"{option} {text[:80]!r}: give a metric and a number, like {option} {HIGH_FREQUENCY}=1.0")
        limits.append(Limit(name.strip(), bound, most))
    return limits


def check_results(
    root: Path,
    limits: Sequence[Limit],
    names: Sequence[str] = (),
    verdicts: bool = False,
    base: str | None = None,
    track: Track = untracked,
) -> list[Checked]:
    """Hold every run against every limit, or every model's difference to a base; checkpoints are left out.

    A value that is not there fails its limit: what was not measured is not known to be good.

    Args:
        root: the results folder.
        limits: bounds on metrics; a metric under several protocols must hold under each.
        names: models, without or with seed; all by default.
        verdicts: also fail models whose verdict is over-optimised, reward without gold, worse than LCD, or open.
        base: a model, without or with seed; bounds are then on the difference to it.
        track: shows the reading.

    Raises:
        UsageError: nothing to check, no results, an unknown model, or a metric that no model has.
    """
    if not limits and not verdicts:
        raise UsageError("nothing to check; give --max-hf-db 1.0, --max METRIC=VALUE, --min METRIC=VALUE or --verdict")
    sets = load_result_sets(root, track)
    known = {name for results in sets for model in results.models for name in (model.name, *model.names)}
    for name in (*names, *([base] if base else [])):
        if name not in known:
            raise UsageError(f"{root}: no finished model {name!r}; {suggest(name, known)}")
    metrics = {column.metric for results in sets for column in results.columns}
    for limit in limits:
        if limit.metric not in metrics:
            raise UsageError(f"{root}: no model has the metric {limit.metric!r}; {suggest(limit.metric, metrics)}")
    found = []
    for results in sets:
        models = _chosen(results, names, base)
        for limit in limits:
            columns = [column for column in results.columns if column.metric == limit.metric]
            found += [each for model in models for each in _held(results, model, columns, limit, base)]
        if verdicts:
            found += _verdicts(root, results, models)
    if not found:
        nothing = f"nothing but {base} is here" if limits else "no model here is known to be trained on a reward"
        raise UsageError(f"{root}: {nothing}: nothing was checked")
    return found


def _chosen(results: ResultSet, names: Sequence[str], base: str | None) -> list[Model]:
    """Models to check: single runs, or whole methods against a base."""
    if names:
        models = [model.run(name) for model in results.models for name in names if name in (model.name, *model.names)]
    else:
        models = list(results.models)
    models = [model for model in models if base not in (model.name, *model.names)]
    return models if base else [model.run(name) for model in models for name in model.names]


def _held(results: ResultSet, model: Model, columns: Sequence[Column], limit: Limit, base: str | None) -> list[Checked]:
    name = f"{results.world}/{model.label}"
    against = results.baseline(model, base) if base else None
    if base and against is None:
        return [Checked(False, f"{name}: {results.why_no_baseline(model, base)}")]
    name = name if against is None else f"{name} against {against.label}"
    columns = [column for column in columns if any(column.key in result.by_key for result in model.results.values())]
    if not base and any(c.reference is None and c.info.direction is Direction.REFERENCE for c in columns):
        lacking = f"{limit.metric} had no real images of the model's size to compare with"
        raise UsageError(f"{name}: {lacking}; compare with another model's: --base teacher")
    found = []
    for column in columns:
        change = delta(model, against, column) if against is not None else None
        value = model.value(column) if against is None else None
        which = f"{name}, {column.protocol.id}" if len(columns) > 1 else name
        if change is not None:
            found.append(_one(which, column, limit, change.value, change.low, change.high))
        elif value is not None and value.value is not None:
            ends = (value.interval.low, value.interval.high) if value.interval else (None, None)
            found.append(_one(which, column, limit, value.value, *ends))
    if not found:
        flags = {
            flag for c in columns for r in model.results.values() if c.key in r.by_key for flag in r.by_key[c.key].flags
        }
        why = f" ({', '.join(sorted(flags))})" if flags else ""
        found.append(Checked(False, f"{name}: {limit.metric} has no value{why}; it must be {_bound(limit, '')}"))
    return found


def _one(name: str, column: Column, limit: Limit, value: float, low: float | None, high: float | None) -> Checked:
    shown = f"{value:.{column.decimals}f}{f' {column.unit}' if column.unit else ''}"
    if low is not None and high is not None:
        shown += f" [{low:.{column.decimals}f}, {high:.{column.decimals}f}]"
    bound = _bound(limit, column.unit)
    ok = limit.holds(value)
    return Checked(ok, f"{name}: {column.label} is {shown}{', ' if ok else '; it must be '}{bound}")


def _bound(limit: Limit, unit: str) -> str:
    return f"{'at most' if limit.most else 'at least'} {limit.bound:g}{f' {unit}' if unit else ''}"


def _verdicts(root: Path, results: ResultSet, models: Sequence[Model]) -> list[Checked]:
    """Verdicts on the results as they are; a stored one of other values is reported as stale in the log."""
    shown = {name for model in models for name in model.names}
    return [
        Checked(verdict.outcome in PASSED, f"{results.world}: {verdict.words}")
        for verdict in current_verdicts(root, results)
        if shown & set(verdict.runs)
    ]
