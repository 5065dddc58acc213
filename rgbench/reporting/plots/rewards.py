"""The trained reward against other evidence: the oracle, and the set distance with its Pareto front.

A reward is cheap to raise; the front shows what each reward level costs at best, over
all students, their reward scales and their checkpoints.
"""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from rgbench.metrics.overopt import pareto as overopt
from rgbench.reporting.gather import Column, Comparison, Row
from rgbench.reporting.plots.drawing import LIGHT, Plot, Theme, axis_label, error, label, legend, panels, style
from rgbench.reporting.trajectory import Trajectory, trajectories

ORACLES = ("oracle_all", "oracle_mean")
DISTANCES = ("fid", "fd_efflite0")
FRONT = (0, (1, 2))
Points = list[tuple[float, float]]


def lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    if comparison.trained_reward() is None:
        return "no reward was measured; add --metric hps"
    return (
        "" if _witnesses(comparison) else "neither an oracle nor a set distance was measured; add --metric oracle,fid"
    )


def draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """The trained reward (x) against the oracle and the set distance (y, good end up).

    Raises:
        ValueError: there is no reward; ask :func:`lacking` before.
    """
    reward = comparison.trained_reward()
    if reward is None:
        raise ValueError(f"no reward was measured in {comparison.world}")
    others = _witnesses(comparison)
    with mpl.rc_context(theme.settings):
        canvas, drawn = panels(comparison, len(comparison.rows) + 2, len(others))
        fronts = [_scatter(axes, comparison, reward, other, theme) for axes, other in zip(drawn, others, strict=True)]
        shown = [row for row in comparison.rows if row.figure(reward) is not None]
        points = [_point(comparison, row, theme, hollow=_trained(row, reward)) for row in shown]
        legend(canvas, [*points, *_explanations(comparison, shown, reward, theme), *filter(None, fronts)])
    return canvas


def pareto_front(points: Points, *, lower_is_better: bool) -> Points:
    """The points that no other one beats in reward (x, higher is better) and evidence (y) at once, by x.

    >>> pareto_front([(1, 5), (2, 4), (2, 6), (3, 9), (3, 8)], lower_is_better=True)
    [(2, 4), (3, 8)]
    """
    sign = 1 if lower_is_better else -1
    unbeaten = overopt.pareto_front([x for x, _ in points], [sign * y for _, y in points])
    return sorted({point for point, kept in zip(points, unbeaten, strict=True) if kept})


def _witnesses(comparison: Comparison) -> list[Column]:
    return [column for names in (ORACLES, DISTANCES) if (column := comparison.column(*names)) is not None]


def _scatter(axes: Axes, comparison: Comparison, reward: Column, column: Column, theme: Theme) -> Line2D | None:
    """One panel; its Pareto front, where there is one."""
    lower_is_better = column.metric.direction == "lower"
    reached: Points = []
    for row in comparison.rows:
        x, y = row.figure(reward), row.figure(column)
        if x is None or y is None:
            continue
        bars = {"xerr": error(x.value, x.low, x.high), "yerr": error(y.value, y.low, y.high)}
        point = _point(comparison, row, theme, hollow=x.in_sample)
        axes.errorbar(x.value, y.value, **bars, color=point.get_color(), lw=1.1, capsize=2, ls="none")
        axes.add_line(point).set_data([x.value], [y.value])
        if row.method != "teacher":
            reached.append((x.value, y.value))
    for run in trajectories(comparison):
        if (path := _path(run, reward, column))[1:]:
            look = style(comparison, run.row, theme)
            axes.plot(*zip(*path, strict=True), color=look["color"], marker=".", ms=4, lw=0.9, alpha=0.7, zorder=3)
            reached += path
    front = _front(axes, reached, theme, lower_is_better=lower_is_better) if column.metric.name in DISTANCES else None
    axes.margins(0.12)
    axes.autoscale_view()
    if lower_is_better:
        axes.invert_yaxis()
    axes.set_xlabel(axis_label(reward))
    axes.set_ylabel(f"{axis_label(column)}{', better upwards' if lower_is_better else ''}")
    axes.set_title(f"{reward.metric.label} against {column.metric.label}")
    lcd = _lcd(comparison)
    x, y = (lcd.figure(reward), lcd.figure(column)) if lcd else (None, None)
    if x is not None and y is not None:
        _shade(axes, x.value, y.value, theme)
    return front


def _path(run: Trajectory, reward: Column, column: Column) -> Points:
    """A run's checkpoints on the axes, where they were measured under the axes' own protocols."""
    names = reward.metric.name, column.metric.name
    if any(
        name not in run.columns or run.columns[name].key != axis.key
        for name, axis in zip(names, (reward, column), strict=True)
    ):
        return []
    xs, ys = (run.curve(name) for name in names)
    return [(xs[step], ys[step]) for step in run.points if step in xs and step in ys]


def _front(axes: Axes, reached: Points, theme: Theme, *, lower_is_better: bool) -> Line2D | None:
    front = pareto_front(reached, lower_is_better=lower_is_better)
    if len(reached) < 2:
        return None
    (line,) = axes.plot(*zip(*front, strict=True), color=theme.ink, lw=1.4, ls=FRONT, marker="None", zorder=2)
    line.set_label("Pareto front of students, checkpoints")
    return line


def _shade(axes: Axes, x: float, y: float, theme: Theme) -> None:
    """Shades where the reward is above LCD's and the other evidence below it on the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([x, right], bottom, y, color=theme.methods["rg_lcd"], alpha=0.08, lw=0, zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _point(comparison: Comparison, row: Row, theme: Theme, *, hollow: bool) -> Line2D:
    look = style(comparison, row, theme)
    return Line2D(
        [], [], color=look["color"], marker=look["marker"], ms=12 if look["marker"] == "*" else 8, mew=1.8,
        ls="none", mfc=theme.paper if hollow else look["color"], label=label(comparison, row), zorder=5,
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


PLOT = Plot(
    "rewards",
    "The trained reward against other evidence",
    "Scatter of each model's trained reward against the oracle and against the set distance, with the Pareto front "
    "of reward and distance.",
    draw,
    lacking,
)
