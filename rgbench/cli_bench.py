"""``rgbench bench``: what steps, generation, evaluation and data cost, beside plain code and the machine's limits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rgbench.cli_shared import SETTINGS, Device, DeviceOption, OverridesArgument, ready, split_names

bench_app = typer.Typer(help="Measure speed beside plain code and the machine's limits.", **SETTINGS)

PresetOption = Annotated[str, typer.Option(help="benchtop, or sd21-base with random weights.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the result files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of the file's name.")]
TagOption = Annotated[str | None, typer.Option(help="Added to the file's name: keep other settings beside.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often each is timed, in turn.")]
DEFAULT_OUT = Path("results/bench")


def _finish(measured: dict[str, Any], out: Path, device: str, tag: str | None, as_json: bool) -> None:
    """Write the result, and print its file or its figures."""
    from rgbench.bench.api import save
    from rgbench.files import read_json

    file = save(out, ["rgbench", *sys.argv[1:]], device, tag, measured)
    if not as_json:
        typer.echo(file)
        return
    import json

    typer.echo(json.dumps(read_json(file), indent=2, ensure_ascii=False))


def _say(line: str) -> None:
    typer.echo(line, err=True)


@bench_app.command(name="train-step")
def train_step(
    overrides: OverridesArgument = None,
    preset: PresetOption = "benchtop",
    method: Annotated[list[str] | None, typer.Option(help="Like lcd,lrm; all three by default.")] = None,
    rounds: RoundsOption = 8,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """One optimiser step: counted, timed by part, and against the plain reference step in turn."""
    place = ready(device)
    from rgbench.bench import api

    methods = split_names(method) or api.METHODS
    measured = api.train_step(
        preset=preset, methods=methods, device=place, overrides=overrides or [], rounds=rounds, say=_say
    )
    _finish(measured, out, place, tag, json)
