"""``python -m tools.bench``: cost of steps, generation, evaluation and data beside plain code and the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rgbench.cli.options import SETTINGS, Device, DeviceOption, ExplainingGroup, ready, split_names
from tools.bench.cli_step import (
    DEFAULT_OUT,
    JsonOption,
    OutOption,
    PresetOption,
    RoundsOption,
    TagOption,
    compiled,
    count,
    finish,
    growth,
    levers,
    say,
    train_step,
)

app = typer.Typer(cls=ExplainingGroup, help="Measure speed beside plain code and the machine's limits.", **SETTINGS)
app.command(name="train-step")(train_step)
app.command()(count)
app.command()(growth)
app.command()(levers)
app.command(name="compile")(compiled)


@app.command()
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
    from tools.bench import api

    measured = api.generation(
        preset=preset,
        device=place,
        dtype=dtype,
        batch_size=batch_size,
        steps=steps,
        guidance=guidance,
        rounds=rounds,
    )
    finish(measured, out, place, tag, json)


@app.command(name="eval")
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
    from tools.bench import api

    measured = api.evaluation_share(
        preset=preset, num=num, metrics=split_names(metric), device=place, dtype=dtype, rounds=rounds
    )
    finish(measured, out, place, tag, json)


@app.command()
def metrics(
    preset: PresetOption = "benchtop",
    num: Annotated[int, typer.Option(min=2, help="Images; in batches of 64, or half of them.")] = 512,
    metric: Annotated[list[str] | None, typer.Option(help="Like fid,hps; all that fit, and each probe.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the networks that make sd21-base's images.")] = "bfloat16",
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """What each metric costs of 1,000 images, alone and with all others in one pass."""
    place = ready(device)
    from tools.bench import api

    measured = api.metric_costs(preset=preset, num=num, metrics=split_names(metric), device=place, dtype=dtype)
    finish(measured, out, place, tag, json)


@app.command()
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
    from tools.bench import api

    measured = api.frechet(dim=dim, num=num, images=images, device=place, rounds=rounds)
    finish(measured, out, place, tag, json)


@app.command()
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
    from tools.bench import api

    measured = api.data(num=num, width=width, height=height, resolution=resolution, rounds=rounds)
    finish(measured, out, "cpu", tag, json)


@app.command()
def start(
    rounds: RoundsOption = 3,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
    json: JsonOption = False,
) -> None:
    """Seconds from a command to its first step, and of --help."""
    place = ready(device)
    from tools.bench import api

    finish(api.startup(device=place, rounds=rounds), out, place, tag, json)


@app.command()
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
    from tools.bench import api

    finish(api.whole_run(subject=subject, settings=overrides or []), out, place, tag, json)


@app.command()
def gpu(device: DeviceOption = Device.cuda, out: OutOption = DEFAULT_OUT) -> None:
    """All that needs a GPU, one after the other: SD2.1-base's shape with random weights, nothing to download."""
    place = ready(device)
    from tools.bench.on_gpu import COMMANDS, run_all

    run_all(COMMANDS, out, place, say)


@app.command()
def table(
    results: Annotated[Path, typer.Argument(help="Folder of the result files.")] = DEFAULT_OUT,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("docs/performance.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing: exit 1 unless it is there already.")] = False,
) -> None:
    """Write the page of all figures from the result files."""
    from rgbench.core.errors import RgbenchError
    from rgbench.core.io import write_text_atomic
    from tools.bench.page import page

    text = page(results)
    if not check:
        write_text_atomic(out, text)
    elif not out.is_file() or out.read_text(encoding="utf-8") != text:
        raise RgbenchError(f"{out}: is not what {results} gives; write it again with: python -m tools.bench table")
    typer.echo(out)
