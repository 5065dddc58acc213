"""The report as one offline HTML page.

One offline HTML page: words, sortable tables, plots, images, and the file and command behind every figure.

The page loads nothing: styles and script are inline, images are data URIs, and a
content security policy forbids the rest. Jinja escapes every text that comes from a
result file. Without JavaScript words, tables, plots, grids and provenance are there;
sorting, the slider, the prompt browser and zoom need it.

What the page's script works on: the prompts with their images and scores, and the runs along their training.

JSON, one object per world, with numbers as the result files have them, each beside the
text that the tables would print for it; images are numbers in the page's album.

Plots as SVG inside the page: one drawing for light and dark, its letters as text.

As files, matplotlib's drawings repeat every glyph's outline and would have to be there
once per theme; as data URIs they were a third of the page. Inside it the colours of the
light theme become CSS variables, letters stay letters (found by a search, copied, set in
the reader's font), and ids that nothing refers to are left out.

Images on the page: each once, as data URIs, all together within a budget of bytes.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure as Canvas
from PIL import Image

from rgbench.core.io import open_image
from rgbench.core.progress import Track, untracked
from rgbench.evaluate.results import Result, load_groups
from rgbench.judge.models import METHODS, Column, Row, file_of
from rgbench.report import plots
from rgbench.report.formats import Section
from rgbench.report.grids import Grid, Key, enlarge, image_index
from rgbench.report.plots import DARK, LIGHT, Theme, axes_of, decibel
from rgbench.report.tables import Cell, Table, flatten, format_figure, format_number, headlines, protocol_notes
from rgbench.report.words import Trajectory, trajectories

SMALL = 128  # images up to this side keep every pixel as long as the budget allows
# (longest side, WebP quality), from the best to the smallest; small images are lossless on the first
LEVELS = ((256, 82), (224, 70), (160, 60), (128, 45))
SAMPLE, HOPELESS = 16, 1.3  # a level is not tried where so many images foretell so many times the budget


class Album:
    """Images by file, encoded at the best of `LEVELS` at which all together fit.

    Args:
        budget: bytes of all data URIs together.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._numbers: dict[Path, int] = {}

    def add(self, file: Path) -> int:
        """The image's number; the same file has the same one."""
        return self._numbers.setdefault(file, len(self._numbers))

    def encode(self, track: Track = untracked) -> list[str]:
        """Data URIs by number; at the smallest level they may exceed the budget.

        Args:
            track: shows how far it is.

        Raises:
            UsageError: an image cannot be read.
        """
        for level in range(self._first_level(), len(LEVELS)):
            uris = self._encode_at(level, track)
            if uris is not None:
                return uris
        raise AssertionError("the last level has no limit")

    def _first_level(self) -> int:
        """The level from which on it is worth trying all images, by a sample of them."""
        files = list(self._numbers)
        sample = files[:: max(1, len(files) // SAMPLE)]
        for level in range(len(LEVELS) - 1):
            mean = sum(len(webp_uri(open_image(file), level)) for file in sample) / max(1, len(sample))
            if mean * len(files) < HOPELESS * self.budget:
                return level
        return len(LEVELS) - 1

    def _encode_at(self, level: int, track: Track) -> list[str] | None:
        """None as soon as the budget is spent, but on the last level."""
        uris: list[str] = []
        used = 0
        for file in track(list(self._numbers), "images of the page", "files"):
            uris.append(webp_uri(open_image(file), level))
            used += len(uris[-1])
            if used > self.budget and level < len(LEVELS) - 1:
                return None
        return uris


def webp_uri(image: Image.Image, level: int = 0) -> str:
    """An image as a WebP data URI; small ones without loss at level 0."""
    side, quality = LEVELS[level]
    out = io.BytesIO()
    if max(image.size) <= SMALL and level == 0:
        image.save(out, format="WEBP", lossless=True, quality=40, method=3)
    else:
        smaller = image if max(image.size) <= side else enlarge(image, side)
        smaller.save(out, format="WEBP", quality=quality, method=3)
    return data_uri(out.getvalue(), "image/webp")


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a URI that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


NUM_BROWSED = 64
MAX_BROWSED_IMAGES = 768  # of all models together; with more than 12 models fewer prompts are shown
NUM_FOLLOWED = 8  # prompts of the slider
MAX_RUNS = 8
MAX_STEPS = 12
MAX_PROMPT = 2000
SPECTRUM = "hfer_gap_db"


def page_json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def prompts_data(section: Section, album: Album) -> dict[str, Any] | None:
    """Every common prompt, in the order of the evaluation, with each model's image and per-image scores.

    None where no images were kept.
    """
    kept = section.kept
    if not kept.common:
        return None
    comparison = section.comparison
    rows = list(kept.files)
    num = min(NUM_BROWSED, max(1, MAX_BROWSED_IMAGES // len(rows)))
    columns = [column for column in headlines(comparison) if any(_scores(row, column) for row in rows)]
    groups = _groups(rows, columns)
    common = set(kept.common)
    picked = _spread([key for key in kept.files[rows[0]] if key in common], num)
    prompts = [
        {
            "id": key[0],
            "text": key[1][:MAX_PROMPT],
            "seed": key[2],
            "group": groups.get((key[0], key[2]), ""),
            "images": [album.add(kept.files[row][key]) for row in rows],
            "scores": [[_score(row, column, (key[0], key[2])) for row in rows] for column in columns],
        }
        for key in picked
    ]
    lcd = next((i for i, row in enumerate(rows) if row.method == "lcd"), None)
    return {
        "models": [_model(row) for row in rows],
        "metrics": [_metric(column) for column in columns],
        "base": lcd,
        "groups": sorted({prompt["group"] for prompt in prompts} - {""}),
        "prompts": prompts,
        "of": len(kept.common),
    }


def training_data(section: Section, album: Album) -> dict[str, Any] | None:
    """Figures, spectra and images of each run at its evaluated steps; None where no checkpoint was evaluated."""
    comparison, results = section.comparison, section.results
    runs = list(trajectories(comparison)[:MAX_RUNS])
    if not runs:
        return None
    steps = _spread(sorted({step for run in runs for step in run.points}), MAX_STEPS)
    keys = _followed(runs, steps, results)
    shown = axes_of(comparison)
    names = list(shown) if shown else list(runs[0].columns)[:2]
    names += [name for name in (SPECTRUM,) if any(name in run.columns for run in runs) and name not in names]
    columns = {name: run.columns[name] for name in names for run in runs if name in run.columns}
    return {
        "steps": steps,
        "metrics": [_metric(column) for column in columns.values()],
        "prompts": [{"id": key[0], "text": key[1][:MAX_PROMPT], "seed": key[2]} for key in keys],
        "radius": _radius(runs),
        "runs": [_run(run, steps, list(columns), keys, results, album) for run in runs],
        "more": len(trajectories(comparison)) - len(runs),
    }


def _run(
    run: Trajectory, steps: list[int], names: list[str], keys: list[Key], results: Path, album: Album
) -> dict[str, Any]:
    points = {step: run.points[step] for step in steps if step in run.points}
    hack = run.hack
    return {
        "method": run.row.method,
        "name": run.row.method_label,
        "model": run.model,
        "hack": {"step": hack.step, "first": hack.first, "end": hack.end} if hack else None,
        "figures": [[_figure(points.get(step, {}).get(name)) for step in steps] for name in names],
        "gaps": [_gap(points.get(step, {}).get(SPECTRUM)) for step in steps],
        "images": [_images(points.get(step), keys, results, album) for step in steps],
    }


def _figure(result: Result | None) -> list[Any] | None:
    """Value, the ends of its interval, and how it is printed."""
    if result is None or result.value is None:
        return None
    interval = result.interval
    low, high = (interval.low, interval.high) if interval else (None, None)
    return [result.value, low, high, format_figure(result.value, low, high, result.metric.decimals)]


def _gap(result: Result | None) -> list[float] | None:
    """dB against real by radius."""
    if result is None or "reference_power" not in result.extra:
        return None
    power, real = (np.asarray(result.extra[key], float) for key in ("power", "reference_power"))
    return [round(gap, 3) for gap in (decibel(power) - decibel(real)).tolist()]


def _radius(runs: list[Trajectory]) -> list[float]:
    for run in runs:
        for found in run.points.values():
            if SPECTRUM in found and "radius" in found[SPECTRUM].extra:
                return [round(radius, 5) for radius in found[SPECTRUM].extra["radius"]]
    return []


def _followed(runs: list[Trajectory], steps: list[int], results: Path) -> list[Key]:
    """Prompts whose images every run kept at every shown step that it was evaluated at."""
    common: set[Key] | None = None
    for run in runs:
        for step in steps:
            if step in run.points:
                index = set(_index(run.points[step], results))
                common = index if common is None else common & index
    return sorted(common or ())[:NUM_FOLLOWED]


def _images(found: dict[str, Result] | None, keys: list[Key], results: Path, album: Album) -> list[int] | None:
    if found is None or not keys:
        return None
    index = _index(found, results)
    return [album.add(index[key]) for key in keys]


def _index(found: dict[str, Result], results: Path) -> dict[Key, Path]:
    return image_index(next(iter(found.values())), results)


def _groups(rows: list[Row], columns: list[Column]) -> dict[tuple[str, int], str]:
    for row in rows:
        for column in columns:
            result = row.result(column, next(iter(row.members)))
            if result is not None and (groups := load_groups(result)):
                return groups
    return {}


def _score(row: Row, column: Column, key: tuple[str, int]) -> list[Any] | None:
    """An image's value and how it is printed."""
    value = _scores(row, column).get(key)
    if value is None:
        return None
    metric = column.metric
    return [value, f"{metric.label} {format_number(value, metric.decimals)} {metric.unit}".strip()]


def _scores(row: Row, column: Column) -> dict[tuple[str, int], float]:
    result = row.result(column, next(iter(row.members)))
    return (row.scores(result) if result is not None else None) or {}


def _model(row: Row) -> dict[str, str]:
    return {"method": row.method, "name": row.method_label, "about": f"{row.results[0].model}; {row.sampler_label}"}


def _metric(column: Column) -> dict[str, Any]:
    metric = column.metric
    what = {"name": metric.name, "label": metric.label, "unit": metric.unit}
    direction = "higher" if column.level else metric.direction  # sorted by value: no end of a level is the good one
    return {**what, "direction": direction, "target": column.target}


def _spread(items: list[Any], num: int) -> list[Any]:
    """At most `num` of the items, evenly, with the first and the last."""
    if len(items) <= num:
        return items
    places = np.linspace(0, len(items) - 1, num).round().astype(int)
    return [items[i] for i in places]


HEAD = re.compile(r"^.*?(?=<svg )", re.DOTALL)
METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
SIZE = re.compile(r' width="[\d.]+pt" height="[\d.]+pt"')
IDLE = re.compile(r""" transform="rotate\(-0 [^"]*"|(?<=[ "])font-family: 'DejaVu Sans'; """)
REFERENCE = re.compile(r'(url\(#|xlink:href="#)([\w-]+)')
ID = re.compile(r' id="([^"]+)"')
COLOUR = re.compile(r"(?<=(?:fill|roke): )#[0-9a-f]{6}\b")
TAG = re.compile(r"<[^>]*>")
NUMBER = re.compile(r"-?\d+\.\d{3,}")


def inline_svg(canvas: Canvas, name: str, alt: str) -> str:
    """A figure that was drawn in the light theme, as an element of the page.

    Args:
        canvas: the figure.
        name: begins the ids inside it; each figure of the page needs its own.
        alt: says in words what it shows.
    """
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rgbench", "svg.fonttype": "none"}):
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = METADATA.sub("", HEAD.sub("", out.getvalue().decode(), count=1))
    text = IDLE.sub("", SIZE.sub("", text, count=1))
    used = {found for _, found in REFERENCE.findall(text)}  # of which matplotlib defines some more than once
    text = ID.sub(lambda match: f' id="{name}-{match[1]}"' if _first(match[1], used) else "", text)
    text = REFERENCE.sub(rf"\1{name}-\2", text)
    text = TAG.sub(_lighter, text)
    text = " ".join(re.sub(r">\s+<", "><", text).split())
    return text.replace("<svg ", f'<svg class="drawn" role="img" aria-label="{escape(alt)}" ', 1)


def _first(name: str, used: set[str]) -> bool:
    """Whether this is the first definition of something used, which is the one that counts."""
    wanted = name in used
    used.discard(name)
    return wanted


def _lighter(tag: re.Match[str]) -> str:
    """A tag with variables for colours and a hundredth of a point for places; what is written is not touched."""
    themed = COLOUR.sub(lambda match: VARIABLES.get(match[0], match[0]), tag[0])
    return NUMBER.sub(lambda match: f"{float(match[0]):.2f}", themed)


def theme_css() -> str:
    """The variables that the colours of a drawing became, in light and in dark."""
    light, dark = (" ".join(f"{name}: {colour};" for name, colour in _named(theme)) for theme in (LIGHT, DARK))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def _named(theme: Theme) -> Iterator[tuple[str, str]]:
    plain = {"paper": theme.paper, "ink": theme.ink, "faint": theme.faint}
    for name, colour in {**plain, **theme.methods}.items():
        yield f"--plot-{name}", colour.lower()


VARIABLES = {colour: f"var({name})" for name, colour in _named(LIGHT)}


MAX_IMAGE_BYTES = 16 << 20  # of the album, so that the page stays under 25 MB
PICTURE = re.compile(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]*")
DRAWN = re.compile(r'<svg class="drawn".*?</svg>', re.DOTALL)
SCRIPTS = ("shared.js", "sort.js", "zoom.js", "browse.js", "training.js")


@dataclass(frozen=True)
class Evidence:
    """One result file as the page lists it; `command` and `environment` are numbers of those lists."""

    row: str
    label: str
    value: str
    protocol: int
    num_samples: int
    path: str
    command: int
    environment: int


def page(sections: list[Section], track: Track = untracked) -> str:
    """The whole page as one HTML text of under 25 MB; ``track`` shows how far it is."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["bar"] = _bar
    template = environment.from_string(_asset("page.html.j2"))
    album = Album(MAX_IMAGE_BYTES)
    static = [_numbers(section, album) for section in sections]
    worlds = {
        section.slug: {"prompts": prompts_data(section, album), "training": training_data(section, album)}
        for section in sections
    }
    uris = album.encode(track)
    shown = {number for numbers in static for lines in numbers.values() for line in lines for number in line}
    data = {"worlds": worlds, "images": [None if i in shown else uri for i, uri in enumerate(uris)]}
    return template.render(
        sections=[
            _view(section, numbers, uris, track) | worlds[section.slug]
            for section, numbers in zip(sections, static, strict=True)
        ],
        style=Markup(f"{theme_css()}\n{_asset('page.css')}"),
        script=Markup("\n".join(map(_asset, SCRIPTS))),
        data=Markup(page_json(data)),
        num_files=sum(len(section.comparison.all_results) for section in sections),
    )


def without_pictures(text: str) -> str:
    """A page's text with every picture's bytes left out: what `rgbench report --check` compares."""
    return PICTURE.sub("data:image", DRAWN.sub("<svg></svg>", text))


def _numbers(section: Section, album: Album) -> dict[str, list[list[int]]]:
    """Album numbers of the images of each grid that shows the files themselves, by grid and line."""
    kept = section.kept.files
    return {
        grid.key: [
            [album.add(kept[row][line.prompt_id, line.prompt, line.seed]) for row in grid.columns]
            for line in grid.lines
        ]
        for grid in section.grids
        if not grid.computed
    }


def _view(section: Section, numbers: dict[str, list[list[int]]], uris: list[str], track: Track) -> dict[str, Any]:
    """Everything the template shows of one world without its script."""
    comparison = section.comparison
    commands, environments, evidence = _evidence(section)
    return {
        "slug": section.slug,
        "world": comparison.world,
        "note": section.note,
        "readings": section.readings,
        "methods": [row.method for row in comparison.rows],
        "tables": [(table, _scales(table)) for table in section.tables],
        "row_methods": {row.method_label: row.method for row in comparison.rows},
        "plots": [_plot(section, plot) for plot in track(section.plots, "plots of the page", "plots")],
        "undrawn": section.undrawn,
        "grids": [_grid(grid, numbers.get(grid.key), uris) for grid in section.grids],
        "protocols": list(comparison.protocol_numbers.items()),
        "protocol_fields": {name: flatten(fields) for name, fields in comparison.protocols.items()},
        "protocol_notes": protocol_notes(comparison),
        "evidence": evidence,
        "anchors": {item.path: i for i, item in enumerate(evidence)},
        "commands": commands,
        "environments": environments,
    }


def _evidence(section: Section) -> tuple[list[str], list[dict[str, str]], list[Evidence]]:
    """Distinct commands, distinct environments, and every result file with its number in both."""
    commands: dict[str, int] = {}
    environments: dict[str, tuple[int, dict[str, str]]] = {}
    evidence = []
    numbers = section.comparison.protocol_numbers
    for row, result in section.comparison.all_results:
        command = commands.setdefault(result.command, len(commands) + 1)
        fields = flatten(result.provenance)
        fields.pop("time", None)
        number, _ = environments.setdefault(repr(sorted(fields.items())), (len(environments) + 1, fields))
        name = row.sampler_label if row else f"step {result.training['step']}"
        method = METHODS.get(result.method, result.method)
        evidence.append(
            Evidence(
                f"{method}, {result.model}, {name}", result.metric.label, _value(result), numbers[result.protocol.id],
                result.num_samples, file_of(result), command, number,
            )
        )  # fmt: skip
    return list(commands), [fields for _, fields in environments.values()], evidence


def _value(result: Result) -> str:
    if result.value is None:
        return "—"
    interval = result.interval
    low, high = (interval.low, interval.high) if interval else (None, None)
    return f"{format_figure(result.value, low, high, result.metric.decimals)} {result.metric.unit}".strip()


def _scales(table: Table) -> list[tuple[float, float] | None]:
    """Per column the range of its values and intervals, that of the in-cell bars; None without a range."""
    scales: list[tuple[float, float] | None] = []
    for i in range(len(table.headings)):
        cells = [cells[i] for _, cells in table.rows if cells[i].number is not None]
        ends = [end for cell in cells for end in (cell.number, cell.low, cell.high) if end is not None]
        if table.key.startswith("delta"):
            ends.append(0.0)
        wide = len(cells) > 1 and max(ends) > min(ends)
        scales.append((min(ends), max(ends)) if wide and table.key != "cost" else None)
    return scales


def _bar(cell: Cell, scale: tuple[float, float] | None) -> str:
    """CSS custom properties that place the cell's value and interval on its column's scale, in percent."""
    if scale is None or cell.number is None:
        return ""
    low, high = scale
    ends = {"v": cell.number, "l": cell.low, "h": cell.high, "z": 0.0 if low <= 0 <= high else None}
    places = {k: 100 * (end - low) / (high - low) for k, end in ends.items() if end is not None}
    return ";".join(f"--{key}:{place:.1f}%" for key, place in places.items())


def _plot(section: Section, plot: plots.Plot) -> dict[str, Any]:
    canvas = plot.draw(section.comparison, plots.LIGHT)
    num = round(canvas.get_figwidth() / plots.PANEL_INCHES)
    drawn = inline_svg(canvas, f"{section.slug}-{plot.stem}", plot.alt)
    return {"title": plot.title, "panels": num, "drawn": Markup(drawn)}


def _grid(grid: Grid, numbers: list[list[int]] | None, uris: list[str]) -> dict[str, Any]:
    """The grid's lines with their images as data URIs, numbered where the album has them."""
    lines = []
    for i, line in enumerate(grid.lines):
        images = []
        for j, image in enumerate(line.images):
            number = numbers[i][j] if numbers else None
            caption = line.captions[j] if line.captions else ""
            uri = uris[number] if number is not None else webp_uri(image)
            images.append({"number": number, "uri": uri, "caption": caption})
        lines.append({"prompt": line.prompt, "prompt_id": line.prompt_id, "seed": line.seed, "images": images})
    columns = [(row.method, row.method_label, f"{row.results[0].model}; {row.sampler_label}") for row in grid.columns]
    return {"title": grid.title, "note": grid.note, "columns": columns, "lines": lines, "view": grid.is_view}


def _asset(name: str) -> str:
    return (files("rgbench.report") / "web" / name).read_text(encoding="utf-8")
