"""What all plots share: colours and line styles, panels and legends, files.

Colours are those of Okabe and Ito (2008), told apart with any colour vision; rows of one
method differ by line style and marker as well. Files are the same bytes for the same
results: a fixed hash salt for SVG ids, no dates, no software version.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from rgbench.reporting.gather import Column, Comparison, Row
from rgbench.reporting.tables import ARROWS

COLOURS = {"teacher": "#CC79A7", "lcd": "#0072B2", "rg_lcd": "#D55E00", "lrm": "#009E73", "external": "#E69F00"}
DARK_COLOURS = {**COLOURS, "lcd": "#56B4E9", "rg_lcd": "#F0803C", "lrm": "#2BC99A"}
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
HATCHES = ("", "////", "....", "xxxx")  # of bars, where lines have their styles
MARKERS = ("*", "o", "s", "D", "^", "v", "P", "X")  # in the order of COLOURS
MAX_NAMED = 9  # rows that the legend names one by one; of more, it names the methods
PANEL_INCHES = 5.0  # width of one panel
LEGEND_INCHES = 0.19  # height of a line of the legend
UNLISTED = "_nolegend_"


@dataclass(frozen=True)
class Theme:
    """Ink, paper and line colours of a plot."""

    paper: str
    ink: str
    faint: str
    methods: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """matplotlib settings of this theme."""
        plain = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "svg.hashsalt": "rgbench"}
        inks = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
        return {
            **plain, **dict.fromkeys(inks, self.ink), "grid.color": self.faint, "grid.linewidth": 0.6,
            "figure.facecolor": self.paper, "axes.facecolor": self.paper, "font.size": 9.5,
            "font.family": "DejaVu Sans",
            "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.linewidth": 0.8,
            "legend.frameon": False, "legend.fontsize": 8.5, "axes.axisbelow": True, "svg.fonttype": "path",
        }  # fmt: skip


LIGHT = Theme("#ffffff", "#24292f", "#e3e6ea", COLOURS)
DARK = Theme("#161b22", "#d6dce4", "#30363d", DARK_COLOURS)


@dataclass(frozen=True)
class Plot:
    """A plot by file stem; `alt` says in words what it shows, `lacking` why it cannot be drawn, or nothing."""

    stem: str
    title: str
    alt: str
    draw: Callable[[Comparison, Theme], Canvas]
    lacking: Callable[[Comparison], str]


def svg(canvas: Canvas) -> bytes:
    """The figure as SVG, the same bytes each time."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rgbench", "svg.fonttype": "path"}):
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def png(canvas: Canvas) -> bytes:
    """The figure as PNG at 160 dots per inch."""
    out = io.BytesIO()
    canvas.savefig(out, format="png", dpi=160, metadata={"Software": None})
    return out.getvalue()


def panels(
    comparison: Comparison, num_rows: int, num_panels: int = 2, *, height: float = 4.1
) -> tuple[Canvas, list[Axes]]:
    """A row of equally wide panels, with room for a legend of `num_rows` entries below."""
    lines = legend_lines(min(num_rows, MAX_NAMED) + 2)
    canvas = Canvas(figsize=(PANEL_INCHES * num_panels, height + LEGEND_INCHES * lines), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(1, num_panels, squeeze=False)[0]
    canvas.suptitle(f"World: {comparison.world}", fontsize=8.5, x=0.995, ha="right", alpha=0.75)
    return canvas, list(axes)


def legend(canvas: Canvas, handles: Sequence[Artist]) -> None:
    """One legend for all panels, below them; of so many columns as the figure is wide for."""
    handles = [handle for handle in handles if str(handle.get_label()) != UNLISTED]
    if not handles:
        return
    labels = [str(handle.get_label()) for handle in handles]
    planned = legend_lines(len(handles))
    for columns in range(-(-len(handles) // planned), 0, -1):
        look = {"loc": "outside lower left", "ncols": columns, "handlelength": 2.6, "columnspacing": 1.6}
        made = canvas.legend(handles, labels, **look)
        if columns == 1 or made.get_window_extent().width <= canvas.bbox.width:
            break
        made.remove()
    canvas.set_figheight(canvas.get_figheight() + LEGEND_INCHES * (-(-len(handles) // columns) - planned))


def legend_lines(num_entries: int) -> int:
    """Lines that a legend takes, of up to three entries each."""
    return -(-num_entries // 3)


def style(comparison: Comparison, row: Row, theme: Theme) -> dict[str, Any]:
    """Colour and first marker by method; line style and further markers by the row's place within it."""
    place = place_in_method(comparison, row)
    first = list(COLOURS).index(row.method if row.method in COLOURS else "external")
    marker = MARKERS[(first + place) % len(MARKERS)]
    colour = theme.methods.get(row.method, theme.methods["external"])
    return {"color": colour, "ls": LINES[place % len(LINES)], "marker": marker}


def place_in_method(comparison: Comparison, row: Row) -> int:
    """Which of the rows of its method it is, from 0."""
    return [other for other in comparison.rows if other.method == row.method].index(row)


def label(comparison: Comparison, row: Row) -> str:
    """The shortest name that is this row's alone, cut to 48 characters; of many rows, one name per method."""
    same = [other for other in comparison.rows if other.method == row.method]
    if len(comparison.rows) > MAX_NAMED:
        several = f", {len(same)} models" if len(same) > 1 else ""
        return f"{row.method_label}{several}" if row is same[0] else UNLISTED
    text = row.method_label if len(same) == 1 else f"{row.method_label} {row.model_label}, {row.sampler_label}"
    if len({other.model_label for other in same}) == 1 and len(same) > 1:
        text = f"{row.method_label}, {row.sampler_label}"
    return (text if len(text) <= 48 else text[:47] + "…").replace("$", r"\$")


def short_label(comparison: Comparison, row: Row) -> str:
    """For ticks: the method where it has one row, else the model, cut to 28 characters."""
    alone = sum(other.method == row.method for other in comparison.rows) == 1
    name = row.method_label if alone else row.model_label
    return (name if len(name) <= 28 else f"{name[:27]}…").replace("$", r"\$")


def axis_label(column: Column) -> str:
    """The metric with its unit and the arrow of its good end."""
    unit = f" ({column.metric.unit})" if column.metric.unit else ""
    return f"{column.metric.label}{unit} {ARROWS[column.metric.direction]}".replace("$", r"\$")


def error(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    """An interval as matplotlib's error bars take it."""
    return None if low is None or high is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def decibel(power: NDArray) -> NDArray:
    """10 log₁₀."""
    return 10 * np.log10(np.maximum(power, np.finfo(float).tiny))
