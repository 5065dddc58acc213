"""Verdicts of ``rgbench verdict`` in the report: in words, and as a table of families with their thresholds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rgbench.evaluation.verdict import FAMILIES
from rgbench.evaluation.verdict_file import FILE, Family, FigureChange, Verdict
from rgbench.evaluation.verdict_words import UNITS
from rgbench.reporting.digits import MISSING, format_figure, format_number, places_worth
from rgbench.reporting.gather import Comparison, Row
from rgbench.reporting.tables import LABELS, Cell, Heading, Table, row_labels

NOTE = (
    "Over-optimised: the trained reward is up and at least two families are worse. A figure is up or worse where its "
    "whole 95 % interval lies beyond δ, the 95th percentile of what LCD training seeds differ by. Shown is the figure "
    "of each family that is furthest beyond its δ, as how much worse it is than the LCD student's; of one that is not "
    "worse, also from which true change on so many images would find it worse 4 times in 5. A family of which nothing "
    f"was measured is {MISSING}."
)
ERRORS = (
    "False positives: the same rule on pairs of LCD students, with δ from the others; the interval allows for pairs "
    "that share students, and few students cannot make it short."
)
TONES = {"over-optimised": "worse", "not over-optimised": "better", "no gain": "flat"}


def verdicts_of(verdicts: Sequence[Verdict], row: Row) -> list[Verdict]:
    """Verdicts on the row's runs at its sampler settings, in the order given."""
    wanted = {(result.world, result.model, result.generation.id) for result in row.first_results}
    return [found for found in verdicts if (found.world, found.model, found.generation.id) in wanted]


def verdict_words(found: Sequence[Verdict]) -> str:
    """One verdict in its own words; of several, how often each was given, and what was worse."""
    if not found:
        return ""
    if len(found) == 1:
        name = _name(found[0]) if found[0].verdict != "none" else "none is possible"
        return f"Verdict: {name}. {found[0].words.removeprefix(f'{name.capitalize()}. ')}"
    num = len(found)
    parts = [f"{name} {count} of {num} times" for name, count in Counter(map(_name, found)).most_common()]
    told = f"Verdicts over {num} training seeds: {'; '.join(parts)}."
    worse = Counter(family.name for verdict in found for family in verdict.families if family.worse)
    if worse:
        parts = [f"{name} {count} of {num}{_mixed(found, name)}" for name, count in worse.most_common()]
        told += f" Worse beyond δ: {', '.join(parts)}."
    elif all(verdict.verdict != "none" for verdict in found):
        told += " No family is worse beyond δ in any."
    rates = {_rate(verdict) for verdict in found if verdict.false_positives}
    return told + "".join(f" False positives of the rule: {rate}." for rate in sorted(rates))


def _mixed(found: Sequence[Verdict], name: str) -> str:
    """How many figures of a family that was worse are better beyond δ, over all verdicts; "" where none is."""
    families = [family for verdict in found for family in verdict.families if family.name == name and family.worse]
    figures = [figure for family in families for figure in family.figures]
    better = sum(f.delta is not None and f.high is not None and f.high < -f.delta for f in figures)
    return f" (though {better} of the {len(figures)} figures there are better)" if better else ""


def verdict_name(found: Sequence[Verdict]) -> str:
    """The verdict given most often; "" without one that says anything."""
    said = Counter(verdict.verdict for verdict in found if verdict.verdict != "none")
    return said.most_common(1)[0][0] if said else ""


def verdict_label(found: Sequence[Verdict]) -> str:
    """The same for people, and how often it was given where the training seeds disagree."""
    name = verdict_name(found)
    given = [verdict for verdict in found if verdict.verdict == name]
    return _name(given[0]) + (f" ({len(given)} of {len(found)} seeds)" if len(given) < len(found) else "")


def _name(verdict: Verdict) -> str:
    """What was not found is not shown to be absent."""
    return "not shown to be over-optimised" if verdict.verdict == "not over-optimised" else verdict.verdict


def verdict_table(comparison: Comparison, verdicts: Sequence[Verdict]) -> Table | None:
    """One row per judged run: the verdict, the trained reward, each family, the rule's false positives."""
    judged = [(row, verdict) for row in comparison.rows for verdict in verdicts_of(verdicts, row)]
    if not judged:
        return None
    rows = []
    for row, verdict in judged:
        families = {family.name: family for family in verdict.families}
        source = f"{verdict.world}/{verdict.model}/{verdict.generation.id}/{FILE}"
        cells = [
            Cell(_name(verdict) if verdict.verdict != "none" else MISSING, sources=(source,)),
            _reward(verdict),
            *(_family(families.get(name)) for name in FAMILIES),
            Cell(_rate(verdict) if verdict.false_positives else MISSING),
        ]
        rows.append(((*row_labels(row)[:2], verdict.model), tuple(cells)))
    heads = ("Verdict", "Trained reward", *(name.capitalize() for name in FAMILIES), "False positives")
    notes = (NOTE, *_delta_notes([verdict for _, verdict in judged]))
    headings = tuple(map(Heading, heads))
    return Table("verdict", f"Verdicts, {comparison.world}", LABELS, headings, tuple(rows), notes)


def _delta_notes(judged: Sequence[Verdict]) -> list[str]:
    """Whose seeds gave δ, and what each model was compared with; why the false positives are where there are any."""
    seeds: dict[tuple[str, ...], list[str]] = {}
    for verdict in judged:
        if verdict.base is not None:
            seeds.setdefault(verdict.delta_seeds, []).append(f"{verdict.model} with {verdict.base}")
    notes = []
    for names, pairs in seeds.items():
        given = (
            f"δ is from {len(names)} LCD students: {', '.join(names)}." if names else "Too few LCD students for a δ."
        )
        notes.append(f"{given} Compared: {', '.join(pairs)}.")
    return [*notes, ERRORS] if any(verdict.false_positives for verdict in judged) else notes


def _reward(verdict: Verdict) -> Cell:
    if not verdict.rewards:
        return Cell(MISSING)
    change = max(verdict.rewards, key=_beyond)
    return Cell(f"{'up' if change.clear else 'not up'}: {_shown(change)}", marks="†")


def _family(family: Family | None) -> Cell:
    if family is None or not family.figures:
        return Cell(MISSING)
    if family.better:
        gained = min(family.figures, key=lambda change: _beyond(change, gain=True))
        return Cell(f"better: {_shown(gained)}", trend="better")
    change = max(family.figures, key=_beyond)
    if family.worse:
        return Cell(f"worse: {_shown(change)}", trend="worse")
    return Cell(f"not worse: {_shown(change, power=True)}")


def _rate(verdict: Verdict) -> str:
    """Such as ``0 of 56 LCD pairs (0 to 49 %)``."""
    found, interval = verdict.false_positives or {}, verdict.false_positive_interval
    told = f"{found['over_optimised']} of {found['pairs']} LCD pairs"
    return told if interval is None else f"{told} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f} %)"


def _shown(change: FigureChange, *, power: bool = False) -> str:
    decimals = change.metric.decimals
    figure = format_figure(change.deterioration, change.low, change.high, decimals, signed=True)
    places = places_worth(change.low, change.high, decimals)
    delta = MISSING if change.delta is None else format_number(change.delta, places)
    from_which = f", found from {format_number(change.detectable, places)}" if power and change.detectable else ""
    unit = f" {UNITS.get(change.metric.unit, change.metric.unit)}" if change.metric.unit else ""
    return f"{change.metric.label} {figure}{unit} (δ {delta}{from_which})"


def _beyond(change: FigureChange, *, gain: bool = False) -> tuple[bool, float]:
    """How far the interval's lower end is beyond δ, in units of δ; what is clear comes first. Of a gain, its upper."""
    end = change.high if gain else change.low
    end = change.deterioration if end is None else end
    return change.clear, (end - (change.delta or 0.0)) / (change.delta or 1.0)
