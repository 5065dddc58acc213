"""Verdicts of ``rgbench verdict`` in the report: in words, and as a table of families with their thresholds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rgbench.evaluation.verdict_file import FILE, Family, FigureChange, Verdict
from rgbench.reporting.digits import MISSING, format_figure, format_number, places_worth
from rgbench.reporting.gather import Comparison, Row
from rgbench.reporting.tables import LABELS, Cell, Heading, Table, row_labels

NOTE = (
    "Over-optimised: the trained reward is up and at least two families are worse. A figure is up or worse where its "
    "whole 95 % interval lies beyond δ, the 95th percentile of what LCD training seeds differ by. Shown is the figure "
    "of each family that is furthest beyond its δ, as how much worse it is than the LCD student's."
)
TONES = {"over-optimised": "worse", "not over-optimised": "better", "no gain": "flat"}


def verdicts_of(verdicts: Sequence[Verdict], row: Row) -> list[Verdict]:
    """Verdicts on the row's runs at its sampler settings, in the order given."""
    wanted = {(result.world, result.model, result.generation.id) for result in row.first_results}
    return [found for found in verdicts if (found.world, found.model, found.generation.id) in wanted]


def verdict_words(found: Sequence[Verdict]) -> str:
    """One verdict in its own words; of several, how often each was given."""
    if not found:
        return ""
    if len(found) == 1:
        return f"Verdict: {found[0].verdict if found[0].verdict != 'none' else 'none is possible'}. {found[0].words}"
    count = Counter(verdict.verdict for verdict in found)
    parts = (f"{name} {number} of {len(found)} times" for name, number in count.most_common())
    return f"Verdicts over {len(found)} training seeds: {'; '.join(parts)}."


def verdict_name(found: Sequence[Verdict]) -> str:
    """The verdict given most often; "" without one that says anything."""
    said = Counter(verdict.verdict for verdict in found if verdict.verdict != "none")
    return said.most_common(1)[0][0] if said else ""


def verdict_table(comparison: Comparison, verdicts: Sequence[Verdict]) -> Table | None:
    """One row per judged run: the verdict, the trained reward, each family, the rule's false positives."""
    judged = [(row, verdict) for row in comparison.rows for verdict in verdicts_of(verdicts, row)]
    if not judged:
        return None
    names = list(dict.fromkeys(family.name for _, verdict in judged for family in verdict.families))
    rows = []
    for row, verdict in judged:
        families = {family.name: family for family in verdict.families}
        source = f"{verdict.world}/{verdict.model}/{verdict.generation.id}/{FILE}"
        cells = [
            Cell(verdict.verdict if verdict.verdict != "none" else MISSING, sources=(source,)),
            _reward(verdict),
            *(_family(families.get(name)) for name in names),
            _false_positives(verdict),
        ]
        rows.append(((*row_labels(row)[:2], verdict.model), tuple(cells)))
    heads = ("Verdict", "Trained reward", *(name.capitalize() for name in names), "False positives")
    headings = tuple(Heading(head) for head in heads)
    return Table("verdict", f"Verdicts, {comparison.world}", LABELS, headings, tuple(rows), (NOTE,))


def _reward(verdict: Verdict) -> Cell:
    if not verdict.rewards:
        return Cell(MISSING)
    change = max(verdict.rewards, key=_beyond)
    return Cell(f"{'up' if change.clear else 'not up'}: {_shown(change)}", marks="†")


def _family(family: Family | None) -> Cell:
    if family is None or not family.figures:
        return Cell(MISSING)
    change = max(family.figures, key=_beyond)
    trend = "worse" if family.worse else ""
    return Cell(f"{'worse' if family.worse else 'not worse'}: {_shown(change)}", trend=trend)


def _false_positives(verdict: Verdict) -> Cell:
    found = verdict.false_positives
    return Cell(MISSING if found is None else f"{found['over_optimised']} of {found['pairs']} LCD pairs")


def _shown(change: FigureChange) -> str:
    decimals = change.metric.decimals
    figure = format_figure(change.deterioration, change.low, change.high, decimals, signed=True)
    places = places_worth(change.low, change.high, decimals)
    delta = MISSING if change.delta is None else format_number(change.delta, places)
    unit = f" {change.metric.unit}" if change.metric.unit else ""
    return f"{change.metric.label} {figure}{unit} (δ {delta})"


def _beyond(change: FigureChange) -> tuple[bool, float]:
    """How far the interval's lower end is beyond δ, in units of δ; what is clear comes first."""
    low = change.deterioration if change.low is None else change.low
    return change.clear, (low - (change.delta or 0.0)) / (change.delta or 1.0)
