"""What the page's script works on: the prompts with their images and scores, and the runs along their training.

JSON, one object per world, with numbers as the result files have them, each beside the
text that the tables would print for it; images are numbers in the page's album.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rgbench.evaluation.results import Result, load_groups
from rgbench.reporting.digits import format_figure, format_number
from rgbench.reporting.gather import Column, Row
from rgbench.reporting.images import Key, image_index
from rgbench.reporting.page.pictures import Album
from rgbench.reporting.plots.drawing import decibel
from rgbench.reporting.plots.training import axes_of
from rgbench.reporting.sections import Section
from rgbench.reporting.tables import headlines
from rgbench.reporting.trajectory import Trajectory, trajectories

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
