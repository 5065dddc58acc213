"""What one world contributes to a report, made once and used by every format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rgbench.evaluation.verdict_file import load_verdicts
from rgbench.reporting.details import detail_tables
from rgbench.reporting.gather import Comparison
from rgbench.reporting.grids import Grid, random_grid, view_grids, worst_grids
from rgbench.reporting.images import Kept, kept_images
from rgbench.reporting.plots import PLOTS, Plot
from rgbench.reporting.reading import Reading, readings
from rgbench.reporting.spectral import spectral_tables
from rgbench.reporting.tables import Table, cost_tables, tables
from rgbench.reporting.verdicts import verdict_table

BENCHTOP = "benchtop"
BENCHTOP_NOTE = (
    "Benchtop: a 1/8-scale world of rendered scenes, shipped inside the package. "
    "These figures compare methods with each other; none of them is comparable with a full-size model's."
)


@dataclass(frozen=True)
class Section:
    """A world's comparison with its tables, drawable plots and image grids.

    `undrawn` says why other plots are not there. `grids` are the random one, its further
    views, and those of the worst prompts, or nothing.
    """

    comparison: Comparison
    note: str
    readings: tuple[Reading, ...]
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    undrawn: tuple[str, ...]
    grids: tuple[Grid, ...]
    kept: Kept
    results: Path

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.comparison.world.lower()).strip("-") or "world"

    def plot_name(self, plot: Plot, suffix: str) -> str:
        return f"{plot.stem}-{self.slug}.{suffix}"

    def grid_name(self, grid: Grid) -> str:
        return f"{grid.key}-{self.slug}.png"


def section(comparison: Comparison, results: Path) -> Section:
    """Tables, the plots that have data, and the chosen images of one world."""
    note = BENCHTOP_NOTE if comparison.world == BENCHTOP else ""
    verdicts = [verdict for verdict in load_verdicts(results) if verdict.world == comparison.world]
    lacking = {plot: plot.lacking(comparison) for plot in PLOTS}
    kept = kept_images(comparison, results)
    grid = random_grid(comparison, kept)
    grids = (grid, *view_grids(grid), *worst_grids(comparison, kept)) if grid else ()
    return Section(
        comparison,
        note,
        tuple(readings(comparison, verdicts)),
        (
            *filter(None, [verdict_table(comparison, verdicts)]),
            *tables(comparison),
            *spectral_tables(comparison),
            *detail_tables(comparison),
            *cost_tables(comparison),
        ),
        tuple(plot for plot, reason in lacking.items() if not reason),
        tuple(f"{plot.title}: {reason}" for plot, reason in lacking.items() if reason),
        grids,
        kept,
        results,
    )
