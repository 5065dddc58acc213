"""``python -m tools.study run`` and ``report``: do the units of studies, write their page from committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rgbench.cli.options import SETTINGS, ExplainingGroup, ResultsOption, RunsOption, say_what_matters

app = typer.Typer(cls=ExplainingGroup, help="Run studies over training seeds, and report them.", **SETTINGS)

RECORDS = Path("study")  # under the results: units.json
FilesArgument = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Studies, e.g. recipes/study/*.yaml.")]


@app.callback()
def _root() -> None:
    say_what_matters()


@app.command()
def run(
    files: FilesArgument,
    results: ResultsOption = Path("results"),
    runs: RunsOption = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what is left and how long it takes.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Take up failed units again.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="For the estimate: commands like this one side by side.")] = 2,
) -> None:
    """Do all units that are not done; start it once for each core. The same command continues."""
    from tools.study import plan, work

    units = plan.units_of(map(plan.load_study, files), runs, results)
    place = results / RECORDS
    if dry_run:
        records = work.read_records(place)
        found = plan.plan(units, () if retry else records.failed)
    else:
        found = work.work(units, runs / work.LOCKS, place, retry, typer.echo)
        records = work.read_records(place)
    for line in work.describe(found, records.measured(), workers):
        typer.echo(line)
    if found.failed and not dry_run:
        raise typer.Exit(1)


@app.command()
def report(
    files: FilesArgument,
    results: ResultsOption = Path("results"),
    page: Annotated[Path, typer.Option(help="Page whose generated parts are replaced.")] = Path(
        "docs/studies/benchtop-2.md"
    ),
) -> None:
    """Write figures, tables and outcomes of studies into their page, from results alone."""
    from tools.study.page import write_page

    for path in write_page(files, results, results / RECORDS, page):
        typer.echo(path)


if __name__ == "__main__":
    app(prog_name="python -m tools.study")
