"""The report's plots, in its order. Each has data in the results, or a word on why it is not drawn.

What all plots share: colours and line styles, panels and legends, files.

Colours are those of Okabe and Ito (2008), told apart with any colour vision; rows of one
method differ by line style and marker as well. Files are the same bytes for the same
results: a fixed hash salt for SVG ids, no dates, no software version.

The trained reward against other evidence: the oracle, and the set distance with its Pareto front.

A reward is cheap to raise; the front shows what each reward level costs at best, over
all students, their reward scales and their checkpoints.

Gold against proxy along training: where the trained reward still rises and the independent evidence does not.

Radial power spectra, and each row's gap to real images and to the teacher, with the band of its training seeds.

The energy gap to real images, octave by octave: what tells added noise from blur and from contrast.

How the per-image rewards are spread: a rise of the mean may be a shift of all images, or a new tail.

Win rates: on how many prompts one model's images score better than another's.

What each reward level loses under changes that people hardly see, against what real images lose.

How far the latent proxy agrees with its expert along training: what the proxy's reward is worth.

Drawn from what the run logged: the share of training pairs that the proxy orders as the
expert does, and what was measured on held-out student samples (``fidelity/kendall_tau``),
over all timesteps and in bins of them (``fidelity/kendall_tau/BIN``).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rgbench.evaluate.results import Row as Logged
from rgbench.judge import trajectory as overopt
from rgbench.judge.models import Column, Comparison, Row, scores_of, win_rate
from rgbench.report.tables import ARROWS, format_number, octave_name
from rgbench.report.words import Trajectory, trajectories

COLOURS = {"teacher": "#CC79A7", "lcd": "#0072B2", "rg_lcd": "#D55E00", "lrm": "#009E73", "external": "#E69F00"}
DARK_COLOURS = {**COLOURS, "lcd": "#56B4E9", "rg_lcd": "#F0803C", "lrm": "#2BC99A"}
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
HATCHES = ("", "////", "....", "xxxx")  # of bars, where lines have their styles
MARKERS = ("*", "o", "s", "D", "^", "v", "P", "X")  # in the order of COLOURS
MAX_NAMED = 9  # rows that the legend names one by one; of more, it names the methods
PANEL_INCHES = 5.0  # width of one panel
LEGEND_INCHES = 0.19  # height of a line of the legend
UNLISTED = "_nolegend_"


@dataclass(frozen=True)
class Theme:
    """Ink, paper and line colours of a plot."""

    paper: str
    ink: str
    faint: str
    methods: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """matplotlib settings of this theme."""
        plain = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "svg.hashsalt": "rgbench"}
        inks = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
        return {
            **plain, **dict.fromkeys(inks, self.ink), "grid.color": self.faint, "grid.linewidth": 0.6,
            "figure.facecolor": self.paper, "axes.facecolor": self.paper, "font.size": 9.5,
            "font.family": "DejaVu Sans",
            "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.linewidth": 0.8,
            "legend.frameon": False, "legend.fontsize": 8.5, "axes.axisbelow": True, "svg.fonttype": "path",
        }  # fmt: skip


LIGHT = Theme("#ffffff", "#24292f", "#e3e6ea", COLOURS)
DARK = Theme("#161b22", "#d6dce4", "#30363d", DARK_COLOURS)


@dataclass(frozen=True)
class Plot:
    """A plot by file stem; `alt` says in words what it shows, `lacking` why it cannot be drawn, or nothing."""

    stem: str
    title: str
    alt: str
    draw: Callable[[Comparison, Theme], Canvas]
    lacking: Callable[[Comparison], str]


def svg(canvas: Canvas) -> bytes:
    """The figure as SVG, the same bytes each time."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rgbench", "svg.fonttype": "path"}):
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def png(canvas: Canvas) -> bytes:
    """The figure as PNG at 160 dots per inch."""
    out = io.BytesIO()
    canvas.savefig(out, format="png", dpi=160, metadata={"Software": None})
    return out.getvalue()


def panels(
    comparison: Comparison, num_rows: int, num_panels: int = 2, *, height: float = 4.1
) -> tuple[Canvas, list[Axes]]:
    """A row of equally wide panels, with room for a legend of `num_rows` entries below."""
    lines = legend_lines(min(num_rows, MAX_NAMED) + 2)
    canvas = Canvas(figsize=(PANEL_INCHES * num_panels, height + LEGEND_INCHES * lines), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(1, num_panels, squeeze=False)[0]
    canvas.suptitle(f"World: {comparison.world}", fontsize=8.5, x=0.995, ha="right", alpha=0.75)
    return canvas, list(axes)


def legend(canvas: Canvas, handles: Sequence[Artist]) -> None:
    """One legend for all panels, below them; of so many columns as the figure is wide for."""
    handles = [handle for handle in handles if str(handle.get_label()) != UNLISTED]
    if not handles:
        return
    labels = [str(handle.get_label()) for handle in handles]
    planned = legend_lines(len(handles))
    for columns in range(-(-len(handles) // planned), 0, -1):
        look = {"loc": "outside lower left", "ncols": columns, "handlelength": 2.6, "columnspacing": 1.6}
        made = canvas.legend(handles, labels, **look)
        if columns == 1 or made.get_window_extent().width <= canvas.bbox.width:
            break
        made.remove()
    canvas.set_figheight(canvas.get_figheight() + LEGEND_INCHES * (-(-len(handles) // columns) - planned))


def legend_lines(num_entries: int) -> int:
    """Lines that a legend takes, of up to three entries each."""
    return -(-num_entries // 3)


def style(comparison: Comparison, row: Row, theme: Theme) -> dict[str, Any]:
    """Colour and first marker by method; line style and further markers by the row's place within it."""
    place = place_in_method(comparison, row)
    first = list(COLOURS).index(row.method if row.method in COLOURS else "external")
    marker = MARKERS[(first + place) % len(MARKERS)]
    colour = theme.methods.get(row.method, theme.methods["external"])
    return {"color": colour, "ls": LINES[place % len(LINES)], "marker": marker}


def place_in_method(comparison: Comparison, row: Row) -> int:
    """Which of the rows of its method it is, from 0."""
    return [other for other in comparison.rows if other.method == row.method].index(row)


def label(comparison: Comparison, row: Row) -> str:
    """The shortest name that is this row's alone, cut to 48 characters; of many rows, one name per method."""
    same = [other for other in comparison.rows if other.method == row.method]
    if len(comparison.rows) > MAX_NAMED:
        several = f", {len(same)} models" if len(same) > 1 else ""
        return f"{row.method_label}{several}" if row is same[0] else UNLISTED
    text = row.method_label if len(same) == 1 else f"{row.method_label} {row.model_label}, {row.sampler_label}"
    if len({other.model_label for other in same}) == 1 and len(same) > 1:
        text = f"{row.method_label}, {row.sampler_label}"
    return (text if len(text) <= 48 else text[:47] + "…").replace("$", r"\$")


def short_label(comparison: Comparison, row: Row) -> str:
    """For ticks: the method where it has one row, else the model, cut to 28 characters."""
    alone = sum(other.method == row.method for other in comparison.rows) == 1
    name = row.method_label if alone else row.model_label
    return (name if len(name) <= 28 else f"{name[:27]}…").replace("$", r"\$")


def axis_label(column: Column) -> str:
    """The metric with its unit and the arrow of its good end."""
    unit = f" ({column.metric.unit})" if column.metric.unit else ""
    return f"{column.metric.label}{unit} {ARROWS[column.metric.direction]}".replace("$", r"\$")


def error(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    """An interval as matplotlib's error bars take it."""
    return None if low is None or high is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def decibel(power: NDArray) -> NDArray:
    """10 log₁₀."""
    return 10 * np.log10(np.maximum(power, np.finfo(float).tiny))


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


REWARDS_PLOT = Plot(
    "rewards",
    "The trained reward against other evidence",
    "Scatter of each model's trained reward against the oracle and against the set distance, with the Pareto front "
    "of reward and distance.",
    draw,
    lacking,
)


LACKING = "no checkpoint was evaluated; keep some with train.keep_checkpoints and run `rgbench eval --checkpoints`"


def training_lacking(comparison: Comparison) -> str:
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


def training_draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
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


TRAINING_PLOT = Plot(
    "training",
    "Gold against proxy along training",
    "Line plots of each run's trained reward and of its gold figure against the optimiser step, and of gold against "
    "the trained reward; a triangle marks the step where gold peaks while the trained reward still rises.",
    training_draw,
    training_lacking,
)


POWER, REAL, TEACHER = "Power spectrum", "Gap to real images", "Gap to the teacher"
UNITS = {POWER: "radial luma power (dB)", REAL: "gap to real (dB)", TEACHER: "gap to the teacher (dB)"}
HFER_RADIUS = 0.25  # cycles/pixel above which HFER counts
METRICS = ("hfer_gap_db", "band_gap_db", "hfer_db", "slope")  # the first that was measured


def spectra_lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    found = any(curves(comparison, row) is not None for row in comparison.rows)
    return "" if found else "no result holds a spectrum; measure it with --metric spectrum"


def spectra_draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
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


SPECTRA_PLOT = Plot(
    "spectra",
    "Radial spectra, and their gap to real and to the teacher",
    "Line plot of radially averaged luma power against spatial frequency for each model and real images, "
    "and beside it each model's gap to real and to the teacher in decibels.",
    spectra_draw,
    spectra_lacking,
)


OCTAVES_METRICS = ("hfer_gap_db", "band_gap_db")
PLANES = {"octave_gaps_db": "Luma", "chroma_octave_gaps_db": "Chroma"}


def octaves_lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    return "" if _planes(comparison) else "no result holds octave gaps; measure them with --metric spectrum"


def octaves_draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
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
    column = comparison.column(*OCTAVES_METRICS)
    results = [row.result(column, seed) for seed in row.members] if column else []
    return [result.extra[key] for result in results if result is not None and result.extra.get(key)]


OCTAVES_PLOT = Plot(
    "octaves",
    "Energy gap to real, octave by octave",
    "Line plot of each model's energy gap to real images in decibels against the octave band, for luma and chroma.",
    octaves_draw,
    octaves_lacking,
)


NUM_BINS = 48
HEIGHT = 0.9  # of a row's tallest bin, in rows
INCHES_PER_ROW = 0.42


def distributions_lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    return "" if _columns(comparison) else "no result holds a reward of each image; measure one with --metric hps"


def distributions_draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """Per reward column the histogram of each row's images, all training seeds together, on shared bins."""
    columns = _columns(comparison)
    with mpl.rc_context(theme.settings):
        most = max(len(scored_rows(comparison, column)) for column in columns)
        canvas, drawn = panels(comparison, 0, len(columns), height=1.4 + INCHES_PER_ROW * most)
        for axes, column in zip(drawn, columns, strict=True):
            _ridges(axes, comparison, column, theme)
    return canvas


def scored_rows(comparison: Comparison, column: Column) -> dict[Row, NDArray]:
    """Rows with per-image scores in `column`, and these scores of all their training seeds."""
    found = {}
    for row in comparison.rows:
        results = [result for seed in row.members if (result := row.result(column, seed)) is not None]
        scores = [list(kept.values()) for result in results if (kept := row.scores(result))]
        if scores:
            found[row] = np.concatenate([np.asarray(values, float) for values in scores])
    return found


def _columns(comparison: Comparison) -> list[Column]:
    """The trained reward, and the fullest other reward beside it."""
    trained = comparison.trained_reward()
    rewards = [column for column in comparison.columns if column.metric.family == "reward" and column != trained]
    chosen = [trained, *sorted(rewards, key=comparison.num_figures, reverse=True)]
    return [column for column in chosen if column is not None and scored_rows(comparison, column)][:2]


def _ridges(axes: Axes, comparison: Comparison, column: Column, theme: Theme) -> None:
    found = scored_rows(comparison, column)
    pooled = np.concatenate(list(found.values()))
    low, high = np.quantile(pooled, [0.002, 0.998])
    edges = np.linspace(low, high, NUM_BINS + 1)
    if edges[0] == edges[-1]:
        edges = np.linspace(edges[0] - 0.5, edges[0] + 0.5, NUM_BINS + 1)
    for place, (row, scores) in enumerate(reversed(found.items())):
        counts = np.histogram(scores.clip(edges[0], edges[-1]), edges)[0]
        colour = style(comparison, row, theme)["color"]
        axes.stairs(place + HEIGHT * counts / counts.max(), edges, baseline=place, color=colour, fill=True, alpha=0.35)
        axes.stairs(place + HEIGHT * counts / counts.max(), edges, baseline=place, color=colour, lw=1.1)
        axes.plot(np.quantile(scores, [0.05, 0.95]), [place, place], color=colour, lw=2.4, solid_capstyle="butt")
        axes.plot(np.median(scores), place, marker="|", ms=11, mew=2.2, color=theme.ink, zorder=5)
    axes.set_yticks(range(len(found)), [short_label(comparison, row) for row in reversed(found)])
    axes.tick_params("y", length=0)
    axes.set_ylim(-0.25, len(found) - 1 + HEIGHT + 0.15)
    axes.set_xlabel(f"{axis_label(column)} of single images\nbar: 5 to 95 %, tick: median")
    axes.set_title(column.metric.label)


DISTRIBUTIONS_PLOT = Plot(
    "distributions",
    "Rewards of single images",
    "Histogram of each model's per-image rewards on shared bins, with the median and the range from 5 to 95 percent.",
    distributions_draw,
    distributions_lacking,
)


GOLD = ("oracle_mean", "oracle_all")
MAX_WRITTEN = 10  # models up to which the rates are written into the cells
MAX_ROWS = 60
CELL_INKS = ("#1f2328", "#fffffe")  # on pale and on full cells, whose colours no theme changes
WINS_COLOURS = "PuOr"  # diverging, told apart with any colour vision; white is an even match


def wins_lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    return (
        ""
        if _wins_columns(comparison)
        else "no two models hold scores of the same images; evaluate two with --metric hps"
    )


def wins_draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """One matrix per column of scores: row's share of wins against column's, ties half."""
    columns = _wins_columns(comparison)
    with mpl.rc_context({**theme.settings, "axes.grid": False}):
        most = max(len(_rows(comparison, column)) for column in columns)
        canvas, drawn = panels(comparison, 0, len(columns), height=min(9.0, 2.6 + 0.42 * most))
        for axes, column in zip(drawn, columns, strict=True):
            shown = _matrix(axes, comparison, column, theme)
        bar = canvas.colorbar(
            shown,
            ax=drawn,
            shrink=0.8,
            label="prompts on which the row wins (%), ties half;\nin brackets: the 95 % interval holds 50",
        )
        bar.outline.set_visible(False)
    return canvas


def _wins_columns(comparison: Comparison) -> list[Column]:
    """The trained reward, and the oracle beside it."""
    chosen = [comparison.trained_reward(), comparison.column(*GOLD)]
    return [column for column in chosen if column is not None and len(_rows(comparison, column)) > 1]


def _rows(comparison: Comparison, column: Column) -> list[Row]:
    return [row for row in comparison.rows if any(scores_of(row, seed, column) for seed in row.members)][:MAX_ROWS]


def _matrix(axes: Axes, comparison: Comparison, column: Column, theme: Theme) -> mpl.image.AxesImage:
    rows = _rows(comparison, column)
    rates: NDArray = np.full((len(rows), len(rows)), np.nan)
    even: NDArray = np.zeros_like(rates, dtype=bool)
    for i, row in enumerate(rows):
        for j, other in enumerate(rows[:i]):
            wins = win_rate(row, other, column)
            if wins is not None:
                rates[i, j], rates[j, i] = 100 * wins.rate, 100 - 100 * wins.rate
                even[i, j] = even[j, i] = wins.interval.low <= 0.5 <= wins.interval.high
    image = axes.imshow(rates, cmap=WINS_COLOURS, vmin=0, vmax=100)
    names = [short_label(comparison, row) for row in rows]
    turn = 90 if len(rows) > 4 else 20 if max(map(len, names)) > 10 else 0
    axes.set_xticks(range(len(rows)), names, rotation=turn, ha="right" if turn == 20 else "center")
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(length=0, labelsize=9 if len(rows) <= MAX_WRITTEN else 6)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{column.metric.label}: row against column")
    if len(rows) <= MAX_WRITTEN:
        for i, j in np.argwhere(np.isfinite(rates)):
            ink = CELL_INKS[int(abs(rates[i, j] - 50) > 33)]
            written = f"({rates[i, j]:.0f})" if even[i, j] else f"{rates[i, j]:.0f}"
            axes.text(j, i, written, ha="center", va="center", color=ink)
    return image


WINS_PLOT = Plot(
    "wins",
    "Win rates, prompt by prompt",
    "Matrix of the share of common prompts on which the row's image scores better than the column's, for the "
    "trained reward and for the oracle.",
    wins_draw,
    wins_lacking,
)


FRAGILITY_METRICS = ("fragility_gap", "fragility")
CHANGES = {
    "jpeg75": "JPEG 75", "blur1": "blur, 1 px", "half_size": "half size\nand back", "shift1": "shift, 1 px",
    "noise2": "noise, 2/255",
}  # fmt: skip


def fragility_lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    found = any(drops(comparison, row) for row in comparison.rows)
    return "" if found else "fragility was not measured; add --metric fragility"


def fragility_draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
    """Left the mean drop of each row with its interval, right the drop under each change.

    Raises:
        ValueError: nothing was measured; ask :func:`lacking` before.
    """
    column = comparison.column(*FRAGILITY_METRICS)
    if column is None:
        raise ValueError(f"fragility was not measured in {comparison.world}")
    rows = [row for row in comparison.rows if drops(comparison, row)]
    names = list(dict.fromkeys(name for row in rows for name in drops(comparison, row)))
    against = "more than real images lose" if column.metric.name == FRAGILITY_METRICS[0] else "reward lost"
    with mpl.rc_context(theme.settings):
        canvas, (left, right) = panels(comparison, len(rows))
        for place, row in enumerate(rows):
            look, figure = style(comparison, row, theme), row.figure(column)
            if figure is None:
                continue
            left.errorbar(
                place, figure.value, yerr=error(figure.value, figure.low, figure.high), color=look["color"],
                marker=look["marker"], ms=8, capsize=3, lw=1.3,
            )  # fmt: skip
            shift = 0.7 * (place + 0.5) / len(rows) - 0.35
            values = [drops(comparison, row).get(name, np.nan) for name in names]
            right.bar(
                np.arange(len(names)) + shift,
                values,
                0.64 / len(rows),
                color=look["color"],
                edgecolor=theme.paper,
                linewidth=0,
                hatch=HATCHES[place_in_method(comparison, row) % len(HATCHES)],
                label=label(comparison, row),
            )
        names_below = [short_label(comparison, row) for row in rows]
        left.set_xticks(range(len(rows)), names_below, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
        left.set_xlim(-0.6, len(rows) - 0.4)
        right.set_xticks(range(len(names)), [CHANGES.get(name, name.replace("_", " ")) for name in names])
        for axes, title in ((left, "Mean over the changes"), (right, "By change")):
            axes.axhline(0, color=theme.ink, lw=1.2, ls=(0, (4, 2)))
            axes.set_ylabel(f"drop of the reward, {against}")
            axes.set_title(title)
        legend(canvas, right.get_legend_handles_labels()[0])
    return canvas


def drops(comparison: Comparison, row: Row) -> dict[str, float]:
    """Mean drop by change, over the row's training seeds; empty where it was not measured."""
    column = comparison.column(*FRAGILITY_METRICS)
    results = [row.result(column, seed) for seed in row.members] if column else []
    found = [result.extra["drops"] for result in results if result is not None and result.extra.get("drops")]
    return {name: float(np.mean([seed[name] for seed in found if name in seed])) for name in found[0]} if found else {}


FRAGILITY_PLOT = Plot(
    "fragility",
    "Fragility of the reward",
    "Points with intervals of the mean drop of each model's reward under small changes, and bars of the drop under "
    "each change.",
    fragility_draw,
    fragility_lacking,
)


PAIRS, HELD_OUT = "pair_accuracy", "fidelity/"
CHANCE = {"pair_accuracy": 0.5, "kendall_tau": 0.0, "gradient_cosine": 0.0}
FIDELITY_UNITS = {
    "pair_accuracy": "pairs ordered as the expert does (share)",
    "kendall_tau": "Kendall's τ",
    "gradient_cosine": "cosine of the gradients",
}
MAX_PANELS = 4
MANY = 30  # points from which on a line is drawn through their running mean


def fidelity_lacking(comparison: Comparison) -> str:
    """Why there is nothing to draw, or nothing."""
    return "" if _measures(comparison) else "no evaluated run has a latent proxy; train one with recipes/lrm.yaml"


def fidelity_draw(comparison: Comparison, theme: Theme = LIGHT) -> Canvas:
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
            axes.set_ylabel(FIDELITY_UNITS.get(plain, plain.replace("_", " ")))
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


FIDELITY_PLOT = Plot(
    "fidelity",
    "The latent proxy's agreement with its expert",
    "Line plots against the optimiser step of how far each run's latent proxy orders images as its expert does.",
    fidelity_draw,
    fidelity_lacking,
)


PLOTS: tuple[Plot, ...] = (
    REWARDS_PLOT,
    TRAINING_PLOT,
    SPECTRA_PLOT,
    OCTAVES_PLOT,
    DISTRIBUTIONS_PLOT,
    WINS_PLOT,
    FRAGILITY_PLOT,
    FIDELITY_PLOT,
)
