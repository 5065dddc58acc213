"""The report as one offline HTML page: words, sortable tables, plots, images, and what made every number.

Its first screen answers the question: a verdict and a sentence for each method, gold against trained reward, a strip of
images. The page loads nothing: styles and script are inline, images are data URIs, and a content security policy
forbids the rest. Jinja escapes every text that comes from results. Without JavaScript words, tables, plots, grids and
provenance are there; sorting, choosing columns, the slider, the prompt browser and zoom need it, and what they show
stands in the link. Their data is JSON, one object per world.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from rgbench.core.progress import Track, untracked
from rgbench.evaluate.results import ModelResult
from rgbench.judge.models import LCD, Column, Model, ResultSet
from rgbench.judge.trajectory import TrainingRun
from rgbench.metrics.values import Direction
from rgbench.report import plots
from rgbench.report.formats import Section
from rgbench.report.grids import Grid, Key, enlarge, first_scores, images_of, right_or_wrong, strip
from rgbench.report.tables import Entry, Table, flatten, headlines, place_of, protocol_numbers, protocols
from rgbench.report.words import ARROWS, format_number, gold_of, model_of, names, runs_along, samplers, shown

MAX_IMAGE_BYTES = 16 << 20  # of all images together, so that the page stays under 25 MB
SMALL = 128  # images up to this side keep every pixel as long as the budget allows
# (longest side, WebP quality), from the best to the smallest; small images are lossless on the first
LEVELS = ((256, 82), (224, 70), (160, 60), (128, 45))
SAMPLE = 16  # images that foretell the size of all
NUM_BROWSED = 64
MAX_BROWSED_IMAGES = 768  # of all models together; with more than 12 models fewer prompts are shown
NUM_HOVERED = 3  # images beside a point of the first plot
NUM_FOLLOWED = 4  # prompts of the slider
MAX_RUNS = 8
MAX_STEPS = 12
MAX_PROMPT = 2000
SCRIPTS = ("shared.js", "sort.js", "zoom.js", "browse.js", "training.js")
PICTURE = re.compile(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]*")
DRAWN = re.compile(r'<svg class="drawn".*?</svg>', re.DOTALL)


def page(sections: Sequence[Section], track: Track = untracked) -> str:
    """The whole page as one HTML text of under 25 MB; ``track`` shows how far it is."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["bar"] = _bar
    album = Album(MAX_IMAGE_BYTES)
    static = [_grid_numbers(section, album) for section in sections]
    worlds = {
        section.slug: {
            "points": points_data(section, album),
            "prompts": prompts_data(section, album),
            "training": training_data(section.results, album),
        }
        for section in sections
    }
    uris = album.encode(track)
    on_page = {number for numbers in static for lines in numbers.values() for line in lines for number in line}
    data = {"worlds": worlds, "images": [None if i in on_page else uri for i, uri in enumerate(uris)]}
    views = [
        _view(section, numbers, uris, track) | worlds[section.slug]
        for section, numbers in zip(sections, static, strict=True)
    ]
    return environment.from_string(_asset("page.html.j2")).render(
        sections=views,
        style=Markup(f"{theme_css()}\n{_asset('page.css')}"),
        script=Markup("\n".join(map(_asset, SCRIPTS))),
        data=Markup(page_json(data)),
        title=sections[0].title,
    )


def without_pictures(text: str) -> str:
    """A page's text with every picture's bytes left out: what `rgbench report --check` compares."""
    return PICTURE.sub("data:image", DRAWN.sub("<svg></svg>", text))


def page_json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# What the template shows without its script


def _view(section: Section, numbers: dict[str, list[list[int]]], uris: list[str], track: Track) -> dict[str, Any]:
    results = section.results
    measured = {column.protocol.id: column.label for column in reversed(results.columns)}
    answer = plots.draw_answer(results)
    first = next(iter(section.grids), None)
    return {
        "slug": section.slug,
        "world": results.world,
        "note": section.note,
        "samplers": samplers(results),
        "readings": section.readings,
        "names": names(results),
        "answer": _plot_view(section, *answer) if answer else None,
        "strip": _grid_view(strip(first), None, uris) if first else None,
        "methods": {names(results)[model]: model.method for model in results.models},
        "tables": [(table, _scales(table)) for table in section.tables],
        "plots": [
            _plot_view(section, plot, figure)
            for plot, figure in track(list(section.plots.items()), "plots of the page", "plots")
        ],
        "missing_plots": section.missing_plots,
        "grids": [_grid_view(grid, numbers.get(grid.key), uris) for grid in section.grids],
        "glossary": {
            f"{column.info.label} ({column.unit})" if column.unit else column.info.label: (
                column.info.about,
                f"{column.family}{f', {ARROWS[column.info.direction]}' if column.has_good_end else ''}",
            )
            for column in results.columns
        },
        "protocols": [
            (protocol_numbers(results)[name], measured[name], name, flatten(fields))
            for name, fields in protocols(results).items()
        ],
        **_evidence(results),
    }


def _evidence(results: ResultSet) -> dict[str, Any]:
    """Every result with the numbers of its commands and environments, and these; the row of each folder."""
    commands: dict[str, int] = {}
    environments: dict[str, tuple[int, dict[str, str]]] = {}
    rows = []
    labels = {column.key: column.label for column in results.columns}
    found = [(names(results)[model], result) for model in results.models for result in model.results.values()]
    found += [(f"{r.head.model}, step {r.head.training['step']}", r) for r in results.checkpoints]
    for name, result in found:
        row: dict[str, Any] = {"model": name, "folder": place_of(result), "commands": {}, "environments": {}}
        for run in result.runs:
            fields = {key: value for key, value in flatten(run.provenance).items() if key != "time"}
            number, _ = environments.setdefault(repr(sorted(fields.items())), (len(environments) + 1, fields))
            row["environments"][number] = None
            row["commands"][commands.setdefault(run.command, len(commands) + 1)] = None
        rows.append(row | {"labels": [labels[value.key] for value in result.values]})
    return {
        "evidence": rows,
        "anchors": {row["folder"]: i for i, row in enumerate(rows)},
        "commands": list(commands),
        "environments": [fields for _, fields in environments.values()],
    }


def _scales(table: Table) -> list[tuple[float, float] | None]:
    """Per column the range of its values and intervals, that of the in-cell bars; None without a range."""
    scales: list[tuple[float, float] | None] = []
    for i in range(len(table.heads)):
        entries = [entries[i] for _, entries in table.rows if entries[i].number is not None]
        ends = [end for entry in entries for end in (entry.number, entry.low, entry.high) if end is not None]
        if table.key.startswith("delta"):
            ends.append(0.0)
        wide = len(entries) > 1 and max(ends) > min(ends)
        scales.append((min(ends), max(ends)) if wide and table.key != "cost" else None)
    return scales


def _bar(entry: Entry, scale: tuple[float, float] | None) -> str:
    """CSS custom properties that place the entry's value and interval on its column's scale, in percent."""
    if scale is None or entry.number is None:
        return ""
    low, high = scale
    ends = {"v": entry.number, "l": entry.low, "h": entry.high, "z": 0.0 if low <= 0 <= high else None}
    places = {k: 100 * (end - low) / (high - low) for k, end in ends.items() if end is not None}
    return ";".join(f"--{key}:{place:.1f}%" for key, place in places.items())


def _grid_numbers(section: Section, album: Album) -> dict[str, list[list[int]]]:
    """Album numbers of the images of each grid that shows stored images, by grid and line."""
    return {
        grid.key: [[album.add(image) for image in line.images] for line in grid.lines]
        for grid in section.grids
        if not grid.computed
    }


def _grid_view(grid: Grid, numbers: list[list[int]] | None, uris: list[str]) -> dict[str, Any]:
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
    columns = [(model.method, name, model.first.head.model) for model, name in grid.columns.items()]
    return {"title": grid.title, "note": grid.note, "columns": columns, "lines": lines, "view": grid.is_view}


def _plot_view(section: Section, plot: plots.Plot, figure: Figure) -> dict[str, Any]:
    num = round(figure.get_figwidth() / plots.PANEL_INCHES)
    drawn = inline_svg(figure, f"{section.slug}-{plot.stem}", plot.alt)
    return {"title": plot.title, "panels": num, "drawn": Markup(drawn), "note": plot.note(section.results)}


def _asset(name: str) -> str:
    return (files("rgbench.report") / "web" / name).read_text(encoding="utf-8")


# What the script works on


def points_data(section: Section, album: Album) -> list[dict[str, Any]]:
    """What is shown beside each model's point in the first plot: name, values, and images of the first prompts."""
    results, columns = section.results, [section.results.trained_reward(), *plots.evidence(section.results)[:1]]
    lines = section.grids[0].lines[:NUM_HOVERED] if section.grids else ()
    keys = [(line.prompt_id, line.prompt, line.seed) for line in lines]
    return [
        {
            "name": names(results)[model],
            "method": model.method,
            "about": f"{model.label}, {model.sampler_label}",
            "values": [f"{c.label} {shown(model.value(c), c)} {c.unit}".strip() for c in columns if c is not None],
            "images": [album.add(section.kept.images[model][key]) for key in keys]
            if model in section.kept.images
            else [],
        }
        for model in results.models
    ]


def prompts_data(section: Section, album: Album) -> dict[str, Any] | None:
    """Every common prompt, in the order of the evaluation, with each model's image and per-image values.

    None where no images were kept.
    """
    kept, results = section.kept, section.results
    if not kept.common:
        return None
    models = list(kept.images)
    num = min(NUM_BROWSED, max(1, MAX_BROWSED_IMAGES // len(models)))
    columns = [column for column in headlines(results) if any(first_scores(model, column) for model in models)]
    groups = _groups(models, columns)
    common = set(kept.common)
    marked = right_or_wrong(results)
    picked = _spread([key for key in kept.images[models[0]] if key in common], num)
    prompts = [
        {
            "id": key[0],
            "text": key[1][:MAX_PROMPT],
            "seed": key[2],
            "group": groups.get((key[0], key[2]), ""),
            "images": [album.add(kept.images[model][key]) for model in models],
            "scores": [[_score(model, column, (key[0], key[2]), marked) for model in models] for column in columns],
        }
        for key in picked
    ]
    about = [{"method": m.method, "name": names(results)[m], "about": m.first.head.model} for m in models]
    return {
        "models": about,
        "metrics": [_metric(column) for column in columns],
        "base": next((i for i, model in enumerate(models) if model.method == LCD), None),
        "chosen": next((i for i, model in enumerate(models) if model.trained_rewards), 0),
        "groups": sorted({prompt["group"] for prompt in prompts} - {""}),
        "prompts": prompts,
        "of": len(kept.common),
    }


def _groups(models: Sequence[Model], columns: Sequence[Column]) -> dict[tuple[str, int], str]:
    for model in models:
        for column in columns:
            rows = model.first.rows(*column.key) if column.key in model.first.by_key else None
            if rows is not None:
                return {(prompt, seed): group for prompt, seed, group in rows.keys}
    return {}


def _score(model: Model, column: Column, key: tuple[str, int], marked: Column | None) -> list[Any] | None:
    """An image's value and how it is printed; of the marked column as ✓ or ✗."""
    value = first_scores(model, column).get(key)
    if value is None:
        return None
    if column is marked:
        return [value, f"{column.label} {'✓' if value else '✗'}"]
    return [value, f"{column.label} {format_number(value, column.decimals)} {column.unit}".strip()]


def _metric(column: Column) -> dict[str, Any]:
    towards = column.info.direction if column.has_good_end else Direction.HIGHER  # sorted by value: no end is good
    return {"name": column.metric, "label": column.label, "unit": column.unit, "direction": towards.value}


def training_data(results: ResultSet, album: Album) -> dict[str, Any] | None:
    """Values, spectra and images of each run at its evaluated steps; None where no checkpoint was evaluated."""
    every = runs_along(results)
    runs = every[:MAX_RUNS]
    if not runs:
        return None
    spectrum = plots.holding(results, "reference_power")
    spectrum = spectrum and runs[0].longest(results, spectrum)
    columns = list(dict.fromkeys(c for c in (*plots.axes_of(results), spectrum) if c is not None))
    columns = columns or [column for column in results.columns if runs[0].curve(column)][:2]
    measured = {step for run in runs for column in columns for step in run.curve(column)}
    steps = _spread(sorted(measured or {step for run in runs for step in run.points}), MAX_STEPS)
    keys = _followed(runs, steps)
    return {
        "steps": steps,
        "of": max(point.head.training["steps"] for run in runs for point in run.points.values()),
        "metrics": [_metric(column) for column in columns],
        "prompts": [{"id": key[0], "text": key[1][:MAX_PROMPT], "seed": key[2]} for key in keys],
        "radius": _radius(runs, spectrum),
        "runs": [_run_data(results, run, steps, columns, spectrum, keys, album) for run in runs],
        "more": len(every) - len(runs),
    }


def _run_data(
    results: ResultSet, run: TrainingRun, steps: Sequence[int], columns: Sequence[Column], spectrum: Column | None,
    keys: Sequence[Key], album: Album,
) -> dict[str, Any]:  # fmt: skip
    points = [run.points.get(step) for step in steps]
    gold, model = gold_of(run), model_of(results, run)
    hack = run.hack(gold) if gold else None
    return {
        "method": model.method,
        "name": names(results)[model],
        "model": run.name,
        "hack": {"step": hack.step, "first": hack.first, "end": hack.end} if hack else None,
        "values": [[_value(point, column) for point in points] for column in columns],
        "gaps": [_gap(point, spectrum) for point in points],
        "images": [_images(point, keys, album) for point in points],
    }


def _value(point: ModelResult | None, column: Column) -> list[Any] | None:
    """Value, the ends of its interval, and how it is printed."""
    value = point.by_key.get(column.key) if point else None
    if value is None or value.value is None:
        return None
    low, high = (value.interval.low, value.interval.high) if value.interval else (None, None)
    return [value.value, low, high, shown(value, column)]


def _gap(point: ModelResult | None, spectrum: Column | None) -> list[float] | None:
    """dB against real by radius."""
    value = point.by_key.get(spectrum.key) if point and spectrum else None
    if value is None or "reference_power" not in value.extra:
        return None
    power, real = (plots.decibel(value.extra[key]) for key in ("power", "reference_power"))
    return [round(gap, 3) for gap in (power - real).tolist()]


def _radius(runs: Sequence[TrainingRun], spectrum: Column | None) -> list[float]:
    for point in (point for run in runs for point in run.points.values() if spectrum):
        if spectrum and spectrum.key in point.by_key:
            return [round(radius, 5) for radius in point.by_key[spectrum.key].extra["radius"]]
    return []


def _followed(runs: Sequence[TrainingRun], steps: Sequence[int]) -> list[Key]:
    """Prompts whose images every run kept at every shown step that it was evaluated at."""
    found = [set(images_of(run.points[step])) for run in runs for step in steps if step in run.points]
    return sorted(set.intersection(*found))[:NUM_FOLLOWED] if found else []


def _images(point: ModelResult | None, keys: Sequence[Key], album: Album) -> list[int] | None:
    if point is None or not keys:
        return None
    images = images_of(point)
    return [album.add(images[key]) for key in keys]


def _spread(items: Sequence[Any], num: int) -> list[Any]:
    """At most `num` of the items, evenly, with the first and the last."""
    if len(items) <= num:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, num - 1))] for i in range(num)]


# Pictures


class Album:
    """Images of the page, each once, encoded at the best of `LEVELS` at which all together fit, by a sample of them.

    Args:
        budget: bytes of all data URIs together.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._images: list[Image.Image] = []
        self._numbers: dict[int, int] = {}  # by identity: results keep the images that they read

    def add(self, image: Image.Image) -> int:
        """The image's number; the same image has the same one."""
        if id(image) not in self._numbers:
            self._numbers[id(image)] = len(self._images)
            self._images.append(image)
        return self._numbers[id(image)]

    def encode(self, track: Track = untracked) -> list[str]:
        """Data URIs by number; ``track`` shows how far it is."""
        sample = self._images[:: max(1, len(self._images) // SAMPLE)]
        for level in range(len(LEVELS)):
            mean = sum(len(webp_uri(image, level)) for image in sample) / max(1, len(sample))
            if mean * len(self._images) <= self.budget:
                break
        return [webp_uri(image, level) for image in track(self._images, "images of the page", "pictures")]


def webp_uri(image: Image.Image, level: int = 0) -> str:
    """An image as a WebP data URI; small ones without loss at level 0."""
    side, quality = LEVELS[level]
    out = io.BytesIO()
    if max(image.size) <= SMALL and level == 0:
        image.save(out, format="WEBP", lossless=True, quality=40, method=3)
    else:
        smaller = image if max(image.size) <= side else enlarge(image, side)
        smaller.save(out, format="WEBP", quality=quality, method=3)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


# Plots inside the page: one drawing for light and dark, its letters as text. As files, matplotlib's drawings repeat
# every glyph's outline and would have to be there once per theme; here the colours of the light theme become CSS
# variables, letters stay letters (found by a search, copied, set in the reader's font), and unused ids are left out.

BEFORE_SVG = re.compile(r"^.*?(?=<svg )", re.DOTALL)
METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
SIZE = re.compile(r' width="[\d.]+pt" height="[\d.]+pt"')
IDLE = re.compile(r""" transform="rotate\(-0 [^"]*"|(?<=[ "])font-family: 'DejaVu Sans'; """)
REFERENCE = re.compile(r'(url\(#|xlink:href="#)([\w-]+)')
ID = re.compile(r' id="([^"]+)"')
COLOUR = re.compile(r"(?<=(?:fill|roke): )#[0-9a-f]{6}\b")
TAG = re.compile(r"<[^>]*>")
NUMBER = re.compile(r"-?\d+\.\d{3,}")
VARIABLES = {colour.lower(): f"var(--plot-{name})" for name, colour in plots.LIGHT.items()}


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """A figure as an element of the page.

    Args:
        figure: drawn.
        name: begins the ids inside it; each figure of the page needs its own.
        alt: says in words what it shows.
    """
    drawn = plots.save(figure, "svg", **{"svg.fonttype": "none"}).decode()
    text = METADATA.sub("", BEFORE_SVG.sub("", drawn, count=1))
    text = IDLE.sub("", SIZE.sub("", text, count=1))
    used = {found for _, found in REFERENCE.findall(text)}  # of which matplotlib defines some more than once
    used |= {found for found in ID.findall(text) if found.startswith(plots.POINT)}
    text = ID.sub(lambda match: f' id="{name}-{match[1]}"' if _first(match[1], used) else "", text)
    text = REFERENCE.sub(rf"\g<1>{name}-\2", text)
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
    light, dark = (_variables(theme) for theme in (plots.LIGHT, plots.DARK))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def _variables(theme: Mapping[str, str]) -> str:
    return " ".join(f"--plot-{name}: {colour.lower()};" for name, colour in theme.items())
