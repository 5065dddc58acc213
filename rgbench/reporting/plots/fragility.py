"""What each reward level loses under changes that people hardly see, against what real images lose."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas

from rgbench.reporting.gather import Comparison, Row
from rgbench.reporting.plots.drawing import (
    HATCHES,
    LIGHT,
    Plot,
    Theme,
    error,
    label,
    legend,
    panels,
    place_in_method,
    short_label,
    style,
)

METRICS = ("fragility_gap", "fragility")
CHANGES = {
    "jpeg75": "JPEG 75", "blur1": "blur, 1 px", "half_size": "half size\nand back", "shift1": "shift, 1 px",
    "noise2": "noise, 2/255",
}  # fmt: skip


def lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    found = any(drops(comparison, row) for row in comparison.rows)
    return "" if found else "fragility was not measured; add --metric fragility"


def draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """Left the mean drop of each row with its interval, right the drop under each change.

    Raises:
        ValueError: nothing was measured; ask :func:`lacking` before.
    """
    column = comparison.column(*METRICS)
    if column is None:
        raise ValueError(f"fragility was not measured in {comparison.world}")
    rows = [row for row in comparison.rows if drops(comparison, row)]
    names = list(dict.fromkeys(name for row in rows for name in drops(comparison, row)))
    against = "more than real images lose" if column.metric.name == METRICS[0] else "reward lost"
    with mpl.rc_context(theme.settings):
        canvas, (left, right) = panels(comparison, len(rows))
        for place, row in enumerate(rows):
            look, figure = style(comparison, row, theme), row.figure(column)
            if figure is None:
                continue
            left.errorbar(
                place, figure.value, yerr=error(figure.value, figure.low, figure.high), color=look["color"],
                marker=look["marker"], ms=8, capsize=3, lw=1.3,
            )  # fmt: skip
            shift = 0.7 * (place + 0.5) / len(rows) - 0.35
            values = [drops(comparison, row).get(name, np.nan) for name in names]
            right.bar(
                np.arange(len(names)) + shift,
                values,
                0.64 / len(rows),
                color=look["color"],
                edgecolor=theme.paper,
                linewidth=0,
                hatch=HATCHES[place_in_method(comparison, row) % len(HATCHES)],
                label=label(comparison, row),
            )
        names_below = [short_label(comparison, row) for row in rows]
        left.set_xticks(range(len(rows)), names_below, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
        left.set_xlim(-0.6, len(rows) - 0.4)
        right.set_xticks(range(len(names)), [CHANGES.get(name, name.replace("_", " ")) for name in names])
        for axes, title in ((left, "Mean over the changes"), (right, "By change")):
            axes.axhline(0, color=theme.ink, lw=1.2, ls=(0, (4, 2)))
            axes.set_ylabel(f"drop of the reward, {against}")
            axes.set_title(title)
        legend(canvas, right.get_legend_handles_labels()[0])
    return canvas


def drops(comparison: Comparison, row: Row) -> dict[str, float]:
    """Mean drop by change, over the row's training seeds; empty where it was not measured."""
    column = comparison.column(*METRICS)
    results = [row.result(column, seed) for seed in row.members] if column else []
    found = [result.extra["drops"] for result in results if result is not None and result.extra.get("drops")]
    return {name: float(np.mean([seed[name] for seed in found if name in seed])) for name in found[0]} if found else {}


PLOT = Plot(
    "fragility",
    "Fragility of the reward",
    "Points with intervals of the mean drop of each model's reward under small changes, and bars of the drop under "
    "each change.",
    draw,
    lacking,
)
