"""Win rates: on how many prompts one model's images score better than another's."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from rgbench.reporting.contrast import scores_of, win_rate
from rgbench.reporting.gather import Column, Comparison, Row
from rgbench.reporting.plots.drawing import LIGHT, Plot, Theme, panels, short_label

GOLD = ("oracle_mean", "oracle_all")
MAX_WRITTEN = 10  # models up to which the rates are written into the cells
MAX_ROWS = 60
CELL_INKS = ("#1f2328", "#fffffe")  # on pale and on full cells, whose colours no theme changes
COLOURS = "PuOr"  # diverging, told apart with any colour vision; white is an even match


def lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    return (
        "" if _columns(comparison) else "no two models hold scores of the same images; evaluate two with --metric hps"
    )


def draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """One matrix per column of scores: row's share of wins against column's, ties half."""
    columns = _columns(comparison)
    with mpl.rc_context({**theme.settings, "axes.grid": False}):
        most = max(len(_rows(comparison, column)) for column in columns)
        canvas, drawn = panels(comparison, 0, len(columns), height=min(9.0, 2.6 + 0.42 * most))
        for axes, column in zip(drawn, columns, strict=True):
            shown = _matrix(axes, comparison, column, theme)
        bar = canvas.colorbar(
            shown,
            ax=drawn,
            shrink=0.8,
            label="prompts on which the row wins (%), ties half;\nin brackets: the 95 % interval holds 50",
        )
        bar.outline.set_visible(False)
    return canvas


def _columns(comparison: Comparison) -> list[Column]:
    """The trained reward, and the oracle beside it."""
    chosen = [comparison.trained_reward(), comparison.column(*GOLD)]
    return [column for column in chosen if column is not None and len(_rows(comparison, column)) > 1]


def _rows(comparison: Comparison, column: Column) -> list[Row]:
    return [row for row in comparison.rows if any(scores_of(row, seed, column) for seed in row.members)][:MAX_ROWS]


def _matrix(axes: Axes, comparison: Comparison, column: Column, theme: Theme) -> mpl.image.AxesImage:
    rows = _rows(comparison, column)
    rates: NDArray = np.full((len(rows), len(rows)), np.nan)
    even: NDArray = np.zeros_like(rates, dtype=bool)
    for i, row in enumerate(rows):
        for j, other in enumerate(rows[:i]):
            wins = win_rate(row, other, column)
            if wins is not None:
                rates[i, j], rates[j, i] = 100 * wins.rate, 100 - 100 * wins.rate
                even[i, j] = even[j, i] = wins.interval.low <= 0.5 <= wins.interval.high
    image = axes.imshow(rates, cmap=COLOURS, vmin=0, vmax=100)
    names = [short_label(comparison, row) for row in rows]
    turn = 90 if len(rows) > 4 else 20 if max(map(len, names)) > 10 else 0
    axes.set_xticks(range(len(rows)), names, rotation=turn, ha="right" if turn == 20 else "center")
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(length=0, labelsize=9 if len(rows) <= MAX_WRITTEN else 6)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{column.metric.label}: row against column")
    if len(rows) <= MAX_WRITTEN:
        for i, j in np.argwhere(np.isfinite(rates)):
            ink = CELL_INKS[int(abs(rates[i, j] - 50) > 33)]
            written = f"({rates[i, j]:.0f})" if even[i, j] else f"{rates[i, j]:.0f}"
            axes.text(j, i, written, ha="center", va="center", color=ink)
    return image


PLOT = Plot(
    "wins",
    "Win rates, prompt by prompt",
    "Matrix of the share of common prompts on which the row's image scores better than the column's, for the "
    "trained reward and for the oracle.",
    draw,
    lacking,
)
