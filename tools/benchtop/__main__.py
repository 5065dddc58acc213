"""``python -m tools.benchtop build`` and ``check``: make the benchtop from its seeds, measure its quality."""

from __future__ import annotations

import json as json_lines
from pathlib import Path
from typing import Annotated

import typer

from rgbench.cli.options import (
    SETTINGS,
    Device,
    DeviceOption,
    ExplainingGroup,
    ready,
    say_what_matters,
    split_names,
)
from rgbench.models.presets import WEIGHTS

app = typer.Typer(cls=ExplainingGroup, help="Build the benchtop, check its quality.", **SETTINGS)


@app.callback()
def _root() -> None:
    say_what_matters()


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Build folder, kept between calls.")] = Path("build/benchtop"),
    stage: Annotated[list[str] | None, typer.Option(help="Run these stages alone, like vae,teacher.")] = None,
    device: DeviceOption = Device.auto,
    quick: Annotated[
        bool, typer.Option(help="Run a few steps of each stage: tests the build, trains nothing.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Also run stages that are done.")] = False,
    install: Annotated[bool, typer.Option(help="Then replace the package's own weights.")] = False,
) -> None:
    """Make the benchtop from its seeds, in stages; skip those that are done."""
    place = ready(device)
    import torch

    from tools.benchtop import build as stages

    recipe = stages.WorldRecipe.quick() if quick else stages.WorldRecipe()
    stages.build(recipe, out, split_names(stage), torch.device(place), force=force)
    if install:
        stages.install(out, WEIGHTS)
    typer.echo(out)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A build folder; the package's own weights by default.")] = WEIGHTS,
    num: Annotated[int, typer.Option(min=1, help="Scenes per split.")] = 512,
    student: Annotated[Path | None, typer.Option(help="Pipeline of an LCD run; trained first by default.")] = None,
    lrm: Annotated[list[Path] | None, typer.Option(help="Finished LRM run: measure its proxy too. Repeatable.")] = None,
    results: Annotated[Path | None, typer.Option(help="Results with LCD seeds, whose spread is a unit.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows with their provenance here.")] = None,
    device: DeviceOption = Device.auto,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the benchtop's quality; exit 1 where a value is out of its bounds."""
    place = ready(device)
    import torch

    from tools.benchtop.check import Row
    from tools.benchtop.check import check as run

    def say(row: Row) -> None:
        if not json:
            typer.echo(row)

    rows = run(path, torch.device(place), num=num, student=student, lrm=lrm or (), results=results, say=say, out=out)
    if json:
        typer.echo(json_lines.dumps([row.to_dict() for row in rows], indent=1))
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m tools.benchtop")
