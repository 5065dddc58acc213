"""One offline HTML page: words, sortable tables, plots, images, and the file and command behind every figure.

The page loads nothing: styles and script are inline, images are data URIs, and a
content security policy forbids the rest. Jinja escapes every text that comes from a
result file; without JavaScript everything but sorting is there.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from rgbench.evaluation.results import Result
from rgbench.reporting import plots
from rgbench.reporting.gather import file_of
from rgbench.reporting.grids import Grid, enlarge
from rgbench.reporting.protocols import flatten, protocol_notes
from rgbench.reporting.reading import readings
from rgbench.reporting.sections import Section
from rgbench.reporting.tables import Cell, Table, format_figure

THUMB = 256  # longest side of an image on the page, in pixels; smaller ones stay as they are
MAX_IMAGE_BYTES = 16 << 20  # of all images together, so that the page stays under 25 MB
TONES = {
    "worse": "reads like over-optimisation",
    "mixed": "mixed evidence",
    "better": "consistent with better images",
    "flat": "no clear effect",
    "none": "nothing to compare with",
}


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


def page(sections: list[Section]) -> str:
    """The whole page as one HTML text of under 25 MB."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["bar"] = _bar
    template = environment.from_string(_asset("page.html.j2"))
    budget = MAX_IMAGE_BYTES // max(1, len(sections))
    return template.render(
        sections=[_view(section, budget) for section in sections],
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        tones=TONES,
        num_files=sum(len(row.results) for section in sections for row in section.comparison.rows),
    )


def _view(section: Section, budget: int) -> dict[str, Any]:
    """Everything the template shows of one world."""
    comparison = section.comparison
    commands, environments, evidence = _evidence(section)
    return {
        "slug": section.slug,
        "world": comparison.world,
        "note": section.note,
        "readings": readings(comparison),
        "methods": [row.method for row in comparison.rows],
        "tables": [(table, _scales(table)) for table in section.tables],
        "row_methods": {(row.method_label, row.sampler_label, row.model_label): row.method for row in comparison.rows},
        "plots": [_plot(section, plot) for plot in section.plots],
        "grid": _grid(section.grid, budget) if section.grid else None,
        "protocols": list(comparison.protocol_numbers.items()),
        "protocol_fields": {c.protocol_id: flatten(c.protocol) for c in comparison.columns},
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
    for row in section.comparison.rows:
        for result in sorted(row.results, key=lambda r: (r.model, r.metric.name, r.protocol.id)):
            command = commands.setdefault(result.command, len(commands) + 1)
            fields = flatten(result.provenance)
            fields.pop("time", None)
            number, _ = environments.setdefault(repr(sorted(fields.items())), (len(environments) + 1, fields))
            name = f"{row.method_label}, {result.model}, {row.sampler_label}"
            protocol = numbers[result.protocol.id]
            evidence.append(
                Evidence(
                    name, result.metric.label, _value(result), protocol, result.num_samples, file_of(result),
                    command, number,
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


def _plot(section: Section, plot: Any) -> dict[str, str]:
    drawn = {}
    for name, theme in (("light", plots.LIGHT), ("dark", plots.DARK)):
        canvas = plot.draw(section.comparison, theme)
        drawn[name] = _data_uri(plots.svg(canvas), "image/svg+xml")
    return {"title": plot.title, "alt": plot.alt, **drawn}


def _grid(grid: Grid, budget: int) -> dict[str, Any]:
    """The grid's lines with images as data URIs; as many lines as `budget` bytes hold."""
    lines, used = [], 0
    for line in grid.lines:
        images = [_image_uri(image) for image in line.images]
        used += sum(map(len, images))
        if used > budget:
            break
        lines.append({"prompt": line.prompt, "prompt_id": line.prompt_id, "seed": line.seed, "images": images})
    columns = [(row.method, row.method_label, f"{row.results[0].model}; {row.sampler_label}") for row in grid.columns]
    left_out = len(grid.lines) - len(lines)
    note = grid.note + (f" {left_out} prompts are left out to keep this page small." if left_out else "")
    return {"columns": columns, "lines": lines, "note": note}


def _image_uri(image: Image.Image) -> str:
    """PNG for small images, exact; JPEG at 256 px for larger ones."""
    out = io.BytesIO()
    if max(image.size) <= THUMB // 2:
        image.save(out, format="PNG")
        return _data_uri(out.getvalue(), "image/png")
    enlarge(image, min(THUMB, max(image.size))).save(out, format="JPEG", quality=88)
    return _data_uri(out.getvalue(), "image/jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _asset(name: str) -> str:
    return (files("rgbench.reporting") / name).read_text(encoding="utf-8")
