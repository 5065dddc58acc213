"""The report's plots: radial spectra with their gap to real, and the trained reward against other evidence.

Colours are those of Okabe and Ito (2008), told apart with any colour vision; rows of one
method differ by line style and marker as well. Files are the same bytes for the same
results: a fixed hash salt for SVG ids, no dates, no software version.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rgbench.reporting.gather import Column, Comparison, Row
from rgbench.reporting.tables import ARROWS, format_number

COLOURS = {"teacher": "#CC79A7", "lcd": "#0072B2", "rg_lcd": "#D55E00", "lrm": "#009E73", "external": "#E69F00"}
DARK_COLOURS = {**COLOURS, "lcd": "#56B4E9", "rg_lcd": "#F0803C", "lrm": "#2BC99A"}
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
HFER_RADIUS = 0.25  # cycles/pixel above which HFER counts
MAX_NAMED = 9  # rows that the legend names one by one; of more, it names the methods
UNLISTED = "_nolegend_"
SPECTRUM_METRICS = ("hfer_gap_db", "band_gap_db", "slope")
ORACLE_METRICS = ("oracle_all", "oracle_mean")
DISTANCE_METRICS = ("fd_efflite0", "fid")


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


def has_spectra(comparison: Comparison) -> bool:
    """Whether any result holds a spectrum."""
    return any(_curves(comparison, row) is not None for row in comparison.rows)


def spectra(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """Radially averaged luma power in dB, and each row's gap to real."""
    found = [(row, curves) for row in comparison.rows if (curves := _curves(comparison, row)) is not None]
    with mpl.rc_context(theme.settings):
        canvas, (left, right) = _panels(comparison, len(found))
        radius, _, reference = found[0][1]
        left.plot(radius, _decibel(reference), color=theme.ink, lw=1.6, ls=(0, (4, 2)), label="real", zorder=4)
        right.axhline(0, color=theme.ink, lw=1.6, ls=(0, (4, 2)), zorder=4)
        for row, (radius, powers, reference) in found:
            style = _style(comparison, row, theme)
            line = {"color": style["color"], "ls": style["ls"], "lw": 1.7}
            for axes, base in ((left, 1.0), (right, reference)):
                decibels = _decibel(powers / base)
                axes.plot(radius, decibels.mean(axis=0), label=_spectrum_label(comparison, row), **line)
                if len(powers) > 1:
                    axes.fill_between(radius, decibels.min(0), decibels.max(0), color=style["color"], alpha=0.18, lw=0)
        _finish_spectra(left, right, theme)
        _legend(canvas, left.get_legend_handles_labels()[0])
    return canvas


def has_rewards(comparison: Comparison) -> bool:
    """Whether there are a reward and something to hold it against."""
    return comparison.trained_reward() is not None and bool(_witnesses(comparison))


def rewards(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """The trained reward (x) against the oracle and the set distance (y, good end up).

    Raises:
        ValueError: there is no reward; ask :func:`has_rewards` before.
    """
    reward = comparison.trained_reward()
    if reward is None:
        raise ValueError(f"no reward was measured in {comparison.world}")
    others = _witnesses(comparison)
    with mpl.rc_context(theme.settings):
        canvas, panels = _panels(comparison, len(comparison.rows), len(others))
        for axes, column in zip(panels, others, strict=True):
            _scatter(axes, comparison, reward, column, theme)
        shown = [row for row in comparison.rows if row.figure(reward) is not None]
        points = [_point(comparison, row, theme, hollow=_trained(row, reward)) for row in shown]
        _legend(canvas, [*points, *_explanations(comparison, shown, reward, theme)])
    return canvas


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


def _witnesses(comparison: Comparison) -> list[Column]:
    return [c for names in (ORACLE_METRICS, DISTANCE_METRICS) if (c := comparison.column(*names)) is not None]


def _curves(comparison: Comparison, row: Row) -> tuple[NDArray, NDArray, NDArray] | None:
    """Radius (K,), power per training seed (S, K) and the power of real (K,)."""
    column = comparison.column(*SPECTRUM_METRICS)
    results = [found for seed in row.members if column and (found := row.result(column, seed)) is not None]
    extras = [result.extra for result in results if "power" in result.extra]
    if not extras:
        return None
    radius, reference = (np.asarray(extras[0][key], float) for key in ("radius", "reference_power"))
    powers = np.asarray([extra["power"] for extra in extras], float)
    kept = radius > 0
    return radius[kept], powers[:, kept], reference[kept]


def _spectrum_label(comparison: Comparison, row: Row) -> str:
    column = comparison.column("hfer_gap_db")
    figure = row.figure(column) if column else None
    if column is None or figure is None or len(comparison.rows) > MAX_NAMED:
        return _label(comparison, row)
    gap = format_number(figure.value, column.metric.decimals, signed=True)
    return f"{_label(comparison, row)}: HFER {gap} dB"


def _finish_spectra(left: Axes, right: Axes, theme: Theme) -> None:
    for axes in (left, right):
        axes.axvspan(HFER_RADIUS, axes.get_xlim()[1], color=theme.faint, alpha=0.45, lw=0, zorder=0)
        axes.set_xscale("log", base=2)
        low, high = axes.dataLim.intervalx
        octaves = 2.0 ** np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
        axes.set_xticks(octaves, [f"1/{round(1 / tick)}" for tick in octaves])
        axes.minorticks_off()
        axes.set_xlim(low, high)
        axes.set_xlabel("spatial frequency (cycles/pixel)")
    left.set_ylabel("radial luma power (dB)")
    right.set_ylabel("gap to real (dB)")
    left.set_title("Power spectrum")
    right.set_title("Gap to real images")
    left.annotate(
        "HFER counts\nabove 1/4", (HFER_RADIUS, 0.98), xycoords=("data", "axes fraction"), xytext=(5, 0),
        textcoords="offset points", fontsize=8, va="top", alpha=0.85,
    )  # fmt: skip


def _scatter(axes: Axes, comparison: Comparison, reward: Column, column: Column, theme: Theme) -> None:
    for row in comparison.rows:
        x, y = row.figure(reward), row.figure(column)
        if x is None or y is None:
            continue
        bars = {"xerr": _error(x.value, x.low, x.high), "yerr": _error(y.value, y.low, y.high)}
        point = _point(comparison, row, theme, hollow=x.in_sample)
        axes.errorbar(x.value, y.value, **bars, color=point.get_color(), lw=1.1, capsize=2, ls="none")
        axes.add_line(point).set_data([x.value], [y.value])
    lower_is_better = column.metric.direction == "lower"
    axes.margins(0.12)
    axes.autoscale_view()
    if lower_is_better:
        axes.invert_yaxis()
    axes.set_xlabel(_axis(reward))
    axes.set_ylabel(f"{_axis(column)}{', better upwards' if lower_is_better else ''}")
    axes.set_title(f"{reward.metric.label} against {column.metric.label}")
    lcd = _lcd(comparison)
    x, y = (lcd.figure(reward), lcd.figure(column)) if lcd else (None, None)
    if x is not None and y is not None:
        _shade(axes, x.value, y.value, theme)


def _shade(axes: Axes, x: float, y: float, theme: Theme) -> None:
    """Shades where the reward is above LCD's and the other evidence below it on the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([x, right], bottom, y, color=theme.methods["rg_lcd"], alpha=0.08, lw=0, zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _point(comparison: Comparison, row: Row, theme: Theme, *, hollow: bool) -> Line2D:
    style = _style(comparison, row, theme)
    return Line2D(
        [], [], color=style["color"], marker=style["marker"], ms=12 if style["marker"] == "*" else 8, mew=1.8,
        ls="none", mfc=theme.paper if hollow else style["color"], label=_label(comparison, row), zorder=5,
    )  # fmt: skip


def _explanations(comparison: Comparison, rows: list[Row], reward: Column, theme: Theme) -> list[Artist]:
    """Legend entries for the hollow points and the shaded corner, where there are any."""
    entries: list[Artist] = []
    if any(_trained(row, reward) for row in rows):
        hollow = {"color": theme.ink, "mfc": theme.paper, "marker": "o", "ms": 7, "mew": 1.2, "ls": "none"}
        entries.append(Line2D([], [], **hollow, label="hollow: trained on this reward"))
    if _lcd(comparison) in rows:
        entries.append(Patch(color=theme.methods["rg_lcd"], alpha=0.16, lw=0, label="reward above LCD, evidence worse"))
    return entries


def _trained(row: Row, reward: Column) -> bool:
    figure = row.figure(reward)
    return figure is not None and figure.in_sample


def _lcd(comparison: Comparison) -> Row | None:
    return next((row for row in comparison.rows if row.method == "lcd"), None)


def _panels(comparison: Comparison, num_rows: int, num_panels: int = 2) -> tuple[Canvas, list[Axes]]:
    lines = _legend_lines(min(num_rows, MAX_NAMED) + 2)
    canvas = Canvas(figsize=(5.0 * num_panels, 4.1 + 0.19 * lines), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(1, num_panels, squeeze=False)[0]
    canvas.suptitle(f"World: {comparison.world}", fontsize=8.5, x=0.995, ha="right", alpha=0.75)
    return canvas, list(axes)


def _legend(canvas: Canvas, handles: list[Artist]) -> None:
    handles = [handle for handle in handles if str(handle.get_label()) != UNLISTED]
    labels = [str(handle.get_label()) for handle in handles]
    columns = -(-len(handles) // _legend_lines(len(handles)))
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.6)


def _legend_lines(num_entries: int) -> int:
    return -(-num_entries // 3)


def _style(comparison: Comparison, row: Row, theme: Theme) -> dict[str, Any]:
    place = [other for other in comparison.rows if other.method == row.method].index(row)
    marker = "*" if row.method == "teacher" and place == 0 else MARKERS[place % len(MARKERS)]
    colour = theme.methods.get(row.method, theme.methods["external"])
    return {"color": colour, "ls": LINES[place % len(LINES)], "marker": marker}


def _label(comparison: Comparison, row: Row) -> str:
    """The shortest name that is this row's alone, cut to 48 characters; of many rows, one name per method."""
    same = [other for other in comparison.rows if other.method == row.method]
    if len(comparison.rows) > MAX_NAMED:
        several = f", {len(same)} models" if len(same) > 1 else ""
        return f"{row.method_label}{several}" if row is same[0] else UNLISTED
    text = row.method_label if len(same) == 1 else f"{row.method_label} {row.model_label}, {row.sampler_label}"
    if len({other.model_label for other in same}) == 1 and len(same) > 1:
        text = f"{row.method_label}, {row.sampler_label}"
    return (text if len(text) <= 48 else text[:47] + "…").replace("$", r"\$")


def _axis(column: Column) -> str:
    unit = f" ({column.metric.unit})" if column.metric.unit else ""
    return f"{column.metric.label}{unit} {ARROWS[column.metric.direction]}".replace("$", r"\$")


def _error(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    return None if low is None or high is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _decibel(power: NDArray) -> NDArray:
    return 10 * np.log10(np.maximum(power, np.finfo(float).tiny))
