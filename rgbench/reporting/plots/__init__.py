"""The report's plots, in its order. Each has data in the results, or a word on why it is not drawn."""

from rgbench.reporting.plots import distributions, fidelity, fragility, octaves, rewards, spectra, training, wins
from rgbench.reporting.plots.drawing import DARK, LIGHT, PANEL_INCHES, Plot, Theme, png, svg

PLOTS: tuple[Plot, ...] = tuple(
    module.PLOT for module in (rewards, training, spectra, octaves, distributions, wins, fragility, fidelity)
)

__all__ = ["DARK", "LIGHT", "PANEL_INCHES", "PLOTS", "Plot", "Theme", "png", "svg"]
