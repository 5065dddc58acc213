"""Table of log-spectral distances between models: how far each one's spectrum is from the teacher's and from LCD's.

The distance to real images is a figure of its own; the difference of two such figures is no distance between the two
models, which may be far from real in different ways.
"""

from __future__ import annotations

import math
from itertools import combinations

from rgbench.evaluation.comparison import SPECTRA
from rgbench.evaluation.paired import Paired
from rgbench.evaluation.spectral_distance import PLANES, spectral_distance
from rgbench.evaluation.statistics import t_interval
from rgbench.reporting.digits import MISSING, format_figure
from rgbench.reporting.gather import Column, Comparison, Row
from rgbench.reporting.tables import LABELS, Cell, Heading, Table, row_labels

DECIMALS = 2
BASES = ("the teacher", "LCD")
AMONG = "seeds among each other"
HOW = (
    "Root mean square, over rings, of the difference of two mean spectra in dB; 0 only where they are equal, so the "
    "luck of the images and of training keeps it above 0. ± half the 95 % interval: over training seeds where the row "
    "has several (each against its own LCD seed, and all against the one teacher), else leaving out groups of prompts."
)
NOTES = {
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
    notes = (HOW, *(text for basis, text in NOTES.items() if basis in bases))
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
