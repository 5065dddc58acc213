"""The comparison in words: what each trained reward did, and what the other evidence did beside it.

The words follow the intervals. "Rose" and "fell" are said only where the interval of
the difference leaves zero; the sentence that weighs the evidence is cautious on
purpose, for the formal verdict needs the spread between LCD seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rgbench.evaluation.paired import Paired
from rgbench.evaluation.statistics import Wins
from rgbench.evaluation.verdict import MIN_WORSE, trained_keys
from rgbench.evaluation.verdict_file import Verdict
from rgbench.evaluation.verdict_words import UNITS
from rgbench.metrics.contract import Metric
from rgbench.reporting.contrast import MIN_SEEDS, Contrast, contrast, win_rate
from rgbench.reporting.digits import format_figure, format_number, places_worth
from rgbench.reporting.gather import Column, Comparison, Figure, Row
from rgbench.reporting.trajectory import trajectories
from rgbench.reporting.verdicts import TONES, verdict_label, verdict_name, verdict_words, verdicts_of

WITNESSES = ("oracle_all", "fd_efflite0", "fid", "hfer_gap_db", "band_gap_db")
NOTHING = "nothing to compare with"


@dataclass(frozen=True)
class Weighing:
    """What the facts come to: in a sentence, in a few words, and as the colour of these words."""

    text: str
    label: str
    tone: str


@dataclass(frozen=True)
class Reading:
    """One method against LCD, summed up by `label`; `tone` is "worse", "mixed", "better", "flat" or "none".

    `verdict` is what `rgbench verdict` found, or nothing.
    """

    title: str
    facts: tuple[str, ...]
    weighing: str
    label: str
    tone: str
    verdict: str = ""


def readings(comparison: Comparison, verdicts: Sequence[Verdict] = ()) -> list[Reading]:
    """One reading per student that is not the LCD baseline itself; a formal verdict sets its tone."""
    read = []
    for row in comparison.rows:
        if row.method not in ("teacher", "lcd"):
            found = verdicts_of(verdicts, row)
            name = verdict_name(found)
            reading = replace(_read(comparison, row, judged=bool(name)), verdict=verdict_words(found))
            if name:
                reading = replace(reading, label=f"verdict: {verdict_label(found)}", tone=TONES[name])
            read.append(reading)
    return read


def _read(comparison: Comparison, row: Row, judged: bool) -> Reading:
    """A row's reading; where a verdict weighs the evidence, and more of it, these few figures are not weighed too."""
    base = comparison.lcd(row)
    if base is None:
        text = "There is no LCD student at these sampler settings, so there is nothing to compare this one with."
        return Reading(row.name, tuple(_along(comparison, row)), text, NOTHING, "none")
    figures = {result.metric.name: result for result in row.results if result.value is not None}
    trained = {name for name, _ in trained_keys({(name, ""): result for name, result in figures.items()})}
    rewards, witnesses, facts = [], [], []
    for column in comparison.columns:
        figure = row.figure(column)
        difference = contrast(row, base, column)
        if figure is None or difference is None or not (figure.in_sample or column.metric.name in WITNESSES):
            continue
        facts.append(_fact(column, difference, _role(figure, column.metric.name in trained), row, base))
        if not figure.in_sample:
            witnesses.append((column, difference))
        elif column.metric.name in trained:
            rewards.append((column, difference))
    title = f"{row.short_name} against {base.short_name}, {row.sampler_label}"
    if not facts:
        return Reading(title, (), "It shares no protocol with LCD, so there is nothing to compare.", NOTHING, "none")
    found = _weigh(rewards, witnesses)
    shown = (*facts, *_along(comparison, row))
    text = _caution(row, base) if judged else f"{found.text} {_caution(row, base)}"
    return Reading(title, shown, text[:1].upper() + text[1:], found.label, found.tone)


def _role(figure: Figure, trained: bool) -> str:
    """How a figure stands to the training, as its name is followed by."""
    if not figure.in_sample:
        return ""
    return " (trained on, †)" if trained else " (same reward model, †)"


def _along(comparison: Comparison, row: Row) -> Iterable[str]:
    """Of each of the row's runs whose checkpoints were evaluated: its hack step, or that there is none."""
    for run in (run for run in trajectories(comparison) if run.row is row):
        if run.proxy is None or run.gold is None:
            continue
        proxy, gold = (run.columns[name].metric for name in (run.proxy, run.gold))
        hack = run.hack
        if hack is None:
            yield (
                f"Along training, {run.model}, {len(run.points)} steps evaluated: at none does {gold.label} clearly "
                f"peak while {proxy.label} still rises."
            )
            continue
        fall, rise = _change(hack.loss, gold), _change(hack.gain, proxy)
        stretch = f" ({hack.first} to {hack.end})" if hack.first != hack.end else ""
        yield (
            f"Along training, {run.model}: hack step {hack.step}{stretch}{' or before' if hack.censored else ''}; from "
            f"there to step {hack.last} {gold.label} falls by {fall} while {proxy.label} rises by {rise}."
        )


def _change(found: Paired, metric: Metric) -> str:
    figure = format_figure(found.value, found.low, found.high, metric.decimals)
    return f"{figure} {UNITS.get(metric.unit, metric.unit)}".strip()


def _fact(column: Column, difference: Contrast, role: str, row: Row, base: Row) -> str:
    metric = column.metric
    change = format_figure(difference.value, difference.low, difference.high, metric.decimals, signed=True)
    places = places_worth(difference.low, difference.high, metric.decimals)
    ends = [format_number(value, places) for value in (difference.base, difference.row)]
    unit = f" {metric.unit}" if metric.unit else ""
    wins = win_rate(row, base, column) if role else None
    share = f", higher on {_percent(wins)} of the prompts" if wins is not None else ""
    if not difference.clear:
        return f"{metric.label}{role}: no clear change, {ends[0]} to {ends[1]}{unit} ({change}){share}."
    verb = "rose" if difference.value > 0 else "fell"
    if not role and column.level:
        share = f", away from {base.method_label}"
    elif not role and metric.direction == "target":
        share = ", nearer to real" if difference.gain > 0 else ", further from real"
    elif not role:
        share = ", better" if difference.gain > 0 else ", worse"
    return f"{metric.label}{role}: {verb} from {ends[0]} to {ends[1]}{unit} ({change}){share}."


def _percent(wins: Wins) -> str:
    """Such as ``63 % [61, 65]``."""
    rate, low, high = (f"{100 * share:.0f}" for share in (wins.rate, wins.interval.low, wins.interval.high))
    return f"{rate} % [{low}, {high}]"


def _weigh(rewards: list[tuple[Column, Contrast]], witnesses: list[tuple[Column, Contrast]]) -> Weighing:
    clear = [(column, difference) for column, difference in witnesses if difference.clear]
    worse = list(dict.fromkeys(column.metric.family for column, difference in clear if difference.gain < 0))
    better = list(dict.fromkeys(column.metric.family for column, difference in clear if difference.gain > 0))
    if not rewards:
        return Weighing(
            "No reward that it was trained on was measured under a protocol that LCD has too.", NOTHING, "none"
        )
    if not any(difference.clear and difference.gain > 0 for _, difference in rewards):
        fell = any(difference.clear for _, difference in rewards)
        return _without_gain("fell" if fell else "did not clearly rise", worse, better)
    if not witnesses:
        text = "The trained reward rose, and nothing independent was measured: this says nothing about the images."
        return Weighing(text, "nothing independent measured", "none")
    return _with_gain(worse, better)


def _without_gain(verb: str, worse: list[str], better: list[str]) -> Weighing:
    """The trained reward is not up, so whatever happened to the images is no over-optimisation."""
    start = f"The reward it was trained on {verb}"
    if worse and better:
        text = f"{start}; {_join(better)} got better and {_join(worse)} got worse."
        return Weighing(text, "no gain in reward, mixed evidence", "mixed")
    if worse:
        text = f"{start}, and {_join(worse)} got worse: a loss without a gain."
        return Weighing(text, "no gain in reward, worse images", "worse")
    if better:
        return Weighing(f"{start}, and {_join(better)} got better.", "no gain in reward, better images", "better")
    return Weighing(f"{start}, and nothing independent moved clearly.", "no clear effect", "flat")


def _with_gain(worse: list[str], better: list[str]) -> Weighing:
    if len(worse) >= MIN_WORSE:
        text = f"The trained reward rose while {_join(worse)} got worse: the pattern of over-optimisation."
        relief = f" {_join(better).capitalize()} got better." if better else ""
        return Weighing(text + relief, "reads like over-optimisation", "worse")
    if worse and better:
        text = f"The trained reward rose; {_join(better)} got better and {_join(worse)} got worse: mixed evidence."
        return Weighing(text, "mixed evidence", "mixed")
    if worse:
        text = f"The trained reward rose while {_join(worse)} got worse: a warning, from one kind of evidence."
        return Weighing(text, "a warning, from one kind of evidence", "mixed")
    if better:
        text = f"The trained reward rose and {_join(better)} got better with it; nothing measured got clearly worse."
        return Weighing(text, "consistent with better images", "better")
    return Weighing(
        "The trained reward rose and nothing independent moved clearly, either way.", "no clear effect", "flat"
    )


def _caution(row: Row, base: Row) -> str:
    own, others = len(row.members), len(base.members)
    seeds = min(own, others)
    counted = f"{own} training seeds each" if own == others else f"{own} against {others} training seeds"
    if seeds >= MIN_SEEDS:
        return f"{counted}, paired by seed."
    if own == others == 1:
        return (
            "One training seed each: the intervals cover the images drawn, not the luck of training, "
            "so this describes these two runs and not yet the two methods."
        )
    if seeds == 1:
        return f"{counted}: a single run on one side, so this does not yet describe the two methods."
    return f"{counted}, fewer than the {MIN_SEEDS} that a claim about the methods needs."


def _join(families: list[str]) -> str:
    names = [f"the {name}" for name in families]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
