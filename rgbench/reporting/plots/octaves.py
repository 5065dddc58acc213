"""The energy gap to real images, octave by octave: what tells added noise from blur and from contrast."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from rgbench.reporting.details import octave_name
from rgbench.reporting.gather import Comparison, Row
from rgbench.reporting.plots.drawing import LIGHT, Plot, Theme, label, legend, panels, style

METRICS = ("hfer_gap_db", "band_gap_db")
PLANES = {"octave_gaps_db": "Luma", "chroma_octave_gaps_db": "Chroma"}


def lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    return "" if _planes(comparison) else "no result holds octave gaps; measure them with --metric spectrum"


def draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """One panel per plane: gap in dB by octave, the mean over training seeds with their range."""
    planes = _planes(comparison)
    with mpl.rc_context(theme.settings):
        canvas, drawn = panels(comparison, len(comparison.rows), len(planes))
        for axes, key in zip(drawn, planes, strict=True):
            found = {row: _gaps(comparison, row, key) for row in comparison.rows}
            octaves = list(dict.fromkeys(name for seeds in found.values() for gaps in seeds for name in gaps))
            axes.axhline(0, color=theme.ink, lw=1.6, ls=(0, (4, 2)))
            for row, seeds in found.items():
                _row(axes, comparison, row, [[gaps.get(name, np.nan) for name in octaves] for gaps in seeds], theme)
            axes.set_xticks(range(len(octaves)), [octave_name(name) for name in octaves])
            axes.set_xlabel("octave (cycles/pixel)")
            axes.set_ylabel("energy gap to real (dB)")
            axes.set_title(PLANES[key])
        legend(canvas, drawn[0].get_legend_handles_labels()[0])
    return canvas


def _row(axes: Axes, comparison: Comparison, row: Row, gaps: list[list[float]], theme: Theme) -> None:
    if not gaps:
        return
    values: NDArray = np.asarray(gaps, float)
    look = style(comparison, row, theme)
    places = np.arange(values.shape[1])
    axes.plot(places, values.mean(0), **look, lw=1.5, ms=6, label=label(comparison, row))
    if len(values) > 1:
        axes.fill_between(places, values.min(0), values.max(0), color=look["color"], alpha=0.18, lw=0)


def _planes(comparison: Comparison) -> list[str]:
    return [key for key in PLANES if any(_gaps(comparison, row, key) for row in comparison.rows)]


def _gaps(comparison: Comparison, row: Row, key: str) -> list[dict[str, float]]:
    """Gaps by octave, of each training seed that has them."""
    column = comparison.column(*METRICS)
    results = [row.result(column, seed) for seed in row.members] if column else []
    return [result.extra[key] for result in results if result is not None and result.extra.get(key)]


PLOT = Plot(
    "octaves",
    "Energy gap to real, octave by octave",
    "Line plot of each model's energy gap to real images in decibels against the octave band, for luma and chroma.",
    draw,
    lacking,
)
