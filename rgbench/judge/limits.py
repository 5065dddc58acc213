"""``rgbench check``: limits on figures, for people's own continuous integration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rgbench.core.errors import UsageError, suggest
from rgbench.core.progress import Track, untracked
from rgbench.evaluate.results import Result
from rgbench.judge.compare import partner_of, require_base
from rgbench.judge.paired import Paired, difference
from rgbench.judge.verdict import Model, load_verdicts, models_of
from rgbench.metrics.base import Interval

HIGH_FREQUENCY, LEVEL = "hfer_gap_db", "hfer_db"  # against real images; without any


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
    results: Path,
    limits: Sequence[Limit],
    models: Sequence[str] = (),
    verdicts: bool = False,
    base: str | None = None,
    track: Track = untracked,
) -> list[Finding]:
    """Hold every finished model against every limit; checkpoints of a run are left out.

    A figure that is not there fails its limit: what was not measured is not known to be good.

    Args:
        results: folder of result files.
        limits: bounds on metrics; a metric under several protocols must hold under each.
        models: names; all by default.
        verdicts: also fail models whose stored verdict is over-optimised, or that have none though they were trained
            on a reward.
        base: a model, with or without its seed; bounds are then on what a figure differs by from that model's.
        track: shows the reading.

    Raises:
        UsageError: nothing to check, no results, an unknown model, a metric that no model has, or verdicts alone of
            models that have none and met no reward.
    """
    if not limits and not verdicts:
        raise UsageError("nothing to check; give --max-hf-db 1.0, --max METRIC=VALUE, --min METRIC=VALUE or --verdict")
    found = models_of(results, track)
    metrics = {result.metric.name for model in found for result in model.results}
    limits = [_settled(limit, metrics, base, results) for limit in limits]
    if base is not None:
        require_base(found, base)
    chosen = _chosen(found, models, base, results)
    findings = [
        finding
        for name, model in chosen.items()
        for limit in limits
        for finding in _held(name, model, limit, found, base)
    ]
    findings += _verdicts(results, chosen) if verdicts else []
    if not findings:
        raise UsageError(
            f"{results}: no model here is known to be trained on a reward, and none has a verdict: nothing was checked"
        )
    return findings


def _settled(limit: Limit, metrics: set[str], base: str | None, results: Path) -> Limit:
    """The limit on a metric that is there; for HFER against another model its level will do."""
    if limit.metric in metrics:
        return limit
    if limit.metric == HIGH_FREQUENCY and LEVEL in metrics:
        if base is not None:
            return replace(limit, metric=LEVEL)
        raise UsageError(
            f"{results}: no model has {HIGH_FREQUENCY}, for there were no real images of its size; compare with "
            "another model's: --base teacher"
        )
    raise UsageError(f"{results}: no model has the metric {limit.metric!r}; {suggest(limit.metric, metrics)}")


def _chosen(found: Sequence[Model], names: Sequence[str], base: str | None, results: Path) -> dict[str, Model]:
    """Models by world, name and sampler settings; without the base."""
    known = {model.about.model for model in found}
    for name in names:
        if name not in known:
            raise UsageError(f"{results}: no finished model {name!r}; {suggest(name, known)}")
    chosen = {
        f"{model.about.world}/{model.about.model}/{model.about.generation.id}": model
        for model in found
        if (not names or model.about.model in names) and base not in (model.about.model, model.stem)
    }
    if not chosen:
        raise UsageError(f"{results}: nothing but {base} is here, which is not held against itself")
    return chosen


def _held(name: str, model: Model, limit: Limit, models: Sequence[Model], base: str | None) -> list[Finding]:
    own = [result for result in model.results if result.metric.name == limit.metric]
    if not own:
        return [Finding(False, f"{name}: {limit.metric} was not measured")]
    named = [(f"{name}, {result.protocol.id}" if len(own) > 1 else name, result) for result in own]
    if base is None:
        return [_one(which, result, result.value, result.interval, limit) for which, result in named]
    partner = partner_of(model, models, base)
    if partner is None:
        return [Finding(False, f"{name}: no {base} of its world, sampler settings and training steps is here")]
    return [_against(which, result, partner, limit) for which, result in named]


def _against(name: str, result: Result, partner: Model, limit: Limit) -> Finding:
    """One limit on a difference to another model."""
    other = partner.figures.get((result.metric.name, result.protocol.id))
    against = f"{name} against {partner.about.model}"
    if other is None:
        return Finding(False, f"{against}: {result.metric.name} was not measured of both under one protocol")
    if result.value is None or other.value is None:
        flags = ", ".join((*result.flags, *other.flags))
        return Finding(
            False, f"{against}: {result.metric.label} has no value ({flags}); it must be {_bound(limit, result)}"
        )
    found = difference(result, other)
    assert found is not None, "both have a value"
    return _one(against, result, found.value, found, limit)


def _one(name: str, result: Result, value: float | None, interval: Interval | Paired | None, limit: Limit) -> Finding:
    metric, bound = result.metric, _bound(limit, result)
    if value is None:
        return Finding(False, f"{name}: {metric.label} has no value ({', '.join(result.flags)}); it must be {bound}")
    shown = f"{value:.{metric.decimals}f}{f' {metric.unit}' if metric.unit else ''}"
    if interval is not None and interval.low is not None:
        shown += f" [{interval.low:.{metric.decimals}f}, {interval.high:.{metric.decimals}f}]"
    if limit.holds(value):
        return Finding(True, f"{name}: {metric.label} is {shown}, {bound}")
    return Finding(False, f"{name}: {metric.label} is {shown}; it must be {bound}")


def _bound(limit: Limit, result: Result) -> str:
    unit = f" {result.metric.unit}" if result.metric.unit else ""
    return f"{'at most' if limit.most else 'at least'} {limit.bound:g}{unit}"


def _verdicts(results: Path, models: Mapping[str, Model]) -> list[Finding]:
    stored = {f"{v.world}/{v.model}/{v.generation.id}": v for v in load_verdicts(results)}
    findings = []
    for name, model in models.items():
        verdict = stored.get(name)
        if verdict is not None:
            known = verdict.verdict in ("not over-optimised", "no gain")
            findings.append(Finding(known, f"{name}: {verdict.words}"))
        elif model.about.trained_rewards:
            findings.append(
                Finding(False, f"{name}: trained on a reward and no verdict; run: rgbench verdict {results}")
            )
    return findings
