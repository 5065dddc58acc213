"""How the per-image rewards are spread: a rise of the mean may be a shift of all images, or a new tail."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from rgbench.reporting.gather import Column, Comparison, Row
from rgbench.reporting.plots.drawing import LIGHT, Plot, Theme, axis_label, panels, short_label, style

NUM_BINS = 48
HEIGHT = 0.9  # of a row's tallest bin, in rows
INCHES_PER_ROW = 0.42


def lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    return "" if _columns(comparison) else "no result holds a reward of each image; measure one with --metric hps"


def draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """Per reward column the histogram of each row's images, all training seeds together, on shared bins."""
    columns = _columns(comparison)
    with mpl.rc_context(theme.settings):
        most = max(len(scored_rows(comparison, column)) for column in columns)
        canvas, drawn = panels(comparison, 0, len(columns), height=1.4 + INCHES_PER_ROW * most)
        for axes, column in zip(drawn, columns, strict=True):
            _ridges(axes, comparison, column, theme)
    return canvas


def scored_rows(comparison: Comparison, column: Column) -> dict[Row, NDArray]:
    """Rows with per-image scores in `column`, and these scores of all their training seeds."""
    found = {}
    for row in comparison.rows:
        results = [result for seed in row.members if (result := row.result(column, seed)) is not None]
        scores = [list(kept.values()) for result in results if (kept := row.scores(result))]
        if scores:
            found[row] = np.concatenate([np.asarray(values, float) for values in scores])
    return found


def _columns(comparison: Comparison) -> list[Column]:
    """The trained reward, and the fullest other reward beside it."""
    trained = comparison.trained_reward()
    rewards = [column for column in comparison.columns if column.metric.family == "reward" and column != trained]
    chosen = [trained, *sorted(rewards, key=comparison.num_figures, reverse=True)]
    return [column for column in chosen if column is not None and scored_rows(comparison, column)][:2]


def _ridges(axes: Axes, comparison: Comparison, column: Column, theme: Theme) -> None:
    found = scored_rows(comparison, column)
    pooled = np.concatenate(list(found.values()))
    low, high = np.quantile(pooled, [0.002, 0.998])
    edges = np.linspace(low, high, NUM_BINS + 1)
    if edges[0] == edges[-1]:
        edges = np.linspace(edges[0] - 0.5, edges[0] + 0.5, NUM_BINS + 1)
    for place, (row, scores) in enumerate(reversed(found.items())):
        counts = np.histogram(scores.clip(edges[0], edges[-1]), edges)[0]
        colour = style(comparison, row, theme)["color"]
        axes.stairs(place + HEIGHT * counts / counts.max(), edges, baseline=place, color=colour, fill=True, alpha=0.35)
        axes.stairs(place + HEIGHT * counts / counts.max(), edges, baseline=place, color=colour, lw=1.1)
        axes.plot(np.quantile(scores, [0.05, 0.95]), [place, place], color=colour, lw=2.4, solid_capstyle="butt")
        axes.plot(np.median(scores), place, marker="|", ms=11, mew=2.2, color=theme.ink, zorder=5)
    axes.set_yticks(range(len(found)), [short_label(comparison, row) for row in reversed(found)])
    axes.tick_params("y", length=0)
    axes.set_ylim(-0.25, len(found) - 1 + HEIGHT + 0.15)
    axes.set_xlabel(f"{axis_label(column)} of single images\nbar: 5 to 95 %, tick: median")
    axes.set_title(column.metric.label)


PLOT = Plot(
    "distributions",
    "Rewards of single images",
    "Histogram of each model's per-image rewards on shared bins, with the median and the range from 5 to 95 percent.",
    draw,
    lacking,
)
