"""What one world contributes to a report, made once and used by every format."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from rgbench.reporting import plots
from rgbench.reporting.details import detail_tables
from rgbench.reporting.gather import BENCHTOP, BENCHTOP_NOTE, Comparison
from rgbench.reporting.grids import Grid, choose
from rgbench.reporting.plots import Theme
from rgbench.reporting.tables import Table, cost_tables, tables

GRID_TITLE = "The same prompts and seeds from every model"


@dataclass(frozen=True)
class Plot:
    """A plot by file stem; `alt` says in words what it shows."""

    stem: str
    title: str
    alt: str
    draw: Callable[[Comparison, Theme], Canvas]
    drawable: Callable[[Comparison], bool]


PLOTS = (
    Plot(
        "spectra",
        "Radial spectra and their gap to real",
        "Line plot of radially averaged luma power against spatial frequency for each model and real images, "
        "and beside it each model's gap to real in decibels.",
        plots.spectra,
        plots.has_spectra,
    ),
    Plot(
        "rewards",
        "The trained reward against other evidence",
        "Scatter of each model's trained reward against the oracle and against the set distance.",
        plots.rewards,
        plots.has_rewards,
    ),
)


@dataclass(frozen=True)
class Section:
    """A world's comparison with its tables, drawable plots and image grid."""

    comparison: Comparison
    note: str
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    grid: Grid | None

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.comparison.world.lower()).strip("-") or "world"

    def plot_name(self, plot: Plot, suffix: str) -> str:
        return f"{plot.stem}-{self.slug}.{suffix}"

    @property
    def grid_name(self) -> str:
        return f"grid-{self.slug}.png"

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """(title, PNG file name) of everything there is to see."""
        shown = [(f"{plot.title}, {self.comparison.world}", self.plot_name(plot, "png")) for plot in self.plots]
        return shown + ([(f"{GRID_TITLE}, {self.comparison.world}", self.grid_name)] if self.grid else [])


def section(comparison: Comparison, results: Path) -> Section:
    """Tables, the plots that have data, and the chosen images of one world."""
    note = BENCHTOP_NOTE if comparison.world == BENCHTOP else ""
    drawable = tuple(plot for plot in PLOTS if plot.drawable(comparison))
    return Section(
        comparison,
        note,
        (*tables(comparison), *detail_tables(comparison), *cost_tables(comparison)),
        drawable,
        choose(comparison, results),
    )
