"""``rgbench check``: limits on figures, for people's own continuous integration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rgbench.errors import UsageError, suggest
from rgbench.evaluation.results import Result, load_results
from rgbench.evaluation.verdict_file import load_verdicts

HIGH_FREQUENCY = "hfer_gap_db"


@dataclass(frozen=True)
class Limit:
    """A bound on one metric.

    Attributes:
        metric: its name.
        bound: in the metric's unit.
        most: whether the figure may not lie above it; else not below.
    """

    metric: str
    bound: float
    most: bool

    def holds(self, value: float) -> bool:
        """Whether a value respects the bound."""
        return value <= self.bound if self.most else value >= self.bound


@dataclass(frozen=True)
class Finding:
    """One limit on one model, in words."""

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
            bound = float("nan")
        if not name or bound != bound or abs(bound) == float("inf"):
            option = "--max" if most else "--min"
            raise UsageError(f"{option} {text[:80]!r}: give a metric and a number, like {option} {HIGH_FREQUENCY}=1.0")
        limits.append(Limit(name.strip(), bound, most))
    return limits


def check_results(
    results: Path, limits: Sequence[Limit], models: Sequence[str] = (), verdicts: bool = False
) -> list[Finding]:
    """Hold every model against every limit.

    A figure that is not there fails its limit: what was not measured is not known to be good.

    Args:
        results: folder of result files.
        limits: bounds on metrics; a metric under several protocols must hold under each.
        models: names; all by default.
        verdicts: also fail models whose stored verdict is over-optimised, or that have none though they were trained
            on a reward.

    Raises:
        UsageError: nothing to check, no results, an unknown model, or a metric that no model has.
    """
    if not limits and not verdicts:
        raise UsageError("nothing to check; give --max-hf-db 1.0, --max METRIC=VALUE, --min METRIC=VALUE or --verdict")
    loaded = load_results(results) if results.is_dir() else []
    if not loaded:
        raise UsageError(f"{results}: no result files here; run `rgbench eval` first, or name the folder that has them")
    by_model = _by_model(loaded, models, results)
    metrics = {result.metric.name for result in loaded}
    for limit in limits:
        if limit.metric not in metrics:
            raise UsageError(f"{results}: no model has the metric {limit.metric!r}; {suggest(limit.metric, metrics)}")
    findings = [
        finding for name, found in by_model.items() for limit in limits for finding in _held(name, found, limit)
    ]
    return findings + (_verdicts(results, by_model) if verdicts else [])


def _by_model(loaded: Sequence[Result], models: Sequence[str], results: Path) -> dict[str, list[Result]]:
    """Results by world, model and sampler settings."""
    known = {result.model for result in loaded}
    for name in models:
        if name not in known:
            raise UsageError(f"{results}: no model {name!r}; {suggest(name, known)}")
    found: dict[str, list[Result]] = {}
    for result in loaded:
        if not models or result.model in models:
            found.setdefault(f"{result.world}/{result.model}/{result.generation.id}", []).append(result)
    return found


def _held(name: str, found: Sequence[Result], limit: Limit) -> list[Finding]:
    own = [result for result in found if result.metric.name == limit.metric]
    if not own:
        return [Finding(False, f"{name}: {limit.metric} was not measured")]
    return [_one(name, result, limit) for result in own]


def _one(name: str, result: Result, limit: Limit) -> Finding:
    metric = result.metric
    unit = f" {metric.unit}" if metric.unit else ""
    bound = f"{'at most' if limit.most else 'at least'} {limit.bound:g}{unit}"
    if result.value is None:
        return Finding(False, f"{name}: {metric.label} has no value ({', '.join(result.flags)}); it must be {bound}")
    shown = f"{result.value:.{metric.decimals}f}{unit}"
    if result.interval:
        shown += f" [{result.interval.low:.{metric.decimals}f}, {result.interval.high:.{metric.decimals}f}]"
    if limit.holds(result.value):
        return Finding(True, f"{name}: {metric.label} is {shown}, {bound}")
    return Finding(False, f"{name}: {metric.label} is {shown}; it must be {bound}")


def _verdicts(results: Path, by_model: Mapping[str, Sequence[Result]]) -> list[Finding]:
    stored = {f"{v.world}/{v.model}/{v.generation.id}": v for v in load_verdicts(results)}
    findings = []
    for name, found in by_model.items():
        verdict = stored.get(name)
        if verdict is not None:
            known = verdict.verdict in ("not over-optimised", "no gain")
            findings.append(Finding(known, f"{name}: {verdict.words}"))
        elif any(result.trained_rewards for result in found):
            findings.append(
                Finding(False, f"{name}: trained on a reward and no verdict; run: rgbench verdict {results}")
            )
    return findings
