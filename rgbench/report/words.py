"""The comparison in words: what each trained reward did, and what the other evidence did beside it.

The words follow the intervals. "Rose" and "fell" are said only where the interval of
the difference leaves zero; the sentence that weighs the evidence is cautious on
purpose, for the formal verdict needs the spread between LCD seeds.

Verdicts of ``rgbench verdict`` in the report: in words, and as a table of families with their thresholds.

A run's figures along its training: the trained reward (proxy) beside what it was not trained on (gold).

The points are the results of a run's checkpoints (``rgbench eval --checkpoints``) and of
the finished model, under one protocol for each metric; figures of two protocols are never
joined to a curve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from rgbench.evaluate.results import Result
from rgbench.judge.models import (
    MIN_SEEDS,
    Column,
    Comparison,
    Contrast,
    Figure,
    Row,
    column_of,
    contrast,
    sampling_of,
    win_rate,
)
from rgbench.judge.paired import Paired
from rgbench.judge.trajectory import Curve, Hack, find_hack
from rgbench.judge.verdict import FAMILIES, FILE, MIN_WORSE, UNITS, Family, FigureChange, Verdict, trained_keys
from rgbench.metrics.base import Metric
from rgbench.metrics.statistics import Wins
from rgbench.report.tables import (
    LABELS,
    MISSING,
    Cell,
    Heading,
    Table,
    format_figure,
    format_number,
    places_worth,
    row_labels,
)

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
