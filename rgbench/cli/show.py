"""What ``rgbench ls``, ``show`` and ``doctor`` print."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rgbench.core.config import find_recipe, load_yaml, packaged_recipes
from rgbench.core.errors import UsageError
from rgbench.core.io import read_json
from rgbench.core.registry import TABLES, names, resolve
from rgbench.core.run import RunDirectory
from rgbench.rewards.remote import WORKERS, scorer_module

if TYPE_CHECKING:
    from rgbench.evaluate.results import ModelResult


Table = tuple[Sequence[str], list[Sequence[str]]]
WIDE = 1000  # characters, more than any terminal has


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], aside: Sequence[str] = ()) -> None:
    """A table on a terminal, with nothing cut; tab-separated lines, without the header, into a pipe.

    Args:
        header: a name for each column.
        rows: of texts.
        aside: columns that a narrow terminal does without, the first to go first.
    """
    rows = list(rows)
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as RichTable
    from rich.text import Text

    console, shown = Console(), list(range(len(header)))
    for name in (None, *aside):
        shown = [i for i in shown if header[i] != name]
        table = RichTable(*(Column(header[i], overflow="fold") for i in shown), box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(Text(row[i]) for i in shown))
        if console.measure(table, options=console.options.update(max_width=WIDE)).maximum <= console.width:
            break
    console.print(table)


def listing(kind: str, runs: Path, results: Path) -> Table:
    """Header and rows of one kind of thing.

    Args:
        kind: recipes, metrics, probes, rewards, workers, runs, results or protocols.
        runs: folder of runs.
        results: folder of results.

    Raises:
        UsageError: a damaged run or result, or a folder that is not there and not the default.
    """
    for folder, default in ((runs, "runs"), (results, "results")):
        if folder != Path(default) and not folder.is_dir():  # where nothing was made yet, there is nothing to list
            raise UsageError(f"{folder}: no such folder")
    if kind in ("metrics", "probes"):
        header = ("name", "value", "label", "unit", "good end", "family", "about")
        return header, [row for name in names(kind[:-1]) for row in _metric_rows(kind[:-1], name)]
    if kind == "rewards":
        return ("name", "code"), [(name, TABLES["reward"].get(name, "plug-in")) for name in names("reward")]
    if kind == "workers":
        return ("name", "its environment"), [(name, scorer_module(name).INSTALL) for name in WORKERS]
    if kind == "recipes":
        return ("name", "kind", "about"), [_recipe_row(name, path) for name, path in packaged_recipes().items()]
    if kind == "runs":
        found = sorted(file.parent for file in runs.glob("*/run.json"))
        return ("name", "method", "seed", "status", "steps"), [_run_row(folder) for folder in found]
    return _results(_load(results)) if kind == "results" else _protocols(_load(results))


def _metric_rows(table: str, name: str) -> Iterable[Sequence[str]]:
    """A line for each value that a metric gives; one for a group of metrics."""
    metric = resolve(table, name)
    for info in metric.infos:
        yield name, info.name, info.label, info.unit, info.direction.value, info.family.value, info.about
    if not metric.infos:
        yield name, "", "", "", "", "", (metric.__doc__ or "").partition("\n")[0]


def _recipe_row(name: str, path: Path) -> Sequence[str]:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    kind = load_yaml(path)[0].get("kind", "")
    return name, str(kind), first.lstrip("# ").rstrip() if first.startswith("#") else ""


def _run_row(folder: Path) -> Sequence[str]:
    run = RunDirectory.open(folder).read()
    method, seed, status, step, steps = (str(run.get(k, "?")) for k in ("method", "seed", "status", "step", "steps"))
    return folder.name, method, seed, status, f"{step}/{steps}"


def _load(folder: Path) -> list[ModelResult]:
    from rgbench.core.progress import image_progress, track_images
    from rgbench.evaluate.results import load_results

    with image_progress() as progress:
        return load_results(folder, track_images(progress))


def _results(results: Iterable[ModelResult]) -> Table:
    rows: list[Sequence[str]] = []
    for result in results:
        head = result.head
        seed = "" if head.training_seed is None else str(head.training_seed)
        step = f"{head.training['step']}/{head.training['steps']}" if head.training else ""
        images = str(max((value.num_images for value in result.values), default=0))
        rows.append((head.world, head.model, head.generation.id, seed, step, images, str(len(result.values))))
    return ("world", "model", "generation", "seed", "step", "images", "values"), rows


def _protocols(results: Iterable[ModelResult]) -> Table:
    from rgbench.metrics.protocols import PROTOCOLS

    named: list[Sequence[str]] = [(p.name, "named", p.about) for p in PROTOCOLS.values()]
    found: dict[str, list[str]] = {}
    for result in results:
        for value in result.values:
            found.setdefault(value.protocol.id, []).append(value.metric)
    measured = [(id, f"{len(metrics)} values", ", ".join(dict.fromkeys(metrics))) for id, metrics in found.items()]
    return ("protocol", "state", "about"), [*named, *sorted(measured)]


def show(name: str, runs: Path) -> None:
    """Print a recipe's text, a run's ``run.json`` and recipe, a result's values, or the results under a folder.

    Raises:
        UsageError: no such thing.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        print(_pretty(read_json(path)))
        return
    for folder in (path, runs / name):
        if (folder / "run.json").is_file():
            run = RunDirectory.open(folder)
            print(f"{_pretty(run.read())}\n\n{run.config_file.read_text(encoding='utf-8')}")
            return
    results = _load(path) if path.is_dir() else []
    if results:
        print_table(*(_values(results[0]) if len(results) == 1 else _results(results)), aside=("metric", "protocol"))
        return
    try:
        print(find_recipe(name).read_text(encoding="utf-8"))
    except UsageError as error:
        raise UsageError(f"{error}; nor is it a run under {runs}, or a folder or file of results") from error


def _values(result: ModelResult) -> Table:
    from rgbench.judge.models import Column
    from rgbench.metrics.values import metric_info
    from rgbench.report.words import shown

    rows: list[Sequence[str]] = []
    for value in result.values:
        info = metric_info(value.metric, result.head.metrics)
        column = Column(value.metric, value.protocol, info, value.reference)
        mark = "trained on" if value.in_sample else ""
        flags = ", ".join(filter(None, (mark, *value.flags)))
        images = str(value.num_images)
        rows.append((value.metric, column.label, shown(value, column), info.unit, images, value.protocol.id, flags))
    return ("metric", "label", "value", "unit", "images", "protocol", "flags"), rows


def _pretty(content: object) -> str:
    import json

    return json.dumps(content, indent=2, ensure_ascii=False)


def what_next(path: Path) -> str:
    """What to look at in a finished run, and the command that follows it."""
    from rgbench.train.recipe import PROXY_FOLDER

    grids = path / "samples"
    pictures = [path / "gold.png"] * (path / "gold.png").is_file() + [grids] * any(grids.glob("*"))
    board = f"tensorboard --logdir {shlex.quote(str(path))}"
    command = ["rgbench", "eval", str(path)]
    if not (path / "pipeline").is_dir():
        small = load_yaml(path / "config.yaml")[0]["proxy"].get("small")
        command = ["rgbench", "train", "dollar" if small else "lrm", f"proxy.path={path / PROXY_FOLDER}"]
    return f"Look at: {', '.join([*map(str, pictures), board])}. Next: {shlex.join(command)}"


def print_checks(recipe: str | None = None, overrides: Sequence[str] = ()) -> bool:
    """Print the environment checks, or those of what a recipe needs; whether nothing is missing."""
    if recipe is None:
        from rgbench.cli.doctor import checks

        found = checks()
    else:
        from rgbench.cli.doctor import recipe_checks

        found = recipe_checks(recipe, list(overrides))
    print_table(("check", "state", "found", "what to do"), [(c.name, c.status, c.detail, c.remedy) for c in found])
    return all(check.status != "missing" for check in found)


def print_dry_run(recipe: str, overrides: list[str], out: Path | None, device: str) -> None:
    """Print what a run would do, after checking everything it needs."""
    from rgbench.train.train import dry_run

    print_table(("what", "how"), dry_run(recipe, overrides, out=out, device=device))


def print_plan(recipe: str, overrides: list[str], gpu: str | None, gpus: int) -> bool:
    """Print what a recipe's step takes, and what helps where it does not fit; whether it fits."""
    from rgbench.train.plan import describe, find_gpu, plan, remedies

    chosen = None if gpu is None else find_gpu(gpu)
    found = plan(recipe, overrides, gpus=gpus)
    fits = chosen is None or found.excess(chosen) <= 0
    helps = [] if chosen is None or fits else list(remedies(recipe, overrides, chosen, gpus))
    print_table(("what", "how much"), describe(found, gpu, helps))
    return fits
