"""``python -m tools.benchtop``: build the benchtop, check its quality, show its physics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rgbench.cli.options import (
    SETTINGS,
    Device,
    DeviceOption,
    ExplainingGroup,
    OverridesArgument,
    ready,
    say_what_matters,
    split_names,
)

app = typer.Typer(cls=ExplainingGroup, help="Build the benchtop, check its quality, show its physics.", **SETTINGS)

NumOption = Annotated[int, typer.Option(min=1, help="Images per measurement.")]


@app.command()
def build(
    out: Annotated[Path | None, typer.Option(help="Build folder; build/benchtop by default.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only these stages, like vae,teacher.")] = None,
    device: DeviceOption = Device.auto,
    quick: Annotated[
        bool, typer.Option(help="A few steps of each stage: exercises the build, trains nothing.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Run stages that are done already.")] = False,
    install: Annotated[bool, typer.Option(help="Then put the parts in place of the package's own.")] = False,
) -> None:
    """Make the benchtop from its seeds, in stages that are skipped when done."""
    place = ready(device)
    from tools.benchtop.api import build as run

    folder = out or Path("build/benchtop")
    typer.echo(run(folder, split_names(stage), device=place, quick=quick, force=force, install=install))


@app.command()
def check(
    path: Annotated[Path | None, typer.Argument(help="A build folder; the package's own by default.")] = None,
    num: NumOption = 512,
    student: Annotated[Path | None, typer.Option(help="Pipeline of an LCD run; trained first by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows with their provenance here.")] = None,
    device: DeviceOption = Device.auto,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the benchtop's quality; exit 1 where a row falls short."""
    place = ready(device)
    from tools.benchtop.api import check as run

    if not run(path, device=place, num=num, student=student, as_json=json, out=out):
        raise typer.Exit(1)


@app.command()
def physics(
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs and the curve.")] = Path("build/physics"),
    seeds: Annotated[int, typer.Option(min=2, help="Training seeds per method and scale.")] = 3,
    num: NumOption = 512,
    method: Annotated[list[str] | None, typer.Option(help="rg_lcd or lrm; both by default.")] = None,
    scale: Annotated[list[float] | None, typer.Option(help="Reward scale; 1, 3 and 10 by default.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Train LCD, direct and proxy students at several reward scales; exit 1 where no scale shows over-optimisation."""
    place = ready(device)
    from tools.benchtop.api import physics as run

    shown = run(out, seeds=seeds, num=num, device=place, overrides=overrides or [], methods=method, scales=scale)
    if not shown:
        raise typer.Exit(1)


@app.callback()
def _root() -> None:
    say_what_matters()


if __name__ == "__main__":
    app(prog_name="python -m tools.benchtop")
