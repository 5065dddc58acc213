"""Gold against proxy along training: where the trained reward still rises and the independent evidence does not."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from rgbench.reporting.gather import Comparison, Row
from rgbench.reporting.plots.drawing import LIGHT, Plot, Theme, axis_label, label, legend, panels, style
from rgbench.reporting.trajectory import Trajectory, trajectories

LACKING = "no checkpoint was evaluated; keep some with train.keep_checkpoints and run `rgbench eval --checkpoints`"


def lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    if not trajectories(comparison):
        return LACKING
    return (
        ""
        if axes_of(comparison)
        else "the checkpoints' results hold no trained reward beside an oracle or another reward"
    )


def axes_of(comparison: Comparison) -> tuple[str, str] | None:
    """The metrics of proxy and gold: those of the runs that were trained on a reward."""
    for run in trajectories(comparison):
        if run.proxy is not None and run.gold is not None:
            return run.proxy, run.gold
    return None


def draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """Proxy and gold by optimiser step with their intervals, and gold against proxy; hack steps are marked.

    Raises:
        ValueError: no run has both; ask :func:`lacking` before.
    """
    names = axes_of(comparison)
    if names is None:
        raise ValueError(f"no run of {comparison.world} has a trained reward and gold at its checkpoints")
    runs = [run for run in trajectories(comparison) if set(names) <= run.columns.keys()]
    with mpl.rc_context(theme.settings):
        canvas, drawn = panels(comparison, len(runs) + 1, 3)
        for run in runs:
            look = style(comparison, run.row, theme)
            line = {"color": look["color"], "ls": look["ls"], "marker": ".", "ms": 5, "lw": 1.5}
            for axes, name in zip(drawn, names, strict=False):
                _curve(axes, run, name, line)
            proxy, gold = (run.curve(name) for name in names)
            both = [step for step in run.points if step in proxy and step in gold]
            drawn[2].plot([proxy[step] for step in both], [gold[step] for step in both], **line)
            if both:
                drawn[2].plot(proxy[both[-1]], gold[both[-1]], color=look["color"], marker="o", ms=7)
        marks = [mark for run in runs for mark in _mark(drawn, run, names, theme)]
        _name(drawn, runs[0], names)
        rows = list(dict.fromkeys(run.row for run in runs))
        legend(canvas, [*(_entry(comparison, row, theme) for row in rows), *marks[:1]])
    return canvas


def _curve(axes: Axes, run: Trajectory, name: str, line: dict[str, object]) -> None:
    curve = run.curve(name)
    axes.plot(list(curve), list(curve.values()), **line)
    intervals = {step: run.points[step][name].interval for step in curve}
    known = [step for step, interval in intervals.items() if interval is not None]
    low, high = ([getattr(intervals[step], end) for step in known] for end in ("low", "high"))
    axes.fill_between(known, low, high, color=line["color"], alpha=0.13, lw=0)


def _mark(drawn: list[Axes], run: Trajectory, names: tuple[str, str], theme: Theme) -> list[Artist]:
    """Marks the hack step on the gold panel, with the steps that are not clearly worse, and on the path."""
    hack = run.hack
    if hack is None or (run.proxy, run.gold) != names:
        return []
    proxy, gold = (run.curve(name)[hack.step] for name in names)
    look = {"color": theme.ink, "marker": "v", "ms": 9, "ls": "none", "zorder": 6}
    stretch = [[hack.step - hack.first], [hack.end - hack.step]]
    drawn[1].errorbar(hack.step, gold, xerr=stretch, capsize=3, lw=1.1, **look)
    drawn[2].plot(proxy, gold, **look)
    text = "hack step: gold peaks, the trained reward still rises (bar: steps not clearly worse)"
    return [Line2D([], [], color=theme.ink, marker="v", ms=8, ls="none", label=text)]


def _name(drawn: list[Axes], run: Trajectory, names: tuple[str, str]) -> None:
    proxy, gold = (run.columns[name] for name in names)
    for axes, column, title in zip(drawn, (proxy, gold), ("Trained reward (proxy)", "Gold"), strict=False):
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(axis_label(column))
        axes.set_title(f"{title}: {column.metric.label}")
    drawn[2].set_xlabel(axis_label(proxy))
    drawn[2].set_ylabel(axis_label(gold))
    drawn[2].set_title("Gold against proxy, ● last step")


def _entry(comparison: Comparison, row: Row, theme: Theme) -> Line2D:
    look = style(comparison, row, theme)
    return Line2D([], [], color=look["color"], ls=look["ls"], marker=".", label=label(comparison, row))


PLOT = Plot(
    "training",
    "Gold against proxy along training",
    "Line plots of each run's trained reward and of its gold figure against the optimiser step, and of gold against "
    "the trained reward; a triangle marks the step where gold peaks while the trained reward still rises.",
    draw,
    lacking,
)
