"""What ``rgbench ls``, ``show`` and ``doctor`` print."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rgbench.core.config import find_recipe, load_yaml, packaged_recipes
from rgbench.core.errors import UsageError
from rgbench.core.io import read_json
from rgbench.core.registry import TABLES, names
from rgbench.core.run import RunDirectory
from rgbench.rewards.remote import WORKERS, scorer_module

if TYPE_CHECKING:
    from rgbench.evaluate.results import Result


Table = tuple[Sequence[str], list[Sequence[str]]]


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; tab-separated lines, without the header, into a pipe."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(*header, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def listing(kind: str, runs: Path, results: Path) -> Table:
    """Header and rows of one kind of thing.

    Args:
        kind: recipes, metrics, probes, rewards, workers, runs, results or protocols.
        runs: folder of runs.
        results: folder of result files.

    Raises:
        UsageError: a damaged run or result file, or a folder that is not there and not the default.
    """
    for folder, default in ((runs, "runs"), (results, "results")):
        if folder != Path(default) and not folder.is_dir():  # where nothing was made yet, there is nothing to list
            raise UsageError(f"{folder}: no such folder")
    if kind in ("metrics", "probes", "rewards"):
        table = kind.removesuffix("s")
        return ("name", "code"), [(name, TABLES[table].get(name, "plug-in")) for name in names(table)]
    if kind == "workers":
        return ("name", "its environment"), [(name, scorer_module(name).INSTALL) for name in WORKERS]
    if kind == "recipes":
        return ("name", "kind", "about"), [_recipe_row(name, path) for name, path in packaged_recipes().items()]
    if kind == "runs":
        found = sorted(file.parent for file in runs.glob("*/run.json"))
        return ("name", "method", "seed", "status", "steps"), [_run_row(folder) for folder in found]
    return _results(results) if kind == "results" else _protocols(results)


def _recipe_row(name: str, path: Path) -> Sequence[str]:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    kind = load_yaml(path)[0].get("kind", "")
    return name, str(kind), first.lstrip("# ").rstrip() if first.startswith("#") else ""


def _run_row(folder: Path) -> Sequence[str]:
    run = RunDirectory.open(folder).read()
    method, seed, status, step, steps = (str(run.get(k, "?")) for k in ("method", "seed", "status", "step", "steps"))
    return folder.name, method, seed, status, f"{step}/{steps}"


def _load_results(folder: Path) -> list[Result]:
    from rgbench.core.progress import image_progress, track_images
    from rgbench.evaluate.results import load_results

    with image_progress() as progress:
        return load_results(folder, track_images(progress))


def _results(folder: Path) -> Table:
    header = ("world", "model", "generation", "metric", "value", "images")
    rows: list[Sequence[str]] = []
    for result in _load_results(folder):
        value = "—" if result.value is None else f"{result.value:.{result.metric.decimals}f}"
        generation = result.generation.id
        rows.append((result.world, result.model, generation, result.metric.name, value, str(result.num_samples)))
    return header, rows


def _protocols(folder: Path) -> Table:
    from rgbench.metrics.protocols import PROTOCOLS

    named: list[Sequence[str]] = [(p.name, "named", p.about) for p in PROTOCOLS.values()]
    found: dict[str, list[str]] = {}
    for result in _load_results(folder):
        found.setdefault(result.protocol.id, []).append(f"{result.model}/{result.generation.id}")
    measured = [(protocol, f"{len(models)} results", "") for protocol, models in sorted(found.items())]
    return ("protocol", "state", "about"), [*named, *measured]


def describe(name: str, runs: Path) -> str:
    """The text of a recipe, the ``run.json`` of a run, or a result file.

    Raises:
        UsageError: no such thing.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return _pretty(read_json(path))
    for folder in (path, runs / name):
        if (folder / "run.json").is_file():
            run = RunDirectory.open(folder)
            return f"{_pretty(run.read())}\n\n{run.config_file.read_text(encoding='utf-8')}"
    try:
        return find_recipe(name).read_text(encoding="utf-8")
    except UsageError as error:
        raise UsageError(f"{error}; nor is it a run under {runs} or a result file") from error


def _pretty(content: object) -> str:
    import json

    return json.dumps(content, indent=2, ensure_ascii=False)


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


def print_plan(recipe: str, overrides: list[str], out: Path | None, device: str) -> None:
    """Print what a run would do, after checking everything it needs."""
    from rgbench.train.train import dry_run

    print_table(("what", "how"), dry_run(recipe, overrides, out=out, device=device))
