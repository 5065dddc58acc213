"""``rgbench world``: build, check, measure and export the small worlds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rgbench.cli_shared import SETTINGS, Device, DeviceOption, OverridesArgument, print_paths, ready, split_names, tune

world_app = typer.Typer(help="Build, check, measure and export the small worlds.", **SETTINGS)

WorldArgument = Annotated[str, typer.Argument(help="Like benchtop; see: rgbench world ls")]
NumOption = Annotated[int, typer.Option(min=1, help="Images per measurement.")]


@world_app.command()
def build(
    world: WorldArgument,
    out: Annotated[Path | None, typer.Option(help="Build folder; build/{world} by default.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only these stages, like vae,teacher.")] = None,
    device: DeviceOption = Device.auto,
    quick: Annotated[
        bool, typer.Option(help="A few steps of each stage: exercises the build, trains nothing.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Run stages that are done already.")] = False,
    install: Annotated[bool, typer.Option(help="Then put the parts in place of the package's own.")] = False,
) -> None:
    """Make a world from its seeds, in stages that are skipped when done."""
    place = ready(device)
    from rgbench.worlds.building.api import build as run

    folder = out or Path("build") / world
    typer.echo(run(world, folder, split_names(stage), device=place, quick=quick, force=force, install=install))


@world_app.command()
def check(
    world: WorldArgument,
    path: Annotated[Path | None, typer.Argument(help="A build folder; the package's own world by default.")] = None,
    num: NumOption = 512,
    student: Annotated[Path | None, typer.Option(help="Pipeline of an LCD run; trained first by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows with their provenance here.")] = None,
    device: DeviceOption = Device.auto,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a world's quality; exit 1 where a row falls short."""
    place = ready(device)
    from rgbench.worlds.building.api import check as run

    if not run(world, path, device=place, num=num, student=student, as_json=json, out=out):
        raise typer.Exit(1)


@world_app.command()
def physics(
    world: WorldArgument,
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
    from rgbench.worlds.building.api import physics as run

    shown = run(world, out, seeds=seeds, num=num, device=place, overrides=overrides or [], methods=method, scales=scale)
    if not shown:
        raise typer.Exit(1)


@world_app.command()
def export_data(
    out: Annotated[Path, typer.Argument(help="Folder for the tars.")],
    num: Annotated[int, typer.Option(min=1, help="Scenes.")] = 10_000,
    split: Annotated[str, typer.Option(help="train, test, heldout or all.")] = "train",
    shard_size: Annotated[int, typer.Option(min=1, help="Scenes per tar.")] = 1000,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")] = 95,
) -> None:
    """Write scenes as webdataset tars of JPEG and caption."""
    tune()
    from rgbench.data.export import export_scenes

    print_paths(export_scenes(out, num, split=split, shard_size=shard_size, quality=quality))


@world_app.command()
def ls() -> None:
    """List the worlds."""
    from rgbench.listing import print_table, worlds

    print_table(*worlds())
