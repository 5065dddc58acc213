"""Plots of the report, in its order: each is drawn from the results of one world, or says why it cannot be.

Colours are those of Okabe and Ito (2008), told apart with any colour vision; models of one method differ by line style
and marker as well. The same results give the same bytes: a fixed hash salt for SVG ids, no dates, no version. Figures
are drawn under matplotlib's defaults and the settings here, never a user's, and without pyplot's global state.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rgbench.judge.compare import win_rate
from rgbench.judge.models import EXTERNAL, LCD, TEACHER, Column, Model, ResultSet
from rgbench.judge.paired import prompt_means
from rgbench.judge.trajectory import TrainingRun, pareto_front
from rgbench.metrics.values import Family, MetricValue
from rgbench.report.tables import lead_column, octave_name
from rgbench.report.words import ARROWS, ends, gold_of, model_of, names, proxy_words, runs_along, variant

COLOURS = {"teacher": "#CC79A7", "lcd": "#0072B2", "rg_lcd": "#D55E00", "lrm": "#009E73", "external": "#E69F00"}
DARK_COLOURS = {**COLOURS, "lcd": "#56B4E9", "rg_lcd": "#F0803C", "lrm": "#2BC99A"}
PAPER, INK, FAINT = "#ffffff", "#24292f", "#e3e6ea"
LIGHT = {"paper": PAPER, "ink": INK, "faint": FAINT, **COLOURS}
DARK = {"paper": "#161b22", "ink": "#d6dce4", "faint": "#30363d", **DARK_COLOURS}
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("*", "o", "s", "D", "^", "v", "P", "X")  # in the order of COLOURS
ZERO = {"color": INK, "lw": 1.4, "ls": (0, (4, 2)), "zorder": 4}
SETTINGS: dict[str, Any] = {
    **{key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith(("backend", "interactive"))},
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.linewidth": 0.8,
    "grid.color": FAINT, "grid.linewidth": 0.6, "figure.facecolor": PAPER, "axes.facecolor": PAPER,
    "font.size": 9.5, "font.family": "DejaVu Sans", "legend.frameon": False, "legend.fontsize": 9,
    "svg.hashsalt": "rgbench", "svg.fonttype": "path",
}  # fmt: skip
MAX_NAMED = 9  # models that the legend names one by one; of more, it names the methods
MAX_NAME = 48  # characters of a name
CUTOFF = 0.25  # cycles/pixel above which HFER counts energy
PANEL_INCHES = 5.0  # width of one panel
LEGEND_INCHES = 0.19  # height of a line of the legend
UNLISTED = "_nolegend_"
POINT = "point-"  # id of a model's marker, with its place among the models
Looks = dict[str, Any]
Draw = Callable[[ResultSet], Figure]


class NothingToDraw(Exception):
    """The results lack what a plot shows; says how to measure it."""


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        stem: of its files.
        title: above it.
        alt: what it shows, in words.
        figure: draws it; raises :class:`NothingToDraw`.
        note: what it says of the results, in words; "" for nothing.
    """

    stem: str
    title: str
    alt: str
    figure: Draw
    note: Callable[[ResultSet], str]


PLOTS: list[Plot] = []


def _plot(title: str, note: Callable[[ResultSet], str] = lambda _: "") -> Callable[[Draw], Draw]:
    """Adds a function to the report's plots, under its own name; its docstring begins with what the plot shows."""

    def add(figure: Draw) -> Draw:
        PLOTS.append(Plot(figure.__name__, title, _shows(figure), figure, note))
        return figure

    return add


def _shows(figure: Draw) -> str:
    return " ".join((figure.__doc__ or "").partition("\n\n")[0].split())


def draw(results: ResultSet) -> tuple[dict[Plot, Figure], list[str]]:
    """Every plot that the results have data for, and for each other one what is missing."""
    found: dict[Plot, Figure] = {}
    missing = []
    for plot in PLOTS:
        try:
            found[plot] = _laid_out(plot.figure, results)
        except NothingToDraw as reason:
            missing.append(f"{plot.title}: {reason}")
    return found, missing


def draw_answer(results: ResultSet) -> tuple[Plot, Figure] | None:
    """The page's first plot; None where gold or the trained reward was not measured."""
    gold = next((column.family is not Family.SET_DISTANCE for column in evidence(results)), False)
    title = f"{'Gold' if gold else 'Set distance'} against trained reward"
    plot = Plot("answer", title, _shows(answer), answer, lambda _: "")
    try:
        return plot, _laid_out(answer, results)
    except NothingToDraw:
        return None


def _laid_out(draw: Draw, results: ResultSet) -> Figure:
    """A figure whose layout is the same in all its files."""
    with drawing():
        figure = draw(results)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def save(figure: Figure, kind: str, **settings: Any) -> bytes:
    """The figure as a file of kind "svg", or "png" at 160 dots per inch; the same bytes each time."""
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with drawing(**settings):
        figure.savefig(out, format=kind, dpi=160 if kind == "png" else 72, metadata=metadata)
    return out.getvalue()


@contextmanager
def drawing(**settings: Any) -> Iterator[None]:
    """Our settings alone; no word on letters that the font lacks, as of a world's name in Chinese."""
    with mpl.rc_context({**SETTINGS, **settings}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


# Trained reward against other evidence


@_plot("Trained reward against other evidence")
def rewards(results: ResultSet) -> Figure:
    """Scatter of each model's trained reward against the oracle and the set distance (good end up), with Pareto fronts.

    A reward is cheap to raise; the front shows what each of its values costs at best, over all students, their
    recipes and their checkpoints.
    """
    reward, others = _axes_of_rewards(results)
    models = [model for model in results.models if model.value(reward) is not None]
    figure, drawn = _panels(results, len(others), len(models) + 3)
    for axes, other in zip(drawn, others, strict=True):
        _scatter(axes, results, reward, other)
    entries: list[Artist] = [_point(results, model, reward) for model in models]
    if any(_trained(model, reward) for model in models):
        hollow = {"color": INK, "mfc": PAPER, "marker": "o", "ms": 7, "mew": 1.2, "ls": "none"}
        entries.append(Line2D([], [], **hollow, label="hollow: trained on this reward"))
    if any(model.method == LCD for model in models):
        entries.append(Patch(color=COLOURS["rg_lcd"], alpha=0.16, lw=0, label="reward above LCD, evidence worse"))
    entries.append(Line2D([], [], color=INK, lw=1.4, ls=(0, (1, 2)), label="Pareto front of students, checkpoints"))
    _legend(figure, entries)
    return figure


def _axes_of_rewards(results: ResultSet) -> tuple[Column, list[Column]]:
    reward, others = results.trained_reward(), evidence(results)
    if reward is None:
        raise NothingToDraw("no reward was measured; run rgbench eval --metric hps")
    if not others:
        raise NothingToDraw("neither an oracle nor a set distance was measured; run rgbench eval --metric oracle,fid")
    return reward, others


def answer(results: ResultSet) -> Figure:
    """Scatter of each model's gold against its trained reward with 95 % intervals, and a dot for each training seed.

    Shaded is where the reward is above LCD's and gold below.
    """
    reward, (gold, *_) = _axes_of_rewards(results)
    figure, (axes,) = _panels(results, 1, 0)
    _scatter(axes, results, reward, gold)
    axes.set_title("")
    points = [(line, line.get_xydata()[0]) for line in axes.lines if str(line.get_gid()).startswith(POINT)]
    if len(points) > MAX_NAMED:
        return figure
    last = -np.inf
    for line, place in sorted(points, key=lambda point: axes.transData.transform(point[1])[1]):
        y = max(axes.transData.transform(place)[1] + 5, last + 11)  # dots: names stay a line apart
        last = y
        shift = (y - axes.transData.transform(place)[1]) * 72 / figure.dpi
        left = axes.transAxes.inverted().transform(axes.transData.transform(place))[0] > 0.7
        axes.annotate(
            str(line.get_label()), place, xytext=(-8 if left else 8, shift), textcoords="offset points",
            ha="right" if left else "left", fontsize=8.5, zorder=7,
        )  # fmt: skip
    return figure


def evidence(results: ResultSet) -> list[Column]:
    """What the trained reward is held against: the oracle, or else a held-out reward, and the set distance."""
    found = [
        lead_column(results, Family.ORACLE) or lead_column(results, Family.HELD_OUT),
        lead_column(results, Family.SET_DISTANCE),
    ]
    return [column for column in found if column is not None]


def _scatter(axes: Axes, results: ResultSet, reward: Column, other: Column) -> None:
    reached: list[tuple[float, float]] = []
    for model in results.models:
        x, y = model.value(reward), model.value(other)
        if x is None or y is None or x.value is None or y.value is None:
            continue
        point = _point(results, model, reward)
        point.set_gid(f"{POINT}{results.models.index(model)}")
        seeds = [(model.result(reward, seed), model.result(other, seed)) for seed in model.results]
        dots = [(a.value, b.value) for a, b in seeds if a is not None and b is not None]
        if len(dots) > 1:
            axes.plot(*zip(*dots, strict=True), color=point.get_color(), marker=".", ms=4, ls="none", alpha=0.45)
        bars = {"xerr": _error(x), "yerr": _error(y)}
        axes.errorbar(x.value, y.value, **bars, color=point.get_color(), lw=1.1, capsize=2, ls="none")
        axes.add_line(point).set_data([x.value], [y.value])
        if model.method != TEACHER:
            reached.append((x.value, y.value))
    for run in runs_along(results):
        xs, ys = run.curve(reward), run.curve(other)
        path = [(xs[step], ys[step]) for step in xs if step in ys]
        if len(path) > 1:
            look = _look(results, model_of(results, run))
            axes.plot(*zip(*path, strict=True), color=look["color"], marker=".", ms=4, lw=0.9, alpha=0.7, zorder=3)
            reached += path
    goods = [other.oriented(y) or 0.0 for _, y in reached]
    on_front = pareto_front([x for x, _ in reached], [-good for good in goods])
    front = sorted({point for point, kept in zip(reached, on_front, strict=True) if kept})
    if len(reached) > 1:
        axes.plot(*zip(*front, strict=True), color=INK, lw=1.4, ls=(0, (1, 2)), zorder=2, label="Pareto front")
    axes.margins(0.12)
    axes.autoscale_view()
    down = (other.oriented(1.0) or 0.0) < 0
    if down:
        axes.invert_yaxis()
    axes.set(xlabel=_axis_label(reward), ylabel=f"{_axis_label(other)}{', better upwards' if down else ''}")
    axes.set_title(f"{reward.label} against {other.label}")
    _shade(axes, results, reward, other)


def _shade(axes: Axes, results: ResultSet, reward: Column, other: Column) -> None:
    """Shades where the reward is above LCD's and the other evidence below it on the axes."""
    lcd = next((model for model in results.models if model.method == LCD), None)
    x, y = (lcd.value(reward), lcd.value(other)) if lcd else (None, None)
    if x is None or y is None:
        return
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([x.value, right], bottom, y.value, color=COLOURS["rg_lcd"], alpha=0.08, lw=0, zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _point(results: ResultSet, model: Model, reward: Column) -> Line2D:
    look = _look(results, model)
    return Line2D(
        [], [], color=look["color"], marker=look["marker"], ms=12 if look["marker"] == "*" else 8, mew=1.8, ls="none",
        mfc=PAPER if _trained(model, reward) else look["color"], label=_label(results, model), zorder=5,
    )  # fmt: skip


def _trained(model: Model, reward: Column) -> bool:
    value = model.value(reward)
    return value is not None and value.in_sample


# Along training


@_plot("Gold against proxy along training")
def training(results: ResultSet) -> Figure:
    """Lines of each run's trained reward and gold by optimiser step, and of gold against the trained reward.

    A triangle marks the hack step, where gold peaks while the trained reward still rises.
    """
    if not runs_along(results):
        raise NothingToDraw(
            "trained reward against held-out evidence over training. Train with train.keep_checkpoints=10, then run "
            "rgbench eval --checkpoints"
        )
    proxy, gold = axes_of(results)
    if proxy is None or gold is None:
        raise NothingToDraw("no checkpoint has its trained reward beside an oracle or another reward")
    runs = [run for run in runs_along(results) if run.curve(proxy).keys() & run.curve(gold).keys()]
    figure, drawn = _panels(results, 3, len(runs) + 1)
    for run in runs:
        look = _look(results, model_of(results, run))
        line = {"color": look["color"], "ls": look["ls"], "marker": ".", "ms": 5, "lw": 1.5}
        for axes, column in zip(drawn, (proxy, gold), strict=False):
            _curve(axes, run, column, line)
        xs, ys = run.curve(proxy), run.curve(gold)
        both = [step for step in xs if step in ys]
        drawn[2].plot([xs[step] for step in both], [ys[step] for step in both], **line)
        drawn[2].plot(xs[both[-1]], ys[both[-1]], color=look["color"], marker="o", ms=7)
    marks = [mark for run in runs if run.proxy is proxy and (mark := _mark(drawn, run, gold)) is not None]
    for axes, column, title in zip(drawn, (proxy, gold), ("Trained reward (proxy)", "Gold"), strict=False):
        axes.set(xlabel="optimiser step", ylabel=_axis_label(column))
        axes.set_title(f"{title}: {column.label}")
    drawn[2].set(xlabel=_axis_label(proxy), ylabel=_axis_label(gold))
    drawn[2].set_title("Gold against proxy, ● last step")
    models = list(dict.fromkeys(model_of(results, run) for run in runs))
    _legend(figure, [*(_line_entry(results, model) for model in models), *marks[:1]])
    return figure


def axes_of(results: ResultSet) -> tuple[Column | None, Column | None]:
    """Proxy and gold of the first run that was trained on a reward; without one, of the first run all the same."""
    reward = results.trained_reward()
    for run in sorted(runs_along(results), key=lambda run: run.proxy is None):
        proxy, gold = run.proxy or (reward and run.longest(results, reward)), gold_of(run)
        if proxy is not None and gold is not None and proxy.metric != gold.metric:
            return proxy, gold
    return None, None


def _curve(axes: Axes, run: TrainingRun, column: Column, line: Looks) -> None:
    curve = run.curve(column)
    axes.plot(list(curve), list(curve.values()), **line)
    intervals = {step: run.points[step].by_key[column.key].interval for step in curve}
    known = {step: interval for step, interval in intervals.items() if interval is not None}
    low, high = ([getattr(interval, end) for interval in known.values()] for end in ("low", "high"))
    axes.fill_between(list(known), low, high, color=line["color"], alpha=0.13, lw=0)


def _mark(drawn: Sequence[Axes], run: TrainingRun, gold: Column) -> Artist | None:
    """Marks the hack step on the gold panel, with the steps that are not clearly worse, and on the path."""
    hack = run.hack(gold)
    if hack is None or run.proxy is None:
        return None
    x, y = run.curve(run.proxy)[hack.step], run.curve(gold)[hack.step]
    look = {"color": INK, "marker": "v", "ms": 9, "ls": "none", "zorder": 6}
    stretch = [[hack.step - hack.first], [hack.end - hack.step]]
    drawn[1].errorbar(hack.step, y, xerr=stretch, capsize=3, lw=1.1, **look)
    drawn[2].plot(x, y, **look)
    text = "hack step: gold peaks, the trained reward still rises (bar: steps not clearly worse)"
    return Line2D([], [], color=INK, marker="v", ms=8, ls="none", label=text)


# Spectra


@_plot("Radial spectra against real images and the teacher")
def spectra(results: ResultSet) -> Figure:
    """Lines of each model's radial luma power by spatial frequency, in dB against real images and the teacher.

    Bands are the range of training seeds. Without real images the power itself is drawn.
    """
    column = holding(results, "power")
    if column is None:
        raise NothingToDraw("no result holds a spectrum; run rgbench eval --metric spectrum")
    held = {model: _extras(model, column, "power") for model in results.models}
    powers = {model: np.asarray([extra["power"] for extra in found], float) for model, found in held.items() if found}
    first = next(found[0] for found in held.values() if found)
    radius, real = np.asarray(first["radius"], float), first.get("reference_power")
    kept, teacher = radius > 0, results.teacher
    bases: dict[str, NDArray] = {}
    if real is None:
        bases["Power spectrum"] = np.ones_like(radius)
    else:
        bases["Gap to real images"] = np.asarray(real, float)
    if teacher in powers and len(powers) > 1:
        bases["Gap to the teacher"] = powers[teacher].mean(axis=0)
    figure, drawn = _panels(results, len(bases), len(powers))
    for axes, (title, base) in zip(drawn, bases.items(), strict=True):
        axes.set_title(title)
        axes.set(xlabel="spatial frequency (cycles/pixel)", ylabel=f"{title[0].lower()}{title[1:]} (dB)")
        if title != "Power spectrum":
            axes.axhline(0, **ZERO)
        for model, power in powers.items():
            if not (model is teacher and "teacher" in title):
                line = _band(axes, radius[kept], decibel(power / base)[:, kept], _look(results, model))
                line.set_label(_label(results, model))
        _octave_ticks(axes)
    _legend(figure, drawn[0].get_legend_handles_labels()[0])
    return figure


def _octave_ticks(axes: Axes) -> None:
    """A logarithmic axis of frequencies, the band above 1/4 shaded."""
    low, high = axes.dataLim.intervalx
    axes.axvspan(CUTOFF, high, color=FAINT, alpha=0.45, lw=0, zorder=0)
    note = {"xycoords": ("data", "axes fraction"), "xytext": (5, 0), "textcoords": "offset points"}
    box = {"color": PAPER, "alpha": 0.8, "lw": 0, "pad": 1}  # over the line at zero
    axes.annotate("HFER: share\nabove 1/4", (CUTOFF, 0.98), **note, fontsize=8, va="top", bbox=box, zorder=6)
    axes.set_xscale("log", base=2)
    octaves = 2.0 ** np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
    axes.set_xticks(octaves, [f"1/{round(1 / tick)}" for tick in octaves])
    axes.minorticks_off()
    axes.set_xlim(low, high)


@_plot("Energy gap to real, octave by octave")
def octaves(results: ResultSet) -> Figure:
    """Lines of each model's energy gap to real images in dB by octave, for luma and chroma; bands: training seeds."""
    keys = {"octave_gaps_db": "Luma", "chroma_octave_gaps_db": "Chroma"}
    columns = {key: column for key in keys if (column := holding(results, key)) is not None}
    if not columns:
        raise NothingToDraw("no result holds octave gaps; run rgbench eval --metric spectrum")
    figure, drawn = _panels(results, len(columns), len(results.models))
    for axes, (key, column) in zip(drawn, columns.items(), strict=True):
        held = {model: _extras(model, column, key) for model in results.models}
        bands = list(dict.fromkeys(name for found in held.values() for extra in found for name in extra[key]))
        axes.axhline(0, **ZERO)
        for model, found in held.items():
            if found:
                gaps = np.asarray([[extra[key].get(name, np.nan) for name in bands] for extra in found], float)
                look = _look(results, model)
                line = _band(axes, np.arange(len(bands)), gaps, look)
                line.set(marker=look["marker"], ms=6, label=_label(results, model))
        axes.set_xticks(range(len(bands)), [octave_name(name) for name in bands])
        axes.set(xlabel="octave (cycles/pixel)", ylabel="energy gap to real (dB)")
        axes.set_title(keys[key])
    _legend(figure, drawn[0].get_legend_handles_labels()[0])
    return figure


def decibel(power: NDArray) -> NDArray:
    """10 log₁₀."""
    return 10 * np.log10(np.maximum(power, np.finfo(float).tiny))


def _band(axes: Axes, places: NDArray, lines: NDArray, look: Looks) -> Line2D:
    """The mean over training seeds, and the band between the lowest and the highest of them."""
    (line,) = axes.plot(places, lines.mean(axis=0), color=look["color"], ls=look["ls"], lw=1.7)
    if len(lines) > 1:
        axes.fill_between(places, lines.min(axis=0), lines.max(axis=0), color=look["color"], alpha=0.18, lw=0)
    return line


def holding(results: ResultSet, key: str) -> Column | None:
    """The column with a key in the extra of its values; of several the one that most models have."""
    found = [column for column in results.columns if any(_extras(model, column, key) for model in results.models)]
    return max(found, key=results.num_models, default=None)


def _extras(model: Model, column: Column, key: str) -> list[Mapping[str, Any]]:
    """Extra of each training seed that has a key."""
    values = (model.result(column, seed) for seed in model.results)
    return [value.extra for value in values if value is not None and value.extra.get(key)]


# Single images


@_plot("Rewards of single images")
def distributions(results: ResultSet) -> Figure:
    """Histograms of each model's rewards of single images on shared bins, with median and range from 5 to 95 %.

    All training seeds together, for up to two rewards.
    """
    trained = results.trained_reward()
    families = (Family.REWARD, Family.HELD_OUT)
    others = [column for column in results.columns if column.family in families and column is not trained]
    ranked = [trained, *sorted(others, key=results.num_models, reverse=True)]
    found = {column: scores for column in ranked if column is not None and (scores := scores_of(results, column))}
    if not found:
        raise NothingToDraw("no result holds a reward of each image; run rgbench eval --metric hps")
    shown = dict(list(found.items())[:2])
    most = max(map(len, shown.values()))
    figure, drawn = _panels(results, len(shown), 0, height=1.4 + 0.42 * most)
    for axes, (column, scores) in zip(drawn, shown.items(), strict=True):
        _ridges(axes, results, scores)
        axes.set_xlabel(f"{_axis_label(column)} of single images\nbar: 5 to 95 %, tick: median; 0.4 % lie outside")
        axes.set_title(column.label)
    return figure


def scores_of(results: ResultSet, column: Column) -> dict[Model, NDArray]:
    """Per-image values of each model that has them, all its training seeds together."""
    found = {}
    for model in results.models:
        rows = [model.results[seed].rows(*column.key) for seed in model.seeds(column)]
        values = [kept.values for kept in rows if kept is not None]
        if values:
            found[model] = np.concatenate(values)
    return found


def _ridges(axes: Axes, results: ResultSet, scores: dict[Model, NDArray]) -> None:
    low, high = np.quantile(np.concatenate(list(scores.values())), [0.002, 0.998])
    edges = np.linspace(low, high, 49) if high > low else np.linspace(low - 0.5, low + 0.5, 49)
    for place, (model, values) in enumerate(reversed(scores.items())):
        counts = np.histogram(values, edges)[0]
        heights = place + 0.9 * counts / max(1, counts.max())
        colour = _look(results, model)["color"]
        axes.stairs(heights, edges, baseline=place, color=colour, fill=True, alpha=0.35)
        axes.stairs(heights, edges, baseline=place, color=colour, lw=1.1)
        axes.plot(np.quantile(values, [0.05, 0.95]), [place, place], color=colour, lw=2.4, solid_capstyle="butt")
        axes.plot(np.median(values), place, marker="|", ms=11, mew=2.2, color=INK, zorder=5)
    axes.set_yticks(range(len(scores)), [_label(results, model, tick=True) for model in reversed(scores)])
    axes.tick_params("y", length=0)
    axes.set_ylim(-0.25, len(scores) - 0.1 + 0.15)


@_plot("Win rates, prompt by prompt")
def wins(results: ResultSet) -> Figure:
    """Matrices of the share of prompts on which the row's model beats the column's, by trained reward and by oracle."""
    columns = {}
    for column in (results.trained_reward(), *evidence(results)[:1]):
        if column is not None:
            columns[column] = [m for m in results.models if any(_has_rows(m, column, s) for s in m.seeds(column))]
    columns = {column: models[:60] for column, models in columns.items() if len(models) > 1}
    if not columns:
        raise NothingToDraw("no two models hold scores of the same images; run rgbench eval --metric hps for two")
    most = max(map(len, columns.values()))
    figure, drawn = _panels(results, len(columns), 0, height=min(9.0, 2.0 + 0.42 * most))
    for axes, (column, models) in zip(drawn, columns.items(), strict=True):
        image = _matrix(axes, results, column, models)
    label = "win rate of row over column (%), ties = ½\n(…) = not significant"
    figure.colorbar(image, ax=drawn, shrink=0.8, label=label).outline.set_visible(False)
    return figure


def _has_rows(model: Model, column: Column, seed: int | None) -> bool:
    return prompt_means(model.results[seed], column) is not None


def _matrix(axes: Axes, results: ResultSet, column: Column, models: Sequence[Model]) -> mpl.image.AxesImage:
    rates: NDArray = np.full((len(models), len(models)), np.nan)
    even: NDArray = np.zeros_like(rates, dtype=bool)
    for i, model in enumerate(models):
        for j, other in enumerate(models[:i]):
            found = win_rate(model, other, column)
            if found is not None:
                rates[i, j], rates[j, i] = 100 * found.rate, 100 - 100 * found.rate
                even[i, j] = even[j, i] = found.interval.low <= 0.5 <= found.interval.high
    axes.grid(False)
    image = axes.imshow(rates, cmap="PuOr", vmin=0, vmax=100)
    texts = [_label(results, model, tick=True) for model in models]
    axes.set_xticks(range(len(models)), texts, rotation=90 if len(models) > 4 else 20)
    axes.set_yticks(range(len(models)), texts)
    named = len(models) <= 10
    axes.tick_params(length=0, labelsize=9 if named else 6)
    axes.spines[:].set_visible(False)
    mark = "†" if any(_trained(model, column) for model in models) else ""
    axes.set_title(f"{column.label}{mark}: row against column")
    for i, j in np.argwhere(np.isfinite(rates)) if named else ():
        ink = "#1f2328" if abs(rates[i, j] - 50) <= 33 else "#fffffe"  # on cells whose colours no theme changes
        written = f"({rates[i, j]:.0f})" if even[i, j] else f"{rates[i, j]:.0f}"
        axes.text(j, i, written, ha="center", va="center", color=ink)
    return image


# What the reward is worth


@_plot("Fragility of the reward")
def fragility(results: ResultSet) -> Figure:
    """Points of the reward that each model loses under small changes of its images: their mean, and each change."""
    column = holding(results, "drops")
    if column is None:
        raise NothingToDraw("fragility was not measured; run rgbench eval --metric fragility")
    drops = {model: _drops(model, column) for model in results.models}
    drops = {model: found for model, found in drops.items() if found}
    changes = list(dict.fromkeys(name for found in drops.values() for name in found))
    figure, (left, right) = _panels(results, 2, len(drops))
    for place, (model, found) in enumerate(drops.items()):
        look, value = _look(results, model), model.value(column)
        dot = {"color": look["color"], "marker": look["marker"], "ls": "none"}
        if value is not None:
            left.errorbar(place, value.value, yerr=_error(value), ms=8, capsize=3, lw=1.3, **dot)
        shift = 0.7 * (place + 0.5) / len(drops) - 0.35
        heights = [found.get(name, np.nan) for name in changes]
        right.plot(np.arange(len(changes)) + shift, heights, ms=7, label=_label(results, model), **dot)
    below = [_label(results, model, tick=True) for model in drops]
    left.set_xticks(range(len(drops)), below, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    left.set_xlim(-0.6, len(drops) - 0.4)
    right.set_xticks(range(len(changes)), [CHANGES.get(name, name.replace("_", " ")) for name in changes])
    right.grid(visible=False, axis="x")
    for edge in range(len(changes) - 1):
        right.axvline(edge + 0.5, color=FAINT, lw=0.8)
    for axes, title in ((left, "Mean over the changes"), (right, "By change")):
        axes.axhline(0, **ZERO)
        axes.set_ylabel("extra reward drop vs. real images" if column.reference else "reward drop")
        axes.set_title(title)
    _legend(figure, right.get_legend_handles_labels()[0])
    return figure


CHANGES = {
    "jpeg75": "JPEG 75", "blur1": "blur, 1 px", "half_size": "half size\nand back", "shift1": "shift, 1 px",
    "noise2": "noise, 2/255",
}  # fmt: skip


def _drops(model: Model, column: Column) -> dict[str, float]:
    """Mean drop by change, over the model's training seeds."""
    found = [extra["drops"] for extra in _extras(model, column, "drops")]
    changes = dict.fromkeys(name for each in found for name in each)
    return {name: float(np.mean([each[name] for each in found if name in each])) for name in changes}


def _proxies(results: ResultSet) -> str:
    worth = {model: proxy_words(model) for model in results.models}
    return " ".join(f"{names(results)[model]}: {text}" for model, text in worth.items() if text)


@_plot("The latent proxy's agreement with its expert", _proxies)
def fidelity(results: ResultSet) -> Figure:
    """Lines of how far each latent proxy orders images as its expert does, by optimiser step.

    Drawn from the training logs: the share of training pairs, and what was measured on held-out samples
    (``fidelity/kendall_tau``), over all timesteps and in bins of them (``fidelity/kendall_tau/BIN``). Lines are running
    means over all training seeds, bands the range of the seeds' own.
    """
    logs = {model: [log for r in model.results.values() if (log := r.training_log)] for model in results.models}
    keys = {_measure(key) for found in logs.values() for log in found for row in log for key in row}
    measures = [*sorted(key for key in keys if key.startswith("fidelity/")), *({"pair_accuracy"} & keys)][:4]
    if not measures:
        raise NothingToDraw("no evaluated run has a latent proxy; train one with recipes/lrm.yaml")
    figure, drawn = _panels(results, len(measures), len(logs))
    for axes, measure in zip(drawn, measures, strict=True):
        plain = measure.removeprefix("fidelity/")
        for model, found in logs.items():
            _progress(axes, found, measure, _look(results, model), _label(results, model))
        text, chance = AGREEMENT.get(plain, (plain.replace("_", " "), None))
        if chance is not None:
            axes.axhline(chance, **ZERO)
            where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axes.annotate("chance", (1, chance), **where, fontsize=8)
        axes.set(xlabel="optimiser step", ylabel=text)
        source = "training pairs" if plain == measure else "held-out samples"
        axes.set_title(f"{plain.replace('_', ' ').capitalize()}, {source}")
    handles = [handle for axes in drawn for handle in axes.get_legend_handles_labels()[0]]
    _legend(figure, list({handle.get_label(): handle for handle in handles}.values()))
    return figure


AGREEMENT = {
    "pair_accuracy": ("pairs ordered as the expert does (share)", 0.5),
    "kendall_tau": ("Kendall's τ", 0.0),
    "gradient_cosine": ("cosine of the gradients", 0.0),
}


def _progress(axes: Axes, logs: Sequence[Sequence[Mapping[str, float]]], measure: str, look: Looks, text: str) -> None:
    keys = sorted({key for log in logs for row in log for key in row if _measure(key) == measure})
    for place, key in enumerate(keys):
        curves = [[(row["step"], row[key]) for row in log if key in row] for log in logs]
        seeds = [np.asarray(points, float).T for points in curves if points]
        steps = np.unique(np.concatenate([steps for steps, _ in seeds]))
        width = max(1, len(steps) // 10)
        values = np.stack([np.interp(steps, x, _running_mean(y, width)) for x, y in seeds])
        where = key.removeprefix(measure).strip("/")
        line = _band(axes, steps, values, look if not place else {**look, "ls": LINES[place % len(LINES)]})
        line.set_label(f"{text}, {where}" if where else text)


def _running_mean(values: NDArray, width: int) -> NDArray:
    """Mean of the `width` points around each, of fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _measure(key: str) -> str:
    """A logged name without its timestep bin."""
    return "/".join(key.split("/")[:2])


# What all plots share


def _panels(results: ResultSet, num: int, num_entries: int, *, height: float = 4.1) -> tuple[Figure, list[Axes]]:
    """A row of equally wide panels, with room for a legend below."""
    lines = _legend_lines(min(num_entries, MAX_NAMED) + 2)
    figure = Figure(figsize=(PANEL_INCHES * num, height + LEGEND_INCHES * lines), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"World: {results.world}", fontsize=8.5, x=0.995, ha="right", alpha=0.75)
    return figure, list(figure.subplots(1, num, squeeze=False)[0])


def _legend(figure: Figure, handles: Iterable[Artist]) -> None:
    """One legend for all panels, below them; of so many columns as the figure is wide for."""
    handles = [handle for handle in handles if str(handle.get_label()) != UNLISTED]
    if not handles:
        return
    labels = [str(handle.get_label()) for handle in handles]
    planned = _legend_lines(len(handles))
    for columns in range(-(-len(handles) // planned), 0, -1):
        look = {"loc": "outside lower left", "ncols": columns, "handlelength": 2.6, "columnspacing": 1.6}
        made = figure.legend(handles, labels, **look)
        if columns == 1 or made.get_window_extent().width <= figure.bbox.width:
            break
        made.remove()
    figure.set_figheight(figure.get_figheight() + LEGEND_INCHES * (-(-len(handles) // columns) - planned))


def _legend_lines(num_entries: int) -> int:
    """Lines that a legend takes, of up to three entries each."""
    return -(-num_entries // 3)


def _line_entry(results: ResultSet, model: Model) -> Line2D:
    look = _look(results, model)
    return Line2D([], [], color=look["color"], ls=look["ls"], marker=".", label=_label(results, model))


def _look(results: ResultSet, model: Model) -> Looks:
    """Colour by method, line style by the model's place within it; the marker by variant, where there are several."""
    place = [other for other in results.models if other.method == model.method].index(model)
    method = model.method if model.method in COLOURS else "external"
    trained = [other for other in results.models if other.method not in (TEACHER, EXTERNAL)]
    variants = list(dict.fromkeys(variant(other, results) for other in trained))
    by_variant = len(variants) > 1 and model in trained
    at = 1 + variants.index(variant(model, results)) if by_variant else list(COLOURS).index(method) + place
    return {"color": COLOURS[method], "ls": LINES[place % len(LINES)], "marker": MARKERS[at % len(MARKERS)]}


def _label(results: ResultSet, model: Model, *, tick: bool = False) -> str:
    """The model's name; in the legend of many models the method's name, once."""
    same = [other for other in results.models if other.method == model.method]
    text, room = names(results)[model], 28 if tick else MAX_NAME
    if len(results.models) > MAX_NAMED and not tick:
        several = f", {len(same)} models" if len(same) > 1 else ""
        text = f"{model.method_label}{several}" if model is same[0] else UNLISTED
    return (text if len(text) <= room else text[: room - 1] + "…").replace("$", r"\$")


def _axis_label(column: Column) -> str:
    """The metric with its unit and the arrow of its good end."""
    unit = f" ({column.unit})" if column.unit else ""
    arrow = f" {ARROWS[column.info.direction]}" if column.has_good_end else ""
    return f"{column.label}{unit}{arrow}".replace("$", r"\$")


def _error(value: MetricValue) -> list[list[float]] | None:
    """An interval as matplotlib's error bars take it."""
    low, high = ends(value)
    if low is None or high is None or value.value is None:
        return None
    return [[max(value.value - low, 0.0)], [max(high - value.value, 0.0)]]
