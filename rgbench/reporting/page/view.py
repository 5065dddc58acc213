"""One offline HTML page: words, sortable tables, plots, images, and the file and command behind every figure.

The page loads nothing: styles and script are inline, images are data URIs, and a
content security policy forbids the rest. Jinja escapes every text that comes from a
result file. Without JavaScript words, tables, plots, grids and provenance are there;
sorting, the slider, the prompt browser and zoom need it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rgbench.evaluation.results import Result
from rgbench.metrics.tracking import Track, untracked
from rgbench.reporting import plots
from rgbench.reporting.digits import format_figure
from rgbench.reporting.gather import METHODS, file_of
from rgbench.reporting.grids import Grid
from rgbench.reporting.page.data import page_json, prompts_data, training_data
from rgbench.reporting.page.inline import inline_svg, theme_css
from rgbench.reporting.page.pictures import Album, webp_uri
from rgbench.reporting.protocols import flatten, protocol_notes
from rgbench.reporting.sections import Section
from rgbench.reporting.tables import Cell, Table

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
    return (files("rgbench.reporting.page") / name).read_text(encoding="utf-8")
