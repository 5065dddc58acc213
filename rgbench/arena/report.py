"""Report of an arena: ``report.md`` beside the votes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rgbench.arena.pairs import QUESTIONS
from rgbench.arena.summary import (
    CHECKED,
    MIN_CHECKS,
    MIN_MODELS,
    MIN_RIGHT,
    PERCENT,
    Correlation,
    Duel,
    Standing,
    Summary,
    Tally,
)
from rgbench.core.io import write_text_atomic
from rgbench.metrics.statistics import wilson_interval
from rgbench.metrics.values import Interval
from rgbench.report.formats import escape
from rgbench.report.words import MISSING, format_number, format_value, plural

FILE = "report.md"
HEAD = "<!-- Made by `rgbench arena --report` from votes alone; do not edit. -->\n# Arena"
NOTES = (
    "Preferred: share of a model's comparisons that it wins, ties half, with the 95 % Wilson interval, which takes "
    "votes for independent. Strength: Bradley–Terry, ln π with mean 0; a difference of 1.1 is a win rate of 75 %. Its "
    "interval resamples raters and prompts, so it is the one to compare models by.",
    "Krippendorff's α: 1 is agreement, 0 chance.",
)
ATTENTION = (
    f"A person is left out where fewer than {MIN_RIGHT:.0%} of {MIN_CHECKS} answers or more to planted degraded copies "
    f"({' and '.join(CHECKED)}) prefer the intact image."
)


def write_report(summary: Summary, folder: Path) -> Path:
    """Write the report into the arena's folder; the same votes give the same bytes."""
    parts = [HEAD, _about(summary)]
    for tally in summary.tallies:
        parts += _question(tally)
    parts += ["\n".join(NOTES), "## Raters", _raters(summary), ATTENTION, _sides(summary)]
    parts += _correlations(summary.correlations, len(summary.results))
    write_text_atomic(folder / FILE, "\n\n".join(part for part in parts if part) + "\n")
    return folder / FILE


def standing_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Question, model, preferred, strength, votes and ties of each standing, for the command line."""
    return [
        (tally.question, each.model, _rate(each.rate, each.wilson), _strength(each), str(each.votes), str(each.ties))
        for tally in summary.tallies
        for each in tally.standings
    ]


def _about(summary: Summary) -> str:
    kind = "simulated raters, no people" if summary.simulated else "people"
    num = len(summary.counted)
    return (
        f"{plural(len(summary.design.models), 'model')}, {plural(len(summary.design.prompts), 'prompt')}, "
        f"{plural(num, 'rater')} ({kind}), {plural(len(summary.votes), 'vote')}."
    )


def _question(tally: Tally) -> Iterable[str]:
    yield f"## {tally.question.capitalize()}: {QUESTIONS[tally.question]}"
    rows = [
        (each.model, _rate(each.rate, each.wilson), _strength(each), str(each.votes), str(each.ties))
        for each in tally.standings
    ]
    yield _table(("Model", "Preferred, %", "Strength", "Votes", "Ties"), rows)
    if len(tally.standings) > 2:
        yield _table(("First", "Second", "First preferred, %", "First", "Second", "Ties"), map(_duel, tally.duels))
    if tally.alpha is None:
        yield "Agreement: undefined, since no two raters answered one comparison, or all answers are the same."
    else:
        alpha = format_number(tally.alpha, 2)
        yield f"Agreement: α = {alpha} over {plural(tally.shared, 'comparison')} with two raters or more."


def _duel(duel: Duel) -> tuple[str, ...]:
    rate = _rate(duel.rate, duel.interval)
    return duel.first, duel.second, rate, str(duel.won), str(duel.lost), str(duel.ties)


def _rate(rate: float, interval: Interval) -> str:
    return format_value(PERCENT * rate, PERCENT * interval.low, PERCENT * interval.high, 1)


def _strength(standing: Standing) -> str:
    interval = standing.strength_interval
    return format_value(standing.strength, interval.low, interval.high, 2, signed=True)


def _raters(summary: Summary) -> str:
    rows = [
        (
            each.rater.name,
            each.rater.kind,
            str(len(each.rater.votes)),
            f"{each.right} of {each.asked}" if each.asked else MISSING,
            f"left out: {each.why_not}" if each.why_not else "counted",
        )
        for each in summary.raters
    ]
    return _table(("Rater", "Kind", "Answers", "Checks right", "Votes"), rows)


def _sides(summary: Summary) -> str:
    left, num = summary.left
    if not num:
        return ""
    return f"The left image won {_rate(left / num, wilson_interval(left, num))} % of the votes that are no ties."


def _correlations(found: Sequence[Correlation], num_results: int) -> Iterable[str]:
    yield "## Metrics against people"
    if not found:
        yield (
            f"Correlations need {MIN_MODELS} models with results and a metric in common; {num_results} of the arena's "
            "models have results."
        )
        return
    rows = [
        (each.column.label, format_number(each.spearman, 2), format_number(each.pearson, 2), str(each.num))
        for each in found
    ]
    yield "Over models, each metric with better up against the share of comparisons won overall; 1 is the same order."
    yield _table(("Metric", "Spearman ρ", "Pearson r", "Models"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([escape(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
