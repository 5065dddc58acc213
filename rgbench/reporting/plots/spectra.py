"""Radial power spectra, and each row's gap to real images and to the teacher, with the band of its training seeds."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from rgbench.reporting.digits import format_number
from rgbench.reporting.gather import Comparison, Row
from rgbench.reporting.plots.drawing import LIGHT, MAX_NAMED, Plot, Theme, decibel, label, legend, panels, style

POWER, REAL, TEACHER = "Power spectrum", "Gap to real images", "Gap to the teacher"
UNITS = {POWER: "radial luma power (dB)", REAL: "gap to real (dB)", TEACHER: "gap to the teacher (dB)"}
HFER_RADIUS = 0.25  # cycles/pixel above which HFER counts
METRICS = ("hfer_gap_db", "band_gap_db", "hfer_db", "slope")  # the first that was measured


def lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    found = any(curves(comparison, row) is not None for row in comparison.rows)
    return "" if found else "no result holds a spectrum; measure it with --metric spectrum"


def draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """Radially averaged luma power in dB, each row's gap to real, and to the teacher, where those were measured."""
    found = {row: spectrum for row in comparison.rows if (spectrum := curves(comparison, row)) is not None}
    radius, _, real = next(iter(found.values()))
    taught = found.get(comparison.teacher) if comparison.teacher else None
    bases = {POWER: np.ones_like(radius)} | ({REAL: real} if real is not None else {})
    bases |= {TEACHER: taught[1].mean(axis=0)} if taught and len(found) > 1 else {}
    with mpl.rc_context(theme.settings):
        canvas, drawn = panels(comparison, len(found), len(bases))
        dashed = {"color": theme.ink, "lw": 1.6, "ls": (0, (4, 2)), "zorder": 4}
        for axes, (title, base) in zip(drawn, bases.items(), strict=True):
            axes.set_title(title)
            axes.set_ylabel(UNITS[title])
            if title != POWER:
                axes.axhline(0, **dashed)
            elif real is not None:
                axes.plot(radius, decibel(real), label="real", **dashed)
            for row, (_, powers, _) in found.items():
                _line(axes, decibel(powers / base), radius, style(comparison, row, theme)).set_label(
                    _spectrum_label(comparison, row)
                )
            _finish(axes, theme)
        _explain(drawn[0])
        legend(canvas, drawn[0].get_legend_handles_labels()[0])
    return canvas


def _line(axes: Axes, decibels: NDArray, radius: NDArray, look: dict[str, Any]) -> Line2D:
    """The mean over training seeds, and the band between the lowest and the highest of them."""
    (line,) = axes.plot(radius, decibels.mean(axis=0), color=look["color"], ls=look["ls"], lw=1.7)
    if len(decibels) > 1:
        axes.fill_between(radius, decibels.min(0), decibels.max(0), color=look["color"], alpha=0.18, lw=0)
    return line


def curves(comparison: Comparison, row: Row) -> tuple[NDArray, NDArray, NDArray | None] | None:
    """Radius (K,), power per training seed (S, K) and the power of real (K,), None where no real images were read."""
    column = comparison.column(*METRICS)
    results = [found for seed in row.members if column and (found := row.result(column, seed)) is not None]
    extras = [result.extra for result in results if "power" in result.extra]
    if not extras:
        return None
    radius, powers = np.asarray(extras[0]["radius"], float), np.asarray([extra["power"] for extra in extras], float)
    kept, reference = radius > 0, extras[0].get("reference_power")
    return radius[kept], powers[:, kept], None if reference is None else np.asarray(reference, float)[kept]


def _spectrum_label(comparison: Comparison, row: Row) -> str:
    column = comparison.column("hfer_gap_db")
    figure = row.figure(column) if column else None
    if column is None or figure is None or len(comparison.rows) > MAX_NAMED:
        return label(comparison, row)
    gap = format_number(figure.value, column.metric.decimals, signed=True)
    return f"{label(comparison, row)}: HFER {gap} dB"


def _finish(axes: Axes, theme: Theme) -> None:
    axes.axvspan(HFER_RADIUS, axes.get_xlim()[1], color=theme.faint, alpha=0.45, lw=0, zorder=0)
    axes.set_xscale("log", base=2)
    low, high = axes.dataLim.intervalx
    octaves = 2.0 ** np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
    axes.set_xticks(octaves, [f"1/{round(1 / tick)}" for tick in octaves])
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.set_xlabel("spatial frequency (cycles/pixel)")


def _explain(axes: Axes) -> None:
    axes.annotate(
        "HFER counts\nabove 1/4", (HFER_RADIUS, 0.98), xycoords=("data", "axes fraction"), xytext=(5, 0),
        textcoords="offset points", fontsize=8, va="top", alpha=0.85,
    )  # fmt: skip


PLOT = Plot(
    "spectra",
    "Radial spectra, and their gap to real and to the teacher",
    "Line plot of radially averaged luma power against spatial frequency for each model and real images, "
    "and beside it each model's gap to real and to the teacher in decibels.",
    draw,
    lacking,
)
