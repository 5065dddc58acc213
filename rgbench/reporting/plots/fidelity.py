"""How far the latent proxy agrees with its expert along training: what the proxy's reward is worth.

Drawn from what the run logged: the share of training pairs that the proxy orders as the
expert does, and what was measured on held-out student samples (``fidelity/kendall_tau``),
over all timesteps and in bins of them (``fidelity/kendall_tau/BIN``).
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from rgbench.evaluation.logged import Row as Logged
from rgbench.reporting.gather import Comparison, Row
from rgbench.reporting.plots.drawing import LIGHT, LINES, Plot, Theme, label, legend, panels, place_in_method, style

PAIRS, HELD_OUT = "pair_accuracy", "fidelity/"
CHANCE = {"pair_accuracy": 0.5, "kendall_tau": 0.0, "gradient_cosine": 0.0}
UNITS = {
    "pair_accuracy": "pairs ordered as the expert does (share)",
    "kendall_tau": "Kendall's τ",
    "gradient_cosine": "cosine of the gradients",
}
MAX_PANELS = 4
MANY = 30  # points from which on a line is drawn through their running mean


def lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    return "" if _measures(comparison) else "no evaluated run has a latent proxy; train one with recipes/lrm.yaml"


def draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """One panel per measure by optimiser step; lines of one run are its timestep bins, of two rows two styles."""
    measures = _measures(comparison)[:MAX_PANELS]
    logs = {row: found for row in comparison.rows if (found := _logs(comparison, row, measures))}
    with mpl.rc_context(theme.settings):
        canvas, drawn = panels(comparison, len(logs), len(measures))
        for axes, name in zip(drawn, measures, strict=True):
            for row, logged in ((row, logged) for row, found in logs.items() for logged in found):
                colour, first = style(comparison, row, theme)["color"], place_in_method(comparison, row)
                _lines(axes, logged, name, colour, first, label(comparison, row))
            plain = name.removeprefix(HELD_OUT)
            if plain in CHANCE:
                axes.axhline(CHANCE[plain], color=theme.ink, lw=1.2, ls=(0, (4, 2)))
            axes.set_xlabel("optimiser step")
            axes.set_ylabel(UNITS.get(plain, plain.replace("_", " ")))
            where = "held-out samples" if name.startswith(HELD_OUT) else "training pairs"
            axes.set_title(f"{plain.replace('_', ' ').capitalize()}, {where}")
        handles = [handle for axes in drawn for handle in axes.get_legend_handles_labels()[0]]
        legend(canvas, list({handle.get_label(): handle for handle in handles}.values()))
    return canvas


def _lines(axes: Axes, logged: list[Logged], name: str, colour: str, first: int, text: str) -> None:
    for place, key in enumerate(_keys(logged, name), first):
        points = [(row["step"], row[key]) for row in logged if key in row]
        where = key.removeprefix(name).strip("/")
        look = {"color": colour, "ls": LINES[place % len(LINES)], "lw": 1.4}
        name_of = f"{text}, {where}" if where else text
        steps, values = (np.asarray(side, float) for side in zip(*points, strict=True))
        if len(points) < MANY:
            axes.plot(steps, values, **look, marker=".", label=name_of)
        else:
            axes.plot(steps, values, color=colour, lw=0.6, alpha=0.35)
            width = len(points) // 10
            axes.plot(steps, _running_mean(values, width), **look, label=f"{name_of} (mean of {width} points)")


def _running_mean(values: NDArray, width: int) -> NDArray:
    """Mean of the `width` points around each, of fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _logs(comparison: Comparison, row: Row, measures: list[str]) -> list[list[Logged]]:
    """What the row's runs logged, where any of the measures is in it."""
    found = (comparison.logs.get(result.generation.id, []) for result in row.first_results)
    return [logged for logged in found if any(_keys(logged, name) for name in measures)]


def _keys(logged: list[Logged], name: str) -> list[str]:
    return sorted({key for row in logged for key in row if _measure(key) == name})


def _measure(key: str) -> str:
    """A logged name without its timestep bin."""
    return "/".join(key.split("/")[:2])


def _measures(comparison: Comparison) -> list[str]:
    """Held-out ones first, then that of the training pairs."""
    keys = {_measure(key) for logged in comparison.logs.values() for row in logged for key in row}
    return [*sorted(key for key in keys if key.startswith(HELD_OUT)), *([PAIRS] if PAIRS in keys else [])]


PLOT = Plot(
    "fidelity",
    "The latent proxy's agreement with its expert",
    "Line plots against the optimiser step of how far each run's latent proxy orders images as its expert does.",
    draw,
    lacking,
)
