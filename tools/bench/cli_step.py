"""``python -m tools.bench``: the verbs that measure steps, and what all its verbs share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rgbench.cli.options import Device, DeviceOption, OverridesArgument, ready, split_names

PresetOption = Annotated[str, typer.Option(help="benchtop, or sd21-base with random weights.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the result files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of the file's name.")]
TagOption = Annotated[str | None, typer.Option(help="Added to the file's name: keep other settings beside.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often each is timed, in turn.")]
DEFAULT_OUT = Path("results/bench")


def finish(measured: dict[str, Any], out: Path, device: str, tag: str | None, as_json: bool) -> None:
    """Write the result, and print its file or its figures."""
    from rgbench.core.io import read_json
    from tools.bench.api import save

    file = save(out, ["rgbench", *sys.argv[1:]], device, tag, measured)
    if not as_json:
        typer.echo(file)
        return
    import json

    typer.echo(json.dumps(read_json(file), indent=2, ensure_ascii=False))


def say(line: str) -> None:
    """One line on stderr."""
    typer.echo(line, err=True)


def train_step(
    overrides: OverridesArgument = None,
    preset: PresetOption = "benchtop",
    method: Annotated[list[str] | None, typer.Option(help="Like lcd,lrm; all three by default.")] = None,
    rounds: RoundsOption = 8,
    neighbour: Annotated[bool, typer.Option("--neighbour", help="Beside a busy process too, which it starts.")] = False,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """One optimiser step: counted, timed by part, and against the plain reference step in turn."""
    place = ready(device)
    from tools.bench import api

    methods = split_names(method) or api.METHODS
    measured = api.train_step(
        preset=preset,
        methods=methods,
        device=place,
        overrides=overrides or [],
        rounds=rounds,
        say=say,
        neighbour=neighbour,
    )
    finish(measured, out, place, tag, json)


def count(
    overrides: OverridesArgument = None,
    preset: Annotated[str, typer.Option(help="A full-size preset.")] = "sd21-base",
    method: Annotated[list[str] | None, typer.Option(help="Like lcd,lrm; all three by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Network evaluations per image that is generated.")] = 4,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """FLOPs and bytes of a full-size step, counted on shapes alone: needs no GPU and little memory."""
    ready(Device.cpu)
    from tools.bench import api

    methods = split_names(method) or api.METHODS
    measured = api.counts(preset=preset, methods=methods, overrides=overrides or [], steps=steps, say=say)
    finish(measured, out, "cpu", tag, json)


def growth(
    over: Annotated[str, typer.Argument(help="batch, resolution, proxy or ranks.")],
    overrides: OverridesArgument = None,
    values: Annotated[str | None, typer.Option(help="Like 8,32,64; of batch, px, or layers of the proxy.")] = None,
    preset: PresetOption = "benchtop",
    method: Annotated[list[str] | None, typer.Option(help="Like lcd,lrm; all three by default.")] = None,
    rounds: RoundsOption = 4,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """How the cost of a step grows with the batch, the resolution, the proxy's size or the ranks."""
    place = ready(device)
    from tools.bench import api

    measured = api.cost_growth(
        over=over,
        values=_numbers(values),
        preset=preset,
        methods=split_names(method) or api.METHODS,
        device=place,
        overrides=overrides or [],
        rounds=rounds,
        say=say,
    )
    finish(measured, out, place, f"{over}-{tag}" if tag else over, json)


def _numbers(text: str | None) -> list[int]:
    """Positive numbers from ``8,32``."""
    from rgbench.core.errors import UsageError

    parts = split_names([text] if text else None)
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--values {text!r}: expected numbers such as 8,32,64")
    return [int(part) for part in parts]


def levers(
    overrides: OverridesArgument = None,
    preset: PresetOption = "benchtop",
    lever: Annotated[list[str] | None, typer.Option(help="Like 'channels last,foreach EMA'; all by default.")] = None,
    rounds: RoundsOption = 8,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """What each lever of the step gives alone, kept or dropped."""
    place = ready(device)
    from tools.bench import api

    names = split_names(lever)
    measured = api.lever_gains(
        preset=preset, names=names, device=place, overrides=overrides or [], rounds=rounds, say=say
    )
    finish(measured, out, place, tag, json)


def compiled(
    overrides: OverridesArgument = None,
    preset: PresetOption = "benchtop",
    method: Annotated[list[str] | None, typer.Option(help="Like lcd,lrm; all three by default.")] = None,
    networks: Annotated[list[str] | None, typer.Option(help="recipe: train.compile's; all. Both by default.")] = None,
    rounds: RoundsOption = 8,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """Whole steps with torch.compile beside the same without: gain, minutes to compile, the gradients' difference."""
    place = ready(device)
    from tools.bench import api

    measured = api.compile_gains(
        preset=preset,
        methods=split_names(method) or api.METHODS,
        choices=split_names(networks),
        device=place,
        overrides=overrides or [],
        rounds=rounds,
        say=say,
    )
    finish(measured, out, place, tag, json)
