"""The report's tables, as text cells that every format renders alike.

Each figure is printed from the result files' values with the metric's own decimals;
nothing is rounded before, and a figure that is not there is "—".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from rgbench.metrics.real_crops import LOSSY
from rgbench.reporting.contrast import MIN_SEEDS, Contrast, contrast, leaders
from rgbench.reporting.digits import MISSING, format_figure, format_number
from rgbench.reporting.gather import Column, Comparison, Figure, Row, file_of
from rgbench.reporting.protocols import differences

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
