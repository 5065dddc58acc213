"""Tables of the report, as text entries that every format renders alike.

Each number is printed from the results with the metric's own decimals; nothing is rounded before. A table is a list of
fields, each a head and what it shows of a model; rows and fields without any number are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from rgbench.evaluate.results import ModelResult
from rgbench.judge.compare import MIN_SEEDS, PLANES, spectral_distance
from rgbench.judge.models import LCD, Column, Model, ResultSet
from rgbench.judge.paired import Delta, delta
from rgbench.judge.verdict import GOLD, QUESTIONS, REWARD, Finding, Verdict
from rgbench.metrics.oracle import NUM_MATCHED
from rgbench.metrics.values import Family
from rgbench.report.words import (
    ARROWS,
    MISSING,
    about_change,
    about_finding,
    about_value,
    ends,
    format_number,
    format_value,
    lead_columns,
    names,
    shown,
    shown_change,
    shown_finding,
    trend,
    verdicts_of,
)

LABELS = ("Model", "Runs")
IN_ORDER = (GOLD, *(question for question in QUESTIONS if question is not GOLD))
NUM_HEADLINES = 2  # metrics of one family among the headlines
MAIN = ("verdict", "declared")  # tables that the page does not fold away
PROBES = ("spectrum", "pixel-and-colour", "fragility", "spectral-distance", "octave-gaps-db")  # keys, in part
ASIDE = (Family.ORACLE, Family.PEOPLE, Family.HELD_OUT, Family.REWARD)  # shown beside what verdicts declare
MARKS = "†‡§¶"  # in the order of their notes
TRAINED = "† trained on this reward model, so this is no evidence of better images."
UNPAIRED = "¶ not paired: the two intervals are added in quadrature, which is usually too wide."
FLAGS = {
    "n<=d": "n<=d, no more images than features, so the covariance is singular",
    "reference n<=d": "reference n<=d, no more real images than features, so their covariance is singular",
    "simulated raters": "simulated raters, not people, voted",
    "real images were lossy": "real images were lossy; compare models with each other, not with 0",
}
COSTS = {
    "train_wall_sec": ("Training time", "s", 0),
    "train_cpu_sec": ("Training CPU time", "CPU s", 0),
    "train_gpu_sec": ("Training GPU time", "GPU s", 0),
    "peak_rss_gib": ("Peak memory", "GiB", 2),
    "peak_gpu_gib": ("Peak GPU memory", "GiB", 2),
    "reward_calls": ("Reward calls", "images", 0),
    "selection_kl": ("KL of choosing the best of n, at most", "nats", 2),
    "nfe": ("NFE", "UNet passes/image", 0),
    "generate_images_per_sec": ("Generation", "images/s", 1),
}
DETAILS = {  # by key of a result's extra: caption, note
    "groups": (
        "By group of prompts",
        "Means over each group's own images; heldout prompts combine attributes that no model was trained on.",
    ),
    "octave_gaps_db": (
        "Energy gap to real per octave",
        "An even rise over all bands is contrast, a rise of the last ones noise, a fall blur.",
    ),
    "classifiers_agree": (
        "Agreement of the oracle",
        "How far the oracle's attribute classifiers agree on these images; do not trust the oracle where this is low.",
    ),
    "render_and_match_agrees": (
        "Agreement of render-and-match",
        f"How far render-and-match, which learns nothing, reads what the oracle votes, on the first "
        f"{NUM_MATCHED} images; do not trust the oracle where this is low.",
    ),
    "split_half_null": (
        "Split-half null",
        "The distance between two halves of the reference: real against real.",
    ),
}
VERDICT_NOTES = (
    "▲ up, ▼ down or worse, = neither, corrected for all declared metrics (Holm over a method's common seeds, "
    "Bonferroni for one run against the spread of seeds). Only reward and gold are tested for better: the others have "
    "no mark where they are not worse, and ↑, ↓ or →0 says which way is better. Changes keep their sign, with the 95 % "
    "interval.",
    TRAINED,
)
DELTA_NOTE = (
    "Model minus baseline with the 95 % interval of the difference: a t interval over common seeds, one run against "
    "the spread of the baseline's seeds, or paired over images. ▲ better, ▼ worse, = no clear change, each metric by "
    "itself: of 20 without a change about one is marked. Verdicts correct for that."
)
BEST_NOTE = (
    f"Bold: the best value of its column, over at least {MIN_SEEDS} training seeds, where its interval overlaps no "
    "other row's."
)
SPECTRAL_NOTE = (
    "Root mean square over rings of the difference of two mean spectra; 0 for equal spectra alone, so luck keeps it "
    "above 0. ± half the 95 % interval: over common training seeds, or leaving out groups of prompts. LCD's own row, "
    "to LCD: the mean over pairs of its training seeds."
)
SHA256 = re.compile(r"\b[0-9a-f]{40,64}\b")
SHORT_HASH = 12


@dataclass(frozen=True)
class Head:
    """Head of a field: ``label (unit) arrow`` and the protocol's footnote number; `about` explains the metric."""

    label: str
    unit: str = ""
    arrow: str = ""
    note: int | None = None
    about: str = ""

    @property
    def text(self) -> str:
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.label}{unit}{' ' + self.arrow if self.arrow else ''}"


class Entry(NamedTuple):
    """What is printed in one place of a table.

    Attributes:
        text: value and interval.
        number: the unrounded value; None where there is none.
        low: of its interval.
        high: likewise.
        best: whether it is set in bold.
        trend: as :func:`rgbench.report.words.trend` says.
        sources: folders of the results that it was made from.
        notes: footnotes, each beginning with its mark.
        about: what is shown on hover.
    """

    text: str
    number: float | None = None
    low: float | None = None
    high: float | None = None
    best: bool = False
    trend: str = ""
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    about: str = ""

    @property
    def marks(self) -> str:
        return "".join(dict.fromkeys(note[0] for note in self.notes))


class Field(NamedTuple):
    """One field of a table: its head, and what it shows of a model."""

    head: Head
    entry: Callable[[Model], Entry]


@dataclass(frozen=True)
class Table:
    """Caption, heads, rows of (label texts, entries), and footnotes."""

    key: str
    caption: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Entry, ...]], ...]
    notes: tuple[str, ...] = ()

    def is_trained_on(self, place: int) -> bool:
        """Whether a column is a reward that some row was trained on."""
        return any(TRAINED in entries[place].notes for _, entries in self.rows)

    @property
    def part(self) -> str:
        """Of the page: "main", or "probes" or "metrics", which it folds away."""
        if self.key in MAIN:
            return "main"
        return "probes" if self.key.endswith(PROBES) else "metrics"


def all_tables(results: ResultSet, verdicts: Sequence[Verdict], metrics: Sequence[str] = ()) -> list[Table]:
    """Verdicts, declared metrics, then each family with its differences to LCD and to the teacher, details, cost.

    Args:
        results: of one world.
        verdicts: on its models.
        metrics: names of those to show; all, and the declared ones first, by default.
    """
    columns = [column for column in results.columns if not metrics or column.metric in metrics]
    lead = columns if metrics else declared(results)
    built = [
        verdict_table(results, verdicts),
        value_table(results, "declared", "Metrics" if metrics else "Declared metrics", lead),
    ]
    built += delta_tables(results, lead)
    for family in dict.fromkeys(column.family for column in columns):
        rest = [column for column in columns if column.family is family and column not in lead]
        built.append(value_table(results, f"more-{_slug(family)}", f"More of {family}", rest))
        built += delta_tables(results, rest, family)
    if not metrics:
        built += [spectral_table(results), *detail_tables(results)]
    return [table for table in (*built, cost_table(results)) if table is not None]


def declared(results: ResultSet) -> list[Column]:
    """The metric of each question that verdicts declare, people, a held-out and the trained reward."""
    asked = {metric for question in QUESTIONS for metric in question.metrics}
    leads = [lead_column(results, family) for family in Family]
    found = [column for column in leads if column and (column.metric in asked or column.family in ASIDE)]
    found += [column for column in (results.trained_reward(),) if column is not None]
    shown = {column.metric for column in found or leads if column}
    return [column for column in results.columns if column.metric in shown]


def headlines(results: ResultSet) -> list[Column]:
    """Of each family the metrics that verdicts declare, then its first ones."""
    chosen: dict[Family, list[str]] = {}
    for column in lead_columns(results.columns):
        metrics = chosen.setdefault(column.family, [])
        if column.metric not in metrics and len(metrics) < NUM_HEADLINES:
            metrics.append(column.metric)
    return [column for column in results.columns if column.metric in chosen[column.family]]


def lead_column(results: ResultSet, family: Family) -> Column | None:
    """The column that stands for a family: what verdicts declare, or its first; None where nothing was measured."""
    return results.column(*(c.metric for c in lead_columns(c for c in results.columns if c.family is family)))


def verdict_table(results: ResultSet, verdicts: Sequence[Verdict]) -> Table | None:
    """One row for each verdict: on a method, or on one run of it."""
    columns = {column.key: column for column in results.columns}
    rows = []
    for verdict in (verdict for verdict in verdicts if verdict.findings):
        model = next(model for model in results.models if verdict in verdicts_of(model, verdicts))
        against = f"{verdict.base}; {f'{verdict.num_seeds} in common' if verdict.rule == 'method' else 'one run'}"
        found = {finding.question: finding for finding in verdict.findings}
        entries = (_finding_entry(found.get(question.name), columns) for question in IN_ORDER)
        labels = names(results)[model], model.label if verdict.model == verdict.method else verdict.model
        rows.append((labels, (Entry(verdict.outcome.value), *entries, Entry(against))))
    heads = ("Verdict", *(question.name.capitalize() for question in IN_ORDER), "Compared with")
    return Table("verdict", "Verdicts", tuple(map(Head, heads)), tuple(rows), VERDICT_NOTES) if rows else None


def _finding_entry(finding: Finding | None, columns: Mapping[tuple[str, str], Column]) -> Entry:
    if finding is None:
        return Entry(MISSING)
    column = columns[finding.metric, finding.protocol]
    text, about = shown_finding(finding, column), about_finding(finding, column)
    if finding.question == REWARD.name:
        return Entry(text, notes=(TRAINED,), about=about)
    return Entry(text, trend={"up": "better", "": ""}.get(finding.says, "worse"), about=about)


def value_table(results: ResultSet, key: str, caption: str, columns: Sequence[Column]) -> Table | None:
    """Values of every model, with their intervals."""
    columns = [column for column in columns if results.num_models(column)]  # not those of checkpoints alone
    best = {column: _best(results, column) for column in columns}

    def field(column: Column) -> Field:
        return Field(
            head_of(results, column), lambda model: _value_entry(results, model, column, best[column] is model)
        )

    notes = (*_interval_notes(results, columns), *[BEST_NOTE] * any(each is not None for each in best.values()))
    return _table(results, key, caption, map(field, columns), notes, _two_protocols(results, columns))


def _best(results: ResultSet, column: Column) -> Model | None:
    """The model with the best value of all, over enough training seeds, whose interval overlaps no other's."""
    values = {model: value for model in results.models if (value := model.value(column)) is not None}
    if not column.has_good_end or len(values) < 2:
        return None
    best = max(values, key=lambda model: column.oriented(values[model].value or 0) or 0)
    own = values.pop(best)
    low, high = ends(own)
    if low is None or high is None or own.in_sample or len(best.seeds(column)) < MIN_SEEDS:
        return None
    others = [ends(value) for value in values.values()]
    apart = all(a is not None and b is not None and (b < low or a > high) for a, b in others)
    return best if apart else None


def _value_entry(results: ResultSet, model: Model, column: Column, best: bool) -> Entry:
    value, seeds = model.value(column), model.seeds(column)
    if value is None:
        return Entry(MISSING)
    notes = [TRAINED] * value.in_sample
    notes += [f"‡ flagged by the evaluation: {FLAGS.get(flag, flag)}." for flag in value.flags]
    if len(seeds) < len(model.results):
        notes.append(f"§ {names(results)[model]} has {len(seeds)} of {len(model.results)} seeds in {column.label}.")
    text, about, sources = shown(value, column), about_value(value, column), _sources(model, column)
    return Entry(text, value.value, *ends(value), best, sources=sources, notes=tuple(notes), about=about)


def delta_tables(results: ResultSet, columns: Sequence[Column], family: Family | None = None) -> list[Table | None]:
    """Differences to LCD and to the teacher; of a family's further metrics, or of the first table's."""
    kinds: dict[str, tuple[str, Callable[[Model], Model | None]]] = {
        "lcd": (f"Difference to {results.base or 'LCD'}", results.baseline),
        "teacher": ("Difference to the teacher", lambda _: None if results.base else results.teacher),
    }
    found = []
    for kind, (caption, base_of) in kinds.items():

        def field(column: Column, base_of: Callable[[Model], Model | None] = base_of) -> Field:
            return Field(head_of(results, column), lambda model: _delta_entry(model, base_of(model), column))

        key, name = (f"delta-{kind}-{_slug(family)}", f"{caption}: {family}") if family else (f"delta-{kind}", caption)
        found.append(_table(results, key, name, map(field, columns), (DELTA_NOTE,)))
    return found


def _delta_entry(model: Model, base: Model | None, column: Column) -> Entry:
    change = delta(model, base, column) if base is not None and base is not model else None
    value = model.value(column)
    if change is None or value is None:
        return Entry(MISSING)
    notes = (*[TRAINED] * value.in_sample, *[UNPAIRED] * (change.basis == "quadrature"))
    how, sources = trend(change, value.in_sample), _sources(model, column)
    text, about, numbers = shown_change(change), about_change(change), (change.value, change.low, change.high)
    return Entry(text, *numbers, trend=how, sources=sources, notes=notes, about=about)


def spectral_table(results: ResultSet) -> Table | None:
    """How far each model's spectrum is from the teacher's and from LCD's.

    The distance to real images is a metric of its own; the difference of two such distances is no distance between the
    two models, which may be far from real in different ways.
    """
    columns = [column for column in results.columns if column.family is Family.SPECTRUM]

    def field(whom: str, base_of: Callable[[Model], Model | None], plane: str) -> Field:
        head = Head(f"{plane.capitalize()}, to {whom}", "dB", "↓")
        return Field(head, lambda model: _distance_entry(model, base_of(model), columns, plane))

    bases = {
        "the teacher": lambda _: results.teacher,
        results.base or "LCD": lambda model: (
            model if model.method == LCD and not results.base else results.baseline(model)
        ),
    }
    fields = [field(whom, base_of, plane) for whom, base_of in bases.items() for plane in PLANES]
    return _table(results, "spectral-distance", "Log-spectral distance to other models", fields, (SPECTRAL_NOTE,))


def _distance_entry(model: Model, base: Model | None, columns: Sequence[Column], plane: str) -> Entry:
    if base is None:
        return Entry(MISSING)
    found: Iterable[Delta | None] = (spectral_distance(model, base, column, plane) for column in columns)
    distance = next((each for each in found if each is not None), None)
    if distance is None:
        return Entry(MISSING)
    value, low, high = distance.value, distance.low, distance.high
    return Entry(format_value(value, low, high, distance.column.decimals), value, low, high)


def cost_table(results: ResultSet) -> Table | None:
    """What each model cost to train and to sample."""
    several = any(len(model.results) > 1 for model in results.models)
    notes = ("Mean over training seeds.",) if several else ()
    return _table(results, "cost", "Cost", map(cost_field, COSTS), notes)


def cost_field(key: str) -> Field:
    """Mean over training seeds of one cost."""
    label, unit, decimals = COSTS[key]

    def entry(model: Model) -> Entry:
        found = (result.head.cost.get(key) for result in model.results.values())
        return _mean_entry([value for value in found if value is not None], decimals)

    return Field(Head(label, unit), entry)


def detail_tables(results: ResultSet) -> list[Table | None]:
    """Numbers that results keep beside the values of the first table."""
    found = details(results, headlines(results))
    return [
        _table(results, _slug(key), caption, [field for part, _, field in found if part == key], (note,))
        for key, (caption, note) in DETAILS.items()
    ]


def details(results: ResultSet, columns: Sequence[Column]) -> list[tuple[str, Column, Field]]:
    """Numbers beside the values of some columns: the key of their extra, the column, and how they are shown.

    What every column of an oracle or of a spectrum holds alike is there once.
    """
    found: dict[tuple[str, str, str], tuple[str, Column, Field]] = {}
    for key in DETAILS:
        for column in columns:
            whose = column.protocol.id if key in ("groups", "split_half_null") else ""
            for part in dict.fromkeys(part for model in results.models for part in _held(model, column, key)):
                field = _detail_field(results, column, key, part)
                found.setdefault((key, whose, part), (key, column, field))
    return list(found.values())


def _detail_field(results: ResultSet, column: Column, key: str, part: str) -> Field:
    note = protocol_numbers(results)[column.protocol.id]
    head, decimals = Head(f"{column.label}{f', {part}' if part else ''}", column.unit, "", note), column.decimals
    if key == "octave_gaps_db":
        head, decimals = Head(octave_name(part), "dB", "→0", note), 2
    elif key == "classifiers_agree":
        head, decimals = Head("Classifiers agree", "%", "↑", note), 1
    elif key == "render_and_match_agrees":
        head, decimals = Head("Render-and-match agrees", "%", "↑", note), 1

    def entry(model: Model) -> Entry:
        return _mean_entry(_held(model, column, key).get(part, ()), decimals, signed=key == "octave_gaps_db")

    return Field(head, entry)


def _held(model: Model, column: Column, key: str) -> dict[str, list[float]]:
    """Numbers of an extra over training seeds, by their names in it; by "" where it is one number."""
    found: dict[str, list[float]] = {}
    for seed in model.seeds(column):
        value = model.result(column, seed)
        held = value.extra.get(key) if value is not None else None
        for part, number in (held if isinstance(held, Mapping) else {"": held}).items():
            if isinstance(number, int | float):
                found.setdefault(part, []).append(number)
    return found


def octave_name(name: str) -> str:
    """A band's ends as fractions.

    >>> octave_name("0.125-0.25")
    '1/8 to 1/4'
    """
    low, high = (Fraction(end).limit_denominator(4096) for end in name.split("-"))
    return f"{low} to {high}"


def _mean_entry(numbers: Sequence[float], decimals: int, *, signed: bool = False) -> Entry:
    if not numbers:
        return Entry(MISSING)
    mean = math.fsum(numbers) / len(numbers)
    return Entry(format_number(mean, decimals, signed=signed), mean)


# What tables share


def _table(
    results: ResultSet, key: str, caption: str, fields: Iterable[Field], notes: Sequence[str], last: Sequence[str] = ()
) -> Table | None:
    """A table of those rows and fields that have a number, with the footnotes of their marks; None without any."""
    fields = list(fields)
    rows = [(labels_of(results, model), [field.entry(model) for field in fields]) for model in results.models]
    rows = [(labels, entries) for labels, entries in rows if any(entry.number is not None for entry in entries)]
    kept = [i for i in range(len(fields)) if any(entries[i].number is not None for _, entries in rows)]
    body = tuple((labels, tuple(entries[i] for i in kept)) for labels, entries in rows)
    marked = dict.fromkeys(note for _, entries in body for entry in entries for note in entry.notes)
    footnotes = (*notes, *sorted(marked, key=lambda note: MARKS.index(note[0])), *last)
    return Table(key, caption, tuple(fields[i].head for i in kept), body, footnotes) if body else None


def labels_of(results: ResultSet, model: Model) -> tuple[str, ...]:
    """What `LABELS` heads."""
    return names(results)[model], model.label


def head_of(results: ResultSet, column: Column) -> Head:
    """The metric with its unit, the arrow of its good end, and its protocol."""
    arrow = ARROWS[column.info.direction] if column.has_good_end else ""
    return Head(column.label, column.unit, arrow, protocol_numbers(results)[column.protocol.id], column.info.about)


def _sources(model: Model, column: Column) -> tuple[str, ...]:
    return tuple(place_of(model.results[seed]) for seed in model.seeds(column))


def place_of(result: ModelResult) -> str:
    """Folder of a result: world/model/generation."""
    return f"{result.head.world}/{result.head.model}/{result.head.generation.id}"


def _interval_notes(results: ResultSet, columns: Sequence[Column]) -> Iterable[str]:
    yield _images(results, columns)
    found = [(model.seeds(column), model.value(column)) for model in results.models for column in columns]
    methods = {value.interval.method for seeds, value in found if value and value.interval and len(seeds) == 1}
    if methods:
        yield (
            f"± half the 95 % interval over images ({'; '.join(sorted(methods))}). It ignores run-to-run variation, so "
            "rows with one training seed are never bold."
        )
    several = {len(seeds) for seeds, _ in found if len(seeds) > 1}
    if several:
        yield "Several training seeds: mean ± half the 95 % t interval over seeds."
    if any(num < MIN_SEEDS for num in several):
        yield f"Rows with fewer than {MIN_SEEDS} training seeds are never bold: a test over so few says little."


def _images(results: ResultSet, columns: Sequence[Column]) -> str:
    """How many images are behind the values."""
    several = " of each training seed" if any(len(model.results) > 1 for model in results.models) else ""
    behind: dict[str, list[str]] = {}
    for column in columns:
        found = {v.num_images for m in results.models for seed in m.results if (v := m.result(column, seed))}
        behind.setdefault(" or ".join(map(str, sorted(found))), []).append(column.label)
    if len(behind) == 1:
        return f"{next(iter(behind))} images{several}."
    parts = "; ".join(f"{nums} for {', '.join(dict.fromkeys(labels))}" for nums, labels in behind.items())
    return f"Images{several}: {parts}."


# Protocols


@lru_cache(maxsize=16)
def protocols(results: ResultSet) -> dict[str, Mapping[str, Any]]:
    """Fields of each protocol by its id, in the order of the columns."""
    return {column.protocol.id: column.protocol.fields for column in results.columns}


@lru_cache(maxsize=16)
def protocol_numbers(results: ResultSet) -> dict[str, int]:
    """Footnote number of each protocol id."""
    return {name: i for i, name in enumerate(protocols(results), start=1)}


def protocol_notes(results: ResultSet) -> list[str]:
    """One line for each distinct set of fields, with the numbers and ids of the protocols that have it."""
    numbers = protocol_numbers(results)
    found: dict[str, list[str]] = {}
    for name, fields in protocols(results).items():
        text = "; ".join(f"{key}: {value}" for key, value in flatten(fields).items()) or "no fields recorded"
        found.setdefault(text, []).append(f"{numbers[name]} {name}")
    return [f"{', '.join(ids)}: {text}" for text, ids in found.items()]


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as dotted keys with printable values; hashes cut to 12 digits.

    >>> flatten({"prompts": {"num": 2048}, "antialias": True, "jpeg": None})
    {'prompts.num': '2048', 'antialias': 'true', 'jpeg': 'none'}
    """
    flat: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, bool):
            flat[prefix + key] = {None: "none", True: "true", False: "false"}[value]
        else:
            flat[prefix + key] = SHA256.sub(lambda match: match[0][:SHORT_HASH], str(value))
    return flat


def _two_protocols(results: ResultSet, columns: Sequence[Column]) -> list[str]:
    """Which metrics have several columns, and the fields in which those protocols differ."""
    numbers = protocol_numbers(results)
    pairs: dict[str, list[str]] = {}
    for metric in dict.fromkeys(column.metric for column in columns):
        first, *others = [column for column in columns if column.metric == metric]
        for other in others:
            one, two = flatten(first.protocol.fields), flatten(other.protocol.fields)
            keys = [key for key in one | two if one.get(key) != two.get(key)]
            fields = ", ".join(f"{key} ({one.get(key, MISSING)} against {two.get(key, MISSING)})" for key in keys)
            pair = f"{first.label} ({numbers[first.protocol.id]} and {numbers[other.protocol.id]})"
            pairs.setdefault(fields or "their ids alone", []).append(pair)
    return [
        f"Two columns, because the protocols differ in {fields}: {', '.join(found)}. Do not compare across them."
        for fields, found in pairs.items()
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
