"""Tables of what result files hold beside their value: prompt groups, octave bands, checks on the measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rgbench.reporting.digits import MISSING, format_number
from rgbench.reporting.gather import Column, Comparison, Row
from rgbench.reporting.tables import LABELS, Cell, Heading, Table, headlines, row_labels

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
