"""The comparison in words: what each trained reward did, and what the other evidence did beside it.

The words follow the intervals. "Rose" and "fell" are said only where the interval of
the difference leaves zero; the sentence that weighs the evidence is cautious on
purpose, for the formal verdict needs the spread between LCD seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rgbench.evaluation.verdict_file import Verdict
from rgbench.reporting.contrast import MIN_SEEDS, Contrast, contrast
from rgbench.reporting.gather import Column, Comparison, Row
from rgbench.reporting.tables import format_figure, format_number
from rgbench.reporting.verdicts import verdict_tone, verdict_words, verdicts_of

WITNESSES = ("oracle_all", "fd_efflite0", "fid", "hfer_gap_db", "band_gap_db")


@dataclass(frozen=True)
class Reading:
    """One method against LCD: `tone` is "worse", "mixed", "better", "flat" or "none".

    `verdict` is what `rgbench verdict` found, or nothing.
    """

    title: str
    facts: tuple[str, ...]
    weighing: str
    tone: str
    verdict: str = ""


def readings(comparison: Comparison, verdicts: Sequence[Verdict] = ()) -> list[Reading]:
    """One reading per student that is not the LCD baseline itself; a formal verdict sets its tone."""
    read = []
    for row in comparison.rows:
        if row.method not in ("teacher", "lcd"):
            found = verdicts_of(verdicts, row)
            reading = _read(comparison, row)
            formal = verdict_tone(found)
            read.append(replace(reading, verdict=verdict_words(found), tone=formal or reading.tone))
    return read


def _read(comparison: Comparison, row: Row) -> Reading:
    base = comparison.lcd(row)
    if base is None:
        text = "There is no LCD student at these sampler settings, so there is nothing to compare this one with."
        return Reading(row.name, (), text, "none")
    rewards, witnesses = [], []
    for column in comparison.columns:
        figure = row.figure(column)
        difference = contrast(row, base, column)
        if figure is None or difference is None:
            continue
        if figure.in_sample:
            rewards.append((column, difference))
        elif column.metric.name in WITNESSES:
            witnesses.append((column, difference))
    facts = [_fact(column, difference, trained=True) for column, difference in rewards]
    facts += [_fact(column, difference, trained=False) for column, difference in witnesses]
    title = f"{row.short_name} against {base.short_name}, {row.sampler_label}"
    if not facts:
        return Reading(title, (), "It shares no protocol with LCD, so there is nothing to compare.", "none")
    weighing, tone = _weigh(rewards, witnesses)
    return Reading(title, tuple(facts), f"{weighing} {_caution(row, base)}", tone)


def _fact(column: Column, difference: Contrast, *, trained: bool) -> str:
    metric = column.metric
    change = format_figure(difference.value, difference.low, difference.high, metric.decimals, signed=True)
    ends = [format_number(value, metric.decimals) for value in (difference.base, difference.row)]
    unit = f" {metric.unit}" if metric.unit else ""
    name = f"{metric.label}{' (trained on, †)' if trained else ''}"
    if not difference.clear:
        return f"{name}: no clear change, {ends[0]} to {ends[1]}{unit} ({change})."
    verb = "rose" if difference.value > 0 else "fell"
    if trained:
        return f"{name}: {verb} from {ends[0]} to {ends[1]}{unit} ({change})."
    side = "better" if difference.gain > 0 else "worse"
    if metric.direction == "target":
        side = "nearer to real" if difference.gain > 0 else "further from real"
    return f"{name}: {verb} from {ends[0]} to {ends[1]}{unit} ({change}), {side}."


def _weigh(rewards: list[tuple[Column, Contrast]], witnesses: list[tuple[Column, Contrast]]) -> tuple[str, str]:
    clear = [(column, difference) for column, difference in witnesses if difference.clear]
    worse = list(dict.fromkeys(column.metric.family for column, difference in clear if difference.gain < 0))
    better = list(dict.fromkeys(column.metric.family for column, difference in clear if difference.gain > 0))
    if not rewards:
        return "No reward that it was trained on was measured under a protocol that LCD has too.", "none"
    if not any(difference.clear and difference.gain > 0 for _, difference in rewards):
        return "The reward it was trained on did not clearly rise.", "worse" if worse else "flat"
    if not witnesses:
        return (
            "The trained reward rose, and nothing independent was measured: this says nothing about the images.",
            "none",
        )
    if len(worse) >= 2 and not better:
        text = f"The trained reward rose while {_join(worse)} got worse: the pattern of over-optimisation."
        return text, "worse"
    if worse and better:
        return (
            f"The trained reward rose; {_join(better)} got better and {_join(worse)} got worse: mixed evidence.",
            "mixed",
        )
    if worse:
        return f"The trained reward rose while {_join(worse)} got worse: a warning, from one kind of evidence.", "mixed"
    if better:
        return (
            f"The trained reward rose and {_join(better)} got better with it; nothing measured got clearly worse.",
            "better",
        )
    return "The trained reward rose and nothing independent moved clearly, either way.", "flat"


def _caution(row: Row, base: Row) -> str:
    seeds = min(len(row.members), len(base.members))
    if seeds >= MIN_SEEDS:
        return f"{seeds} training seeds each, paired by seed."
    if seeds == 1:
        return (
            "One training seed each: the intervals cover the images drawn, not the luck of training, "
            "so this describes these two runs and not yet the two methods."
        )
    return f"{seeds} training seeds each, fewer than the {MIN_SEEDS} that a claim about the methods needs."


def _join(families: list[str]) -> str:
    names = [f"the {name}" for name in families]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
