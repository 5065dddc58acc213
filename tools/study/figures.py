"""One figure for each study, in the report's style; the same results give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rgbench.metrics.statistics import t_interval
from rgbench.metrics.values import Direction, MetricInfo, metric_info
from rgbench.report.plots import COLOURS, INK, PAPER, drawing
from rgbench.report.tables import ARROWS
from rgbench.train.recipe import load_recipe
from tools.study.analyse import REWARD, Measured, Point, choices, match_best_of_n
from tools.study.plan import GOLD_NAME, Arm

SHOWN = (GOLD_NAME, "gold_win_rate", "fd_efflite0", "band_db")
ALONG = (GOLD_NAME, "kd_efflite0", "band_db")
OF_ARMS = ("band_db", GOLD_NAME, "fd_efflite0", REWARD)
PANEL = (3.6, 3.3)  # inches
FAINT_DOT = {"ls": "none", "marker": ".", "ms": 4, "alpha": 0.45, "mew": 0}


def draw(measured: Measured) -> Figure | None:
    """The study's figure; None where no arm has results."""
    study = measured.study
    if not any(measured.values(arm, REWARD) for arm in study.arms):
        return None
    with drawing():
        figure = _curves(measured) if study.curves else _choices(measured) if study.draws else _arms(measured)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def label(measured: Measured, metric: str) -> str:
    """The metric with its unit and the arrow of its good end; differences to real images say so."""
    info = metric_info(measured.name(metric))
    gap = " against real" if info.direction is Direction.REFERENCE else ""
    return f"{info.label}{gap}{f' ({info.unit})' if info.unit else ''} {ARROWS[info.direction]}"


def info_of(measured: Measured, metric: str) -> MetricInfo:
    """The metric's info; of ``gold`` that of the metric that is."""
    return metric_info(measured.name(metric))


def spread(values: Iterable[float]) -> Point | None:
    """Mean with its 95 % t interval; of one value that value thrice; None of none."""
    found = list(values)
    return t_interval(found) if len(found) > 1 else (found[0],) * 3 if found else None


def _figure(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Figure, entries: Sequence[Line2D]) -> None:
    figure.legend(handles=entries, loc="outside lower left", ncols=len(entries))


def _colour(measured: Measured, arm: str) -> str:
    return COLOURS.get(measured.study.arms[arm].recipe, INK)


def _dot(axes: Axes, x: Point, y: Point, colour: str, **look: object) -> None:
    """A mean with both its intervals."""
    bars = {"xerr": [[x[0] - x[1]], [x[2] - x[0]]], "yerr": [[y[0] - y[1]], [y[2] - y[0]]]}
    axes.errorbar(x[0], y[0], **bars, **{"color": colour, "marker": "o", "ms": 5, "lw": 1, "capsize": 2, **look})


def _note(axes: Axes, text: str, x: float, y: float, arm: Arm) -> None:
    """A point's share: of direct guidance below it, of the proxy above, so that near points do not hide them."""
    at = (-14, 6) if arm.recipe == "lrm" else (5, -11)
    axes.annotate(text, (x, y), at, textcoords="offset points", fontsize=7.5, color=COLOURS.get(arm.recipe, INK))


def share_of(arm: Arm) -> str:
    """The reward's share of the gradient; "" without a reward."""
    guidance = getattr(load_recipe(arm.recipe, arm.set), "guidance", None)
    return f"{guidance.share:g}" if guidance is not None and guidance.share is not None else ""


def _entry(text: str, colour: str, **look: object) -> Line2D:
    return Line2D([], [], **{"color": colour, "label": text, "marker": "o", "ms": 5, "lw": 1.4, **look})


# Strength: curves over the trained reward


def _curves(measured: Measured) -> Figure:
    with_along = any(measured.along(arm, REWARD) for arm in measured.study.arms)
    shown = measured.shown(SHOWN)
    figure, panels = _figure(2 if with_along else 1, len(shown))
    for axes, metric in zip(panels[0], shown, strict=True):
        for curve in measured.study.curves:
            _curve(axes, measured, curve.arms, metric)
        axes.set(xlabel=label(measured, REWARD), ylabel=label(measured, metric))
        axes.set_title(info_of(measured, metric).label)
    if with_along:
        for axes, metric in zip(panels[1][:-1], ALONG, strict=False):
            _along(axes, measured, metric)
        _by_step(panels[1][-1], measured)
    entries = [_entry("LCD", COLOURS["lcd"], marker="s", ls="none")]
    for curve in measured.study.curves:
        shares = ", ".join(text for text in curve.arms if float(text))
        entries.append(_entry(f"{curve.name}: shares {shares}", _colour(measured, list(curve.arms.values())[-1])))
    _legend(figure, [*entries, _entry("one training seed", INK, **FAINT_DOT)])
    return figure


def _curve(axes: Axes, measured: Measured, arms: dict[str, str], metric: str) -> None:
    colour, means = _colour(measured, list(arms.values())[-1]), []
    for text, arm in arms.items():
        rewards, values = measured.values(arm, REWARD), measured.values(arm, metric)
        common = [seed for seed in rewards if seed in values]
        x, y = spread(rewards[seed] for seed in common), spread(values[seed] for seed in common)
        if x is None or y is None:
            continue
        own = colour if float(text) else COLOURS["lcd"]
        axes.plot([rewards[s] for s in common], [values[s] for s in common], color=own, **FAINT_DOT)
        _dot(axes, x, y, own, marker="o" if float(text) else "s")
        if float(text):
            _note(axes, text, x[0], y[0], measured.study.arms[arm])
        means.append((x[0], y[0]))
    axes.plot([x for x, _ in means], [y for _, y in means], color=colour, lw=1.4, zorder=1)


def _along(axes: Axes, measured: Measured, metric: str) -> None:
    """Paths of single runs, a point each checkpoint."""
    for arm in measured.study.arms:
        xs, ys = measured.along(arm, REWARD), measured.along(arm, metric)
        steps = [step for step in xs if step in ys]
        colour = _colour(measured, arm)
        axes.plot([xs[s] for s in steps], [ys[s] for s in steps], color=colour, marker=".", ms=4, lw=1)
        if steps:
            axes.plot(xs[steps[-1]], ys[steps[-1]], color=colour, marker="o", ms=6)
            _note(axes, share_of(measured.study.arms[arm]), xs[steps[-1]], ys[steps[-1]], measured.study.arms[arm])
    axes.set(xlabel=label(measured, REWARD), ylabel=label(measured, metric))
    axes.set_title("Along training, ● last step")


def _by_step(axes: Axes, measured: Measured) -> None:
    for arm in measured.study.arms:
        curve = measured.along(arm, GOLD_NAME)
        axes.plot(list(curve), list(curve.values()), color=_colour(measured, arm), marker=".", ms=4, lw=1)
    axes.set(xlabel="optimiser step", ylabel=label(measured, GOLD_NAME))
    axes.set_title("Along training")


# Antialias: arms side by side


def _arms(measured: Measured) -> Figure:
    figure, panels = _figure(1, len(OF_ARMS))
    arms = [arm for arm in measured.study.arms if measured.values(arm, REWARD)]
    for axes, metric in zip(panels[0], OF_ARMS, strict=True):
        for place, arm in enumerate(arms):
            values = measured.values(arm, metric)
            found = spread(values.values())
            if found is None:
                continue
            colour, y = _colour(measured, arm), -float(place)
            axes.plot(list(values.values()), [y + 0.18] * len(values), color=colour, **FAINT_DOT)
            look = {"mfc": PAPER} if len(values) < len(measured.study.seeds(measured.study.base)) else {}
            _dot(axes, found, (y, y, y), colour, **look)
        is_first = axes is panels[0][0]
        axes.set_yticks([-float(place) for place in range(len(arms))], arms if is_first else [""] * len(arms))
        axes.set(xlabel=label(measured, metric))
        axes.set_title(info_of(measured, metric).label)
    _legend(figure, [_entry("mean, 95 % over seeds", INK), _entry("fewer seeds: a control", INK, mfc=PAPER)])
    return figure


# Best of n


def _choices(measured: Measured) -> Figure:
    figure, panels = _figure(1, 1)
    figure.set_size_inches(6.4, 4.6)
    axes, found = panels[0][0], list(choices(measured).values())
    if found:
        rewards, golds = (np.mean([getattr(each, name) for each in found], axis=0) for name in ("rewards", "golds"))
        for each in found:
            axes.plot(each.rewards, each.golds, color=COLOURS["lcd"], lw=0.7, alpha=0.4)
        axes.plot(rewards, golds, color=COLOURS["lcd"], lw=1.8, marker=".", ms=6)
        for n in (2, 4, 8):
            if n <= len(rewards):
                axes.annotate(
                    f"n = {n}", (rewards[n - 1], golds[n - 1]), (5, -10), textcoords="offset points", fontsize=8
                )
    for arm in measured.study.arms:
        matched = match_best_of_n(measured, arm) if arm != measured.study.base else {}
        x, y = (spread(getattr(each, name) for each in matched.values()) for name in ("reward", "gold"))
        if x is not None and y is not None:
            _dot(axes, x, y, _colour(measured, arm))
            _note(axes, share_of(measured.study.arms[arm]), x[0], y[0], measured.study.arms[arm])
    reward, gold = info_of(measured, REWARD), info_of(measured, GOLD_NAME)
    axes.set(xlabel=f"{reward.label}, gained over LCD", ylabel=f"{gold.label}, gained over LCD")
    entries = [_entry("best of n of LCD", COLOURS["lcd"]), _entry("direct", COLOURS["rg_lcd"], ls="none")]
    _legend(figure, [*entries, _entry("latent proxy", COLOURS["lrm"], ls="none")])
    return figure
