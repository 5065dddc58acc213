"""The report's tables, as text cells that every format renders alike.

Each figure is printed from the result files' values with the metric's own decimals;
nothing is rounded before, and a figure that is not there is "—".

Figures as text: as many digits as their interval is worth, the same in every format.

Protocol footnotes: what each column was measured under, and where two columns of one metric differ.

Tables of what result files hold beside their value: prompt groups, octave bands, checks on the measurement.

Table of log-spectral distances between models: how far each one's spectrum is from the teacher's and from LCD's.

The distance to real images is a figure of its own; the difference of two such figures is no distance between the two
models, which may be far from real in different ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations
from typing import Any

from rgbench.judge.compare import PLANES, SPECTRA, spectral_distance
from rgbench.judge.models import MIN_SEEDS, Column, Comparison, Contrast, Figure, Row, contrast, file_of, leaders
from rgbench.judge.paired import Paired
from rgbench.metrics.reference import LOSSY
from rgbench.metrics.statistics import t_interval

MISSING = "—"


def format_number(value: float, decimals: int, *, signed: bool = False) -> str:
    """`value` with `decimals` places, never "-0.0".

    >>> format_number(-0.004, 2), format_number(3.14159, 2, signed=True)
    ('0.00', '+3.14')
    """
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def format_figure(value: float, low: float | None, high: float | None, decimals: int, *, signed: bool = False) -> str:
    """``value ± half width``, or ``value [low, high]`` where the interval leans by over a tenth of its half width.

    Args:
        value: the figure.
        low: of its interval; None where there is none.
        high: likewise.
        decimals: places at most; fewer where two digits of the half width take fewer.
        signed: with a plus sign, for differences.

    >>> format_figure(191.587, 181.47, 201.71, 2), format_figure(79.553, 79.41, 79.69, 2)
    ('192 ± 10', '79.55 ± 0.14')
    """
    if low is None or high is None:
        return format_number(value, decimals, signed=signed)
    half = (high - low) / 2
    places = places_worth(low, high, decimals)
    text = format_number(value, places, signed=signed)
    if abs((high + low) / 2 - value) > 0.1 * half:
        bounds = (format_number(bound, places, signed=signed) for bound in (low, high))
        return f"{text} [{', '.join(bounds)}]"
    width = format_number(half, places)
    return f"{text} ± {'<' + format_number(10.0**-places, places) if half > 0 and float(width) == 0 else width}"


def places_worth(low: float | None, high: float | None, decimals: int) -> int:
    """Decimal places that show two digits of an interval's half width, at most `decimals`; these without an interval.

    >>> places_worth(123.2, 132.7, 2), places_worth(181, 202, 2), places_worth(None, None, 2)
    (1, 0, 2)
    """
    if low is None or high is None or high <= low:
        return decimals
    return min(decimals, max(0, 1 - math.floor(math.log10((high - low) / 2))))


SHA256 = re.compile(r"\b[0-9a-f]{40,64}\b")
SHORT_HASH = 12


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as dotted keys with printable values; hashes cut to 12 digits.

    >>> flatten({"prompts": {"num": 2048}, "antialias": True, "jpeg": None})
    {'prompts.num': '2048', 'antialias': 'true', 'jpeg': 'none'}
    """
    flat: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _printable(value)
    return flat


def protocol_notes(comparison: Comparison) -> list[str]:
    """One line per distinct set of fields, with the numbers and ids of the protocols that have it."""
    numbers = comparison.protocol_numbers
    protocols = {name: describe(fields) for name, fields in comparison.protocols.items()}
    lines = []
    for fields in dict.fromkeys(protocols.values()):
        named = [f"{numbers[name]} {name}" for name, found in protocols.items() if found == fields]
        lines.append(f"{', '.join(named)}: {fields}")
    return lines


def describe(fields: dict[str, Any]) -> str:
    """A protocol's fields in one line."""
    return "; ".join(f"{key}: {value}" for key, value in flatten(fields).items()) or "no fields recorded"


def differences(comparison: Comparison, columns: list[Column]) -> list[str]:
    """Which metrics have several columns, and the fields in which those protocols differ."""
    numbers = comparison.protocol_numbers
    pairs: dict[str, list[str]] = {}
    for name in dict.fromkeys(column.metric.name for column in columns):
        first, *others = [column for column in columns if column.metric.name == name]
        for other in others:
            pair = f"{first.metric.label} ({numbers[first.protocol_id]} and {numbers[other.protocol_id]})"
            pairs.setdefault(_differing(first, other), []).append(pair)
    return [
        f"Two columns, because the protocols differ in {fields}: {', '.join(found)}. Do not compare across them."
        for fields, found in pairs.items()
    ]


def _differing(first: Column, second: Column) -> str:
    one, two = flatten(first.protocol), flatten(second.protocol)
    keys = [key for key in one | two if one.get(key) != two.get(key)]
    return ", ".join(f"{key} ({one.get(key, '—')} against {two.get(key, '—')})" for key in keys) or "their ids alone"


def _printable(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return SHA256.sub(lambda match: match[0][:SHORT_HASH], str(value))


ARROWS = {"higher": "↑", "lower": "↓", "target": "→"}
NUM_HEADLINES = 2  # metrics of one family in the first table; the family's others follow in a table of their own
MARKS = {
    "†": "in-sample: this model was trained on this very reward model, so the figure is no evidence of better images",
    "‡": "flagged by the evaluation: {flags}",
    "§": "fewer training seeds than the row has: {seeds}",
    "¶": "no pairing available: the two intervals are added in quadrature, usually wider than a paired one",
}
FLAGS = {
    "n<=d": "n<=d, no more images than features, so the covariance is singular",
    LOSSY: f"{LOSSY}, which takes from their high frequencies; compare models with each other, not with 0",
    "reference n<=d": "reference n<=d, no more real images than features, so their covariance is singular",
}
COSTS = (
    ("train_wall_sec", "Training time", "s", 0),
    ("train_cpu_sec", "Training CPU time", "CPU s", 0),
    ("train_gpu_sec", "Training GPU time", "GPU s", 0),
    ("peak_rss_gib", "Peak memory", "GiB", 2),
    ("peak_gpu_gib", "Peak GPU memory", "GiB", 2),
    ("reward_calls", "Reward calls", "images", 0),
    ("nfe", "NFE", "UNet passes/image", 0),
    ("generate_images_per_sec", "Generation", "images/s", 1),
)


@dataclass(frozen=True)
class Heading:
    """A column's head: `label (unit)`, the direction's arrow, the protocol's footnote number."""

    label: str
    unit: str = ""
    arrow: str = ""
    note: int | None = None
    meaning: str = ""

    @property
    def text(self) -> str:
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.label}{unit}{' ' + self.arrow if self.arrow else ''}"


@dataclass(frozen=True)
class Cell:
    """A printed figure.

    `number`, `low` and `high` are the unrounded figure and interval; `rank` is 1 (best),
    2 (second) or 0 (not separated); `trend` of a difference is "better", "worse", of a
    trained reward "higher" or "lower", or "" where the interval holds zero;
    `sources` are the result files it was made from.
    """

    text: str
    number: float | None = None
    low: float | None = None
    high: float | None = None
    marks: str = ""
    rank: int = 0
    trend: str = ""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Caption, heads, rows of (label texts, cells), and the notes that explain the marks."""

    key: str
    caption: str
    labels: tuple[str, ...]
    headings: tuple[Heading, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def is_further(self) -> bool:
        """Whether it holds more than the question needs, and the page may fold it away."""
        return self.key not in ("verdict", "comparison", "delta-lcd", "delta-teacher", "cost")


PROBED = ("spectrum", "pixel and colour", "diversity", "fragility")  # families whose every figure is set beside both
LABELS = ("Method", "Sampler", "Model")


def tables(comparison: Comparison) -> list[Table]:
    """Headline figures, differences to LCD and to the teacher, the families in full."""
    lead = headlines(comparison)
    rest = [column for column in comparison.columns if column not in lead]
    built = [_figures(comparison, "comparison", "Comparison", lead), *_both_deltas(comparison, lead)]
    for family in dict.fromkeys(column.metric.family for column in rest):
        columns = [column for column in rest if column.metric.family == family]
        built.append(_figures(comparison, f"more-{family}".replace(" ", "-"), f"More figures: {family}", columns))
        built += _both_deltas(comparison, columns, family) if family in PROBED else []
    return [table for table in built if table.rows and table.headings]


def headlines(comparison: Comparison) -> list[Column]:
    """The columns of the first table: the first metrics of each family, under each of their protocols."""
    chosen: dict[str, list[str]] = {}
    for column in comparison.columns:
        names = chosen.setdefault(column.metric.family, [])
        if column.metric.name not in names and len(names) < NUM_HEADLINES:
            names.append(column.metric.name)
    return [column for column in comparison.columns if column.metric.name in chosen[column.metric.family]]


def _figures(comparison: Comparison, key: str, caption: str, columns: list[Column]) -> Table:
    ranks = {column.key: leaders(comparison.rows, column) for column in columns}
    rows = []
    for row in comparison.rows:
        cells = []
        for column in columns:
            figure = row.figure(column)
            best, second = ranks[column.key]
            cells.append(_figure_cell(row, column, figure, 1 if row is best else 2 if row is second else 0))
        rows.append((row_labels(row), tuple(cells)))
    used = [(row, column) for row in comparison.rows for column in columns]
    notes = [*_interval_notes(comparison, columns), *_mark_notes(used, rows), *differences(comparison, columns)]
    headings = tuple(_heading(comparison, column) for column in columns)
    return Table(key, f"{caption}, {comparison.world}", LABELS, headings, tuple(rows), tuple(notes))


def _both_deltas(comparison: Comparison, columns: list[Column], family: str = "") -> list[Table]:
    """Differences to LCD and to the teacher; of a family's further figures, or of the first table's."""
    captions = {
        "lcd": "Difference to the LCD student at the same sampler settings",
        "teacher": _teacher_caption(comparison),
    }
    name, slug = (f": {family}", f"-{family.replace(' ', '-')}") if family else ("", "")
    found = [(key, _deltas(comparison, key, caption + name, columns)) for key, caption in captions.items()]
    return [replace(table, key=f"delta-{key}{slug}") for key, table in found]


def _deltas(comparison: Comparison, key: str, caption: str, columns: list[Column]) -> Table:
    base_of: Callable[[Row], Row | None] = comparison.lcd if key == "lcd" else lambda row: comparison.teacher
    rows = []
    for row in comparison.rows:
        base = base_of(row)
        if base is None or base is row:
            continue
        cells = tuple(_delta_cell(row, base, column) for column in columns)
        if any(cell.number is not None for cell in cells):
            rows.append((row_labels(row), cells))
    kept = [i for i in range(len(columns)) if any(cells[i].number is not None for _, cells in rows)]
    rows = [(labels, tuple(cells[i] for i in kept)) for labels, cells in rows]
    notes = _mark_notes([(row, column) for row in comparison.rows for column in columns], rows)
    first = (
        "Row minus baseline, with the 95 % interval of the difference: paired over images or groups of prompts, or by "
        "a t interval where the row has several training seeds (the teacher, trained once, then counts as exact)."
    )
    headings = tuple(_heading(comparison, columns[i]) for i in kept)
    return Table("delta", f"{caption}, {comparison.world}", LABELS, headings, tuple(rows), (first, *notes))


def cost_tables(comparison: Comparison) -> list[Table]:
    """What each row cost to train and to sample; no table where no result says."""
    rows = [(row, [cost(row, key) for key, _, _, _ in COSTS]) for row in comparison.rows]
    kept = [i for i in range(len(COSTS)) if any(values[i] is not None for _, values in rows)]
    headings = tuple(Heading(COSTS[i][1], COSTS[i][2]) for i in kept)
    body = tuple((row_labels(row), tuple(_cost_cell(values[i], COSTS[i][3]) for i in kept)) for row, values in rows)
    several = any(len(row.members) > 1 for row in comparison.rows)
    notes = ("Mean over training seeds.",) if several else ()
    return [Table("cost", f"Cost, {comparison.world}", LABELS, headings, body, notes)] if headings else []


def cost(row: Row, key: str) -> float | None:
    """Mean over training seeds of one cost; of each seed's result files, the newest one's."""
    found = []
    for member in row.members.values():
        newest = sorted(member.values(), key=lambda result: (str(result.provenance.get("time")), result.metric.name))
        values = [value for result in newest if (value := result.cost.get(key)) is not None]
        found += values[-1:]
    return sum(found) / len(found) if found else None


def _cost_cell(value: float | None, decimals: int) -> Cell:
    return Cell(MISSING if value is None else format_number(value, decimals), value)


def _figure_cell(row: Row, column: Column, figure: Figure | None, rank: int) -> Cell:
    if figure is None:
        return Cell(MISSING)
    text = format_figure(figure.value, figure.low, figure.high, column.metric.decimals)
    rank = 0 if figure.in_sample else rank
    return Cell(text, figure.value, figure.low, figure.high, _marks(row, figure), rank, sources=_sources(figure))


def _delta_cell(row: Row, base: Row, column: Column) -> Cell:
    difference = contrast(row, base, column)
    if difference is None:
        return Cell(MISSING)
    figure = row.figure(column)
    value, low, high = difference.value, difference.low, difference.high
    text = format_figure(value, low, high, column.metric.decimals, signed=True)
    trained = figure is not None and figure.in_sample
    marks = ("†" if trained else "") + ("¶" if difference.basis == "quadrature" else "")
    sources = _sources(figure) if figure else ()
    return Cell(text, value, low, high, marks, trend=_trend(difference, trained), sources=sources)


def _trend(difference: Contrast, trained: bool) -> str:
    """To which side the interval leaves zero; a reward that was trained on gets higher, not better."""
    if not difference.clear:
        return ""
    if trained:
        return "higher" if difference.value > 0 else "lower"
    return "better" if difference.gain > 0 else "worse"


def _marks(row: Row, figure: Figure) -> str:
    marks = "†" if figure.in_sample else ""
    marks += "‡" if figure.flags else ""
    return marks + ("§" if len(figure.results) < len(row.members) else "")


def _sources(figure: Figure) -> tuple[str, ...]:
    return tuple(file_of(result) for result in figure.results)


def row_labels(row: Row) -> tuple[str, ...]:
    """Method, sampler, model: what `LABELS` heads."""
    return row.method_label, row.sampler_label, row.model_label


def _heading(comparison: Comparison, column: Column) -> Heading:
    metric = column.metric
    target = f"{column.target:g}" if metric.direction == "target" else ""
    arrow = "" if column.level else ARROWS[metric.direction] + target
    return Heading(metric.label, metric.unit, arrow, comparison.protocol_numbers[column.protocol_id])


def _interval_notes(comparison: Comparison, columns: list[Column]) -> Iterable[str]:
    yield _images(comparison, columns)
    figures = [row.figure(column) for row in comparison.rows for column in columns]
    methods = {r.interval.method for f in figures if f and len(f.results) == 1 for r in f.results if r.interval}
    if methods:
        yield (
            f"± half the 95 % interval over images ({'; '.join(sorted(methods))}). It does not cover the luck of "
            "training: where a row has one training seed, nothing is set in bold."
        )
    if any(f and len(f.results) > 1 for f in figures):
        yield "Rows of several training seeds: mean ± half the 95 % t interval over the seeds."
    if any(f and 1 < len(f.results) < MIN_SEEDS for f in figures):
        yield f"Rows of fewer than {MIN_SEEDS} training seeds are never set in bold: a test over so few says little."
    if any(rank for column in columns for rank in leaders(comparison.rows, column)):
        yield (
            "Bold: best, underlined: second best, only where a paired t test over at least "
            f"{MIN_SEEDS} common training seeds separates it from every row behind it (Holm, 5 %)."
        )


def _images(comparison: Comparison, columns: list[Column]) -> str:
    """How many images are behind the figures."""
    several = ", of each training seed" if any(len(row.members) > 1 for row in comparison.rows) else ""
    behind: dict[str, list[str]] = {}
    for column in columns:
        figures = [figure for row in comparison.rows if (figure := row.figure(column))]
        nums = sorted({result.num_samples for figure in figures for result in figure.results})
        behind.setdefault(" or ".join(map(str, nums)), []).append(column.metric.label)
    if len(behind) == 1:
        return f"n = {next(iter(behind))} images behind each figure{several}."
    parts = "; ".join(f"{nums} in {', '.join(dict.fromkeys(labels))}" for nums, labels in behind.items())
    return f"Images behind each figure{several}: {parts}."


def _mark_notes(used: list[tuple[Row, Column]], rows: list[tuple[tuple[str, ...], tuple[Cell, ...]]]) -> list[str]:
    shown = {mark for _, cells in rows for cell in cells for mark in cell.marks}
    figures = [(row, column, row.figure(column)) for row, column in used]
    flags = sorted({FLAGS.get(flag, flag) for _, _, figure in figures if figure for flag in figure.flags})
    short = sorted(
        {
            f"{row.model_label} has {len(figure.results)} of {len(row.members)} in {column.metric.label}"
            for row, column, figure in figures
            if figure and len(figure.results) < len(row.members)
        }
    )
    texts = {mark: text.format(flags=", ".join(flags), seeds="; ".join(short)) for mark, text in MARKS.items()}
    return [f"{mark} {text}." for mark, text in texts.items() if mark in shown]


def _teacher_caption(comparison: Comparison) -> str:
    teacher = comparison.teacher
    return f"Difference to the teacher ({teacher.sampler_label})" if teacher else "Difference to the teacher"


GROUPS, OCTAVES, JUDGES, NULL = "groups", "octave_gaps_db", ("judges_agree", "mean"), ("split_half_null",)
NOTES = {
    GROUPS: "Means over each group's own images; heldout prompts combine attributes that no model was trained on.",
    OCTAVES: "An even rise over all bands is contrast, a rise of the last ones noise, a fall blur.",
    "checks": (
        "Judges agree: how far the oracle's judges agree on these images; where it is low, the oracle is out of its "
        "depth. Split-half null: the distance between two halves of the reference, real against real."
    ),
}


@dataclass(frozen=True)
class Detail:
    """A figure inside `column`'s results: where it lies in their `extra`, and how it is shown."""

    table: str
    column: Column
    path: tuple[str, ...]
    heading: Heading
    decimals: int
    signed: bool = False

    def value(self, row: Row) -> float | None:
        """Mean over the row's training seeds; None where no result has it."""
        results = (row.result(self.column, seed) for seed in row.members)
        found = [value for result in results if result and (value := _nested(result.extra, self.path)) is not None]
        return math.fsum(found) / len(found) if found else None

    def text(self, row: Row) -> str:
        """As tables print it."""
        value = self.value(row)
        return MISSING if value is None else format_number(value, self.decimals, signed=self.signed)


def all_details(comparison: Comparison, columns: Sequence[Column]) -> list[Detail]:
    """What the results of `columns` hold, in the order of the tables."""
    groups = [detail for column in columns for detail in _parts(comparison, column, GROUPS)]
    spectrum = comparison.column("hfer_gap_db", "band_gap_db")
    octaves = _parts(comparison, spectrum, OCTAVES) if spectrum in columns and spectrum is not None else []
    return [*groups, *octaves, *_checks(comparison, columns)]


def detail_tables(comparison: Comparison) -> list[Table]:
    """Up to three tables; none where the results hold nothing of the kind."""
    found = all_details(comparison, headlines(comparison))
    captions = {GROUPS: "By group of prompts", OCTAVES: "Energy gap to real per octave", "checks": "Checks"}
    built = []
    for key, caption in captions.items():
        details = [detail for detail in found if detail.table == key]
        rows = []
        for row in comparison.rows:
            cells = tuple(Cell(detail.text(row), detail.value(row)) for detail in details)
            if any(cell.number is not None for cell in cells):
                rows.append((row_labels(row), cells))
        if rows:
            headings = tuple(detail.heading for detail in details)
            name = f"{caption}, {comparison.world}"
            built.append(Table(key.replace("_", "-"), name, LABELS, headings, tuple(rows), (NOTES[key],)))
    return built


def _parts(comparison: Comparison, column: Column, key: str) -> list[Detail]:
    """One detail per entry of the dictionary `key`: a group of prompts, or an octave."""
    results = (row.result(column, seed) for row in comparison.rows for seed in row.members)
    names = dict.fromkeys(name for result in results if result for name in result.extra.get(key) or {})
    note = comparison.protocol_numbers[column.protocol_id]
    metric = column.metric
    if key == OCTAVES:
        return [
            Detail(key, column, (key, name), Heading(octave_name(name), "dB", "→0", note), 2, signed=True)
            for name in names
        ]
    return [
        Detail(key, column, (key, name), Heading(f"{metric.label}, {name}", metric.unit, "", note), metric.decimals)
        for name in names
    ]


def _checks(comparison: Comparison, columns: Sequence[Column]) -> list[Detail]:
    details = []
    for column in columns:
        note = comparison.protocol_numbers[column.protocol_id]
        if column.metric.name == "oracle_all":
            details.append(Detail("checks", column, JUDGES, Heading("Judges agree", "%", "↑", note), 1))
        if column.metric.family == "set distance":
            label = f"{column.metric.label}, split-half null"
            details.append(Detail("checks", column, NULL, Heading(label, "", "", note), column.metric.decimals))
    return [detail for detail in details if any(detail.value(row) is not None for row in comparison.rows)]


def octave_name(name: str) -> str:
    """A band's ends as fractions.

    >>> octave_name("0.125-0.25")
    '1/8 to 1/4'
    """
    low, high = (Fraction(end).limit_denominator(4096) for end in name.split("-"))
    return f"{low} to {high}"


def _nested(extra: object, path: tuple[str, ...]) -> float | None:
    for key in path:
        extra = extra.get(key) if isinstance(extra, dict) else None
    return float(extra) if isinstance(extra, int | float) and not isinstance(extra, bool) else None


DECIMALS = 2
BASES = ("the teacher", "LCD")
AMONG = "seeds among each other"
HOW = (
    "Root mean square, over rings, of the difference of two mean spectra in dB; 0 only where they are equal, so the "
    "luck of the images and of training keeps it above 0. ± half the 95 % interval: over training seeds where the row "
    "has several (each against its own LCD seed, and all against the one teacher), else leaving out groups of prompts."
)
SPECTRAL_NOTES = {
    AMONG: "LCD's own row, to LCD: the mean over pairs of its training seeds, which is what training alone does.",
    "none": (
        "Without ±: a result made before spectra without each group of prompts were kept; measure it again with "
        "rgbench eval --metric spectrum --force."
    ),
}


def spectral_tables(comparison: Comparison) -> list[Table]:
    """One table, or none where no two rows kept spectra of one protocol."""
    column = comparison.column(*SPECTRA)
    if column is None:
        return []
    kinds = [(base, plane) for base in BASES for plane in PLANES]
    found = {row: [_to(comparison, row, column, *kind) for kind in kinds] for row in comparison.rows}
    used = [i for i in range(len(kinds)) if any(distances[i] for distances in found.values())]
    if not used:
        return []
    note = comparison.protocol_numbers[column.protocol_id]
    heads = [Heading(f"{kinds[i][1].capitalize()}, to {kinds[i][0]}", "dB", "", note) for i in used]
    rows = [
        (row_labels(row), tuple(_cell(distances[i]) for i in used))
        for row, distances in found.items()
        if any(distances)
    ]
    bases = {distance.basis for distances in found.values() for distance in distances if distance}
    notes = (HOW, *(text for basis, text in SPECTRAL_NOTES.items() if basis in bases))
    name = f"Log-spectral distance to other models, {comparison.world}"
    return [Table("spectral-distance", name, LABELS, tuple(heads), tuple(rows), notes)]


def _to(comparison: Comparison, row: Row, column: Column, base: str, plane: str) -> Paired | None:
    other = comparison.teacher if base == "the teacher" else comparison.lcd(row)
    if other is row:
        return _among(row, column, plane)
    return _distance(row, other, column, plane) if other is not None else None


def _cell(found: Paired | None) -> Cell:
    if found is None:
        return Cell(MISSING)
    return Cell(format_figure(found.value, found.low, found.high, DECIMALS), found.value, found.low, found.high)


def _distance(row: Row, base: Row, column: Column, plane: str) -> Paired | None:
    """Mean over training seeds with a t interval, or of one run with that of its prompts."""
    pairs = [
        (ours, theirs)
        for seed in row.members
        if (ours := row.result(column, seed)) is not None
        and (theirs := base.result(column, None if list(base.members) == [None] else seed)) is not None
    ]
    found = [distance for pair in pairs if (distance := spectral_distance(*pair, plane)) is not None]
    if len(found) < 2:
        return found[0] if found else None
    mean, low, high = t_interval([distance.value for distance in found])
    return Paired(mean, max(0.0, low), high, "seeds")


def _among(row: Row, column: Column, plane: str) -> Paired | None:
    """Mean over the pairs of a row's training seeds; they share seeds, so there is no interval."""
    results = [result for seed in row.members if (result := row.result(column, seed)) is not None]
    pairs = [spectral_distance(*pair, plane) for pair in combinations(results, 2)]
    found = [distance.value for distance in pairs if distance is not None]
    return Paired(math.fsum(found) / len(found), None, None, AMONG) if found else None
