"""Every figure of the report as one long CSV: a line per figure, unrounded, with where it comes from.

`kind` is "figure" (a row of the tables), "seed" (one training seed of a row of several),
"checkpoint" (a run before its last step; `step` says which), "delta_lcd" or
"delta_teacher" (row minus baseline), "detail" (a part of a figure), or "cost". `shown` is
the text that the tables print, "—" where there is no figure; the numeric fields are empty
there.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from rgbench.evaluation.results import Result
from rgbench.reporting.contrast import contrast
from rgbench.reporting.details import Detail, all_details
from rgbench.reporting.digits import MISSING, format_figure, format_number
from rgbench.reporting.gather import Column, Comparison, Figure, Row, column_of, file_of, sampling_of
from rgbench.reporting.tables import COSTS, cost

FIELDS = (
    "world", "kind", "method", "model", "sampler", "training_seeds", "step", "metric", "label", "unit", "direction",
    "protocol", "shown", "value", "low", "high", "interval", "num_samples", "in_sample", "flags", "files", "commands",
)  # fmt: skip


def long_csv(comparisons: list[Comparison]) -> str:
    """The CSV text: header, then world by world, row by row; lines end in a newline alone."""
    lines: list[dict[str, Any]] = []
    for comparison in comparisons:
        for row in comparison.rows:
            for column in comparison.columns:
                lines += _figures(comparison, row, column)
                lines += _deltas(comparison, row, column)
            lines += [_detail(comparison, row, detail) for detail in all_details(comparison, comparison.columns)]
            lines += _costs(comparison, row)
        lines += [_checkpoint(comparison, result) for result in comparison.checkpoints]
    frame = pd.DataFrame(lines, columns=list(FIELDS), dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def _figures(comparison: Comparison, row: Row, column: Column) -> list[dict[str, Any]]:
    lines = [_line(comparison, row, column, "figure", row.figure(column))]
    if len(row.members) > 1:
        for seed in row.seeds(column):
            single = Row(row.method, row.stem, row.sampling, {seed: row.members[seed]})
            lines.append(_line(comparison, single, column, "seed", single.figure(column)))
    return lines


def _line(comparison: Comparison, row: Row, column: Column, kind: str, figure: Figure | None) -> dict[str, Any]:
    line = {**_place(comparison, row, kind), **_measured(column), "shown": MISSING}
    if figure is None:
        return line
    results = figure.results
    single = results[0].interval.method if len(results) == 1 and results[0].interval else ""
    return line | {
        "shown": format_figure(figure.value, figure.low, figure.high, column.metric.decimals),
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "interval": "t over training seeds" if len(results) > 1 else single,
        "num_samples": _joined(result.num_samples for result in results),
        "in_sample": str(figure.in_sample).lower(),
        "flags": "; ".join(figure.flags),
        "files": _joined(file_of(result) for result in results),
        "commands": _joined(result.command for result in results),
    }


def _checkpoint(comparison: Comparison, result: Result) -> dict[str, Any]:
    column = column_of(result)
    row = Row(result.method, result.model, sampling_of(result), {result.training_seed: {column.key: result}})
    figure = row.figure(column)
    return _line(comparison, row, column, "checkpoint", figure) | {"step": result.training["step"]}


def _deltas(comparison: Comparison, row: Row, column: Column) -> list[dict[str, Any]]:
    lines = []
    for kind, base in (("delta_lcd", comparison.lcd(row)), ("delta_teacher", comparison.teacher)):
        difference = None if base is None or base is row else contrast(row, base, column)
        if difference is not None:
            value, low, high = difference.value, difference.low, difference.high
            shown = format_figure(value, low, high, column.metric.decimals, signed=True)
            numbers = {"shown": shown, "value": value, "low": low, "high": high, "interval": difference.basis}
            lines.append({**_place(comparison, row, kind), **_measured(column), **numbers})
    return lines


def _detail(comparison: Comparison, row: Row, detail: Detail) -> dict[str, Any]:
    what = {"label": detail.heading.label, "unit": detail.heading.unit}
    figure = {"shown": detail.text(row), "value": detail.value(row)}
    return {**_place(comparison, row, "detail"), **_measured(detail.column), **what, **figure}


def _costs(comparison: Comparison, row: Row) -> list[dict[str, Any]]:
    lines = []
    for key, label, unit, decimals in COSTS:
        value = cost(row, key)
        shown = MISSING if value is None else format_number(value, decimals)
        what = {"metric": key, "label": label, "unit": unit, "shown": shown, "value": value}
        lines.append({**_place(comparison, row, "cost"), **what})
    return lines


def _place(comparison: Comparison, row: Row, kind: str) -> dict[str, Any]:
    seeds = "; ".join(str(seed) for seed in row.members if seed is not None)
    names = {"method": row.method, "model": row.model_label, "sampler": row.sampler_label, "training_seeds": seeds}
    return {"world": comparison.world, "kind": kind, **names}


def _measured(column: Column) -> dict[str, Any]:
    metric = column.metric
    names = {"metric": metric.name, "label": metric.label, "unit": metric.unit, "direction": metric.direction}
    return {**names, "protocol": column.protocol_id}


def _joined(values: Any) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values))
