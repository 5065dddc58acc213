"""``rgbench export``: either network of a run as a diffusers pipeline folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rgbench.cli_shared import Device, DeviceOption, ready


class Network(StrEnum):
    """Which network of a run is exported."""

    student = "student"
    target = "target"


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    network: Annotated[Network, typer.Option(help="The online network, or its EMA.")] = Network.student,
    out: Annotated[Path | None, typer.Option(help="A new folder; {run}-{network} beside the run by default.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Write a network of a run's newest checkpoint as a diffusers pipeline folder."""
    where = ready(device)
    from rgbench.trainers.export_run import export_run

    typer.echo(export_run(run, network.value, out, where))
