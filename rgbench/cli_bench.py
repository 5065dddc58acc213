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
    neighbour: Annotated[bool, typer.Option("--neighbour", help="Beside a busy process too, which it starts.")] = False,
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
        preset=preset,
        methods=methods,
        device=place,
        overrides=overrides or [],
        rounds=rounds,
        say=_say,
        neighbour=neighbour,
    )
    _finish(measured, out, place, tag, json)


@bench_app.command()
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
    from rgbench.bench import api

    methods = split_names(method) or api.METHODS
    measured = api.counts(preset=preset, methods=methods, overrides=overrides or [], steps=steps, say=_say)
    _finish(measured, out, "cpu", tag, json)


@bench_app.command()
def growth(
    over: Annotated[str, typer.Argument(help="batch, resolution, proxy or ranks.")],
    overrides: OverridesArgument = None,
    values: Annotated[str | None, typer.Option(help="Like 8,32,64; of batch, px, or layers of the proxy.")] = None,
    preset: PresetOption = "benchtop",
    method: Annotated[list[str] | None, typer.Option(help="Like lcd,lrm; all three by default.")] = None,
    rounds: RoundsOption = 4,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    json: JsonOption = False,
) -> None:
    """How the cost of a step grows with the batch, the resolution, the proxy's size or the ranks."""
    place = ready(device)
    from rgbench.bench import api

    measured = api.cost_growth(
        over=over,
        values=_numbers(values),
        preset=preset,
        methods=split_names(method) or api.METHODS,
        device=place,
        overrides=overrides or [],
        rounds=rounds,
        say=_say,
    )
    _finish(measured, out, place, over, json)


def _numbers(text: str | None) -> list[int]:
    """Positive numbers from ``8,32``."""
    from rgbench.errors import UsageError

    parts = split_names([text] if text else None)
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--values {text!r}: expected numbers such as 8,32,64")
    return [int(part) for part in parts]


@bench_app.command()
def levers(
    overrides: OverridesArgument = None,
    preset: PresetOption = "benchtop",
    lever: Annotated[list[str] | None, typer.Option(help="Like 'channels last,compile'; all by default.")] = None,
    rounds: RoundsOption = 8,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """What each lever of the step gives alone, kept or dropped."""
    place = ready(device)
    from rgbench.bench import api

    names = split_names(lever)
    measured = api.lever_gains(
        preset=preset, names=names, device=place, overrides=overrides or [], rounds=rounds, say=_say
    )
    _finish(measured, out, place, tag, json)


@bench_app.command()
def generate(
    preset: PresetOption = "benchtop",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Network evaluations per image.")] = 4,
    guidance: Annotated[float, typer.Option(help="In the pipelines' form.")] = 5.0,
    rounds: RoundsOption = 8,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """A student's images by our sampler and by diffusers' pipeline: the same images, in turn."""
    place = ready(device)
    from rgbench.bench import api

    measured = api.generation(
        preset=preset,
        device=place,
        dtype=dtype,
        batch_size=batch_size,
        steps=steps,
        guidance=guidance,
        rounds=rounds,
    )
    _finish(measured, out, place, tag, json)


@bench_app.command(name="eval")
def evaluation(
    preset: PresetOption = "benchtop",
    num: Annotated[int, typer.Option(min=2, help="Images; of sd21-base also half as many.")] = 512,
    metric: Annotated[
        list[str] | None, typer.Option(help="Like fid,hps; all that fit by default; of sd21-base fid,kid,hps.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the networks that make sd21-base's images.")] = "bfloat16",
    rounds: RoundsOption = 1,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """One evaluation beside the generation in it: the benchtop's with all metrics, a full-size one for 30,000."""
    place = ready(device)
    from rgbench.bench import api

    measured = api.evaluation_share(
        preset=preset, num=num, metrics=split_names(metric), device=place, dtype=dtype, rounds=rounds
    )
    _finish(measured, out, place, tag, json)


@bench_app.command()
def fid(
    dim: Annotated[int, typer.Option(min=2, help="Features.")] = 2048,
    num: Annotated[int, typer.Option(min=4, help="Samples of each set.")] = 8192,
    images: Annotated[int, typer.Option(min=2, help="Images on the way through the network.")] = 64,
    rounds: RoundsOption = 3,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """The Fréchet distance beside numpy's eigenvalues and beside clean-fid's folder route."""
    place = ready(device)
    from rgbench.bench import api

    measured = api.frechet(dim=dim, num=num, images=images, device=place, rounds=rounds)
    _finish(measured, out, place, tag, json)


@bench_app.command()
def data(
    num: Annotated[int, typer.Option(min=16, help="Samples.")] = 256,
    width: Annotated[int, typer.Option(min=32, help="Of the files, pixels.")] = 768,
    height: Annotated[int, typer.Option(min=32, help="Of the files, pixels.")] = 576,
    resolution: Annotated[int, typer.Option(min=8, help="That training sees.")] = 512,
    rounds: RoundsOption = 5,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """Samples per second from webdataset tars, beside plain PIL in one thread."""
    ready(Device.cpu)
    from rgbench.bench import api

    measured = api.data(num=num, width=width, height=height, resolution=resolution, rounds=rounds)
    _finish(measured, out, "cpu", tag, json)


@bench_app.command()
def start(
    rounds: RoundsOption = 3,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """Seconds from a command to its first step, and of --help."""
    place = ready(device)
    from rgbench.bench import api

    _finish(api.startup(device=place, rounds=rounds), out, place, tag, json)


@bench_app.command()
def whole(
    subject: Annotated[str, typer.Argument(help="A recipe such as lrm, or demo for `make demo`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The recipe's settings, or make's variables.")
    ] = None,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """A recipe, or the demo, from its command to its last file, by stage."""
    place = ready(Device.auto)  # which the commands take too
    from rgbench.bench import api

    _finish(api.whole_run(subject=subject, settings=overrides or []), out, place, tag, json)


@bench_app.command()
def gpu(device: DeviceOption = Device.cuda, out: OutOption = DEFAULT_OUT) -> None:
    """All that needs a GPU, one after the other: SD2.1-base's shape with random weights, nothing to download."""
    place = ready(device)
    from rgbench.bench.on_gpu import COMMANDS, run_all

    run_all(COMMANDS, out, place, _say)


@bench_app.command()
def table(
    results: Annotated[Path, typer.Argument(help="Folder of the result files.")] = DEFAULT_OUT,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("docs/performance.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing: exit 1 unless it is there already.")] = False,
) -> None:
    """Write the page of all figures from the result files."""
    from rgbench.bench.page import page
    from rgbench.errors import RgbenchError
    from rgbench.files import write_text_atomic

    text = page(results)
    if not check:
        write_text_atomic(out, text)
    elif not out.is_file() or out.read_text(encoding="utf-8") != text:
        raise RgbenchError(f"{out}: is not what {results} gives; write it again with: rgbench bench table")
    typer.echo(out)
