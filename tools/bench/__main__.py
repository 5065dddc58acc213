"""``python -m tools.bench VERB``: measure speed beside plain code, beside diffusers, and against the machine's limits.

Each verb but ``page`` writes a JSON file into ``results/bench``; ``page`` writes ``docs/performance.md`` from them.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rgbench.cli.options import (
    SETTINGS,
    Device,
    DeviceOption,
    ExplainingGroup,
    OverridesArgument,
    ready,
    split_names,
)
from rgbench.core.errors import RgbenchError, UsageError, suggest
from rgbench.core.io import write_text_atomic
from rgbench.train.recipe import BaseRecipe, load_recipe

METHODS = ("lcd", "rg_lcd", "lrm")
PRESETS = {"benchtop": "{}", "sd21-base": "sd21/{}"}  # preset → names of its recipes
# The recipes of full-size models recompute activations; that is measured where it is asked for.
FULL_SIZE = ("train.gradient_checkpointing=false", "train.num_workers=0")
# The plain step weighs the reward by a constant, as the paper does; the benchtop's recipes give it a share.
CONSTANT = ("guidance.share=null", "guidance.scale=1")
DEFAULT_OUT = Path("results/bench")


class Dtype(StrEnum):
    """Floating types of networks."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


PresetOption = Annotated[str, typer.Option(help="benchtop, or sd21-base with random weights.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the result files.")]
TagOption = Annotated[str | None, typer.Option(help="Added to the file's name, to keep several settings.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Timings of each contender, in turn.")]
MetricOption = Annotated[
    list[str] | None, typer.Option(help="Like fid,hps; all that fit by default; fid,kid,hps at full size.")
]

app = typer.Typer(cls=ExplainingGroup, help="Measure speed beside plain code and the machine's limits.", **SETTINGS)


@app.command()
def step(
    overrides: OverridesArgument = None,
    preset: PresetOption = "benchtop",
    method: Annotated[list[str] | None, typer.Option(help="Like lcd,lrm; all three by default.")] = None,
    rounds: RoundsOption = 8,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
) -> None:
    """Time an optimiser step beside the plain reference step; count its FLOPs."""
    methods = split_names(method) or METHODS
    for name in methods:
        _check("--method", name, METHODS)
    _check("--preset", preset, PRESETS)
    recipes = [_recipe_of_step(preset, name, overrides or []) for name in methods]
    if any(recipe.train.compile for recipe in recipes):
        raise UsageError("train.compile: the plain step shares the networks; measure without it")
    place = ready(device)
    from tools.bench import measure
    from tools.bench.timing import row_of

    rows = []
    for name, recipe in zip(methods, recipes, strict=True):
        _say(f"step {preset} {name} on {place}")
        head = {"method": name, "batch_size": recipe.train.batch_size, "dtype": recipe.train.dtype}
        with _folder() as folder:

            def work(recipe: Any = recipe, folder: Path = folder) -> dict[str, Any]:
                return measure.step(*measure.trainer_of(recipe, _shape(preset), place), folder, rounds)

            rows.append(row_of(head, work))
    _save(out, ["step", preset, place], tag, place, overrides=overrides or [], rounds=rounds, rows=rows)


def _recipe_of_step(preset: str, name: str, overrides: Sequence[str]) -> BaseRecipe:
    usual = FULL_SIZE if preset != "benchtop" else CONSTANT if name != "lcd" else ()
    return load_recipe(PRESETS[preset].format(name), [*usual, *overrides])


@app.command()
def methods(
    rounds: RoundsOption = 8,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
) -> None:
    """Compare the methods' steps on the benchtop with LCD's: FLOPs, and seconds in turn."""
    place = ready(device)
    from tools.bench import measure

    with _folder() as folder:
        rows = measure.methods(folder, rounds, place)
    _save(out, ["methods", "benchtop", place], tag, place, rounds=rounds, rows=rows)


@app.command()
def script(
    path: Annotated[Path, typer.Argument(help="A copy of diffusers' train_lcm_distill_sd_wds.py.")],
    overrides: OverridesArgument = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 63,
    rounds: RoundsOption = 3,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
) -> None:
    """Time `rgbench train lcd` and diffusers' LCD script as whole processes, in turn."""
    from tools.bench import processes

    with _folder() as folder:
        seconds = processes.script(path, folder, steps, rounds, overrides or [], _say)
    from tools.bench.timing import ratio, spread

    row = {"steps": steps, "seconds": {name: spread(values) for name, values in seconds.items()},
           "ratio": ratio(seconds["diffusers"], seconds["rgbench"])}  # fmt: skip
    place = ready(Device.auto)  # as both chose
    _save(out, ["script", "benchtop", place], tag, place, overrides=overrides or [], rounds=rounds, rows=[row])


@app.command()
def students(
    subject: Annotated[str, typer.Argument(help="A recipe such as lrm, or demo for `make demo`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of the recipe, or variables of make.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Images of a recipe's evaluation; the demo's: DEMO_NUM.")] = 2048,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
) -> None:
    """Time a recipe and its evaluation, or the demo: students per hour."""
    from tools.bench import processes

    with _folder() as folder:
        row = processes.students(subject, folder, overrides or [], num)
    place = ready(Device.auto)  # as the commands chose
    words = ["students", subject.replace("/", "-"), place]
    _save(out, words, tag, place, overrides=overrides or [], num=num, rows=[row])


@app.command()
def generate(
    preset: PresetOption = "benchtop",
    dtype: Annotated[Dtype, typer.Option(help="Of the networks.")] = Dtype.float32,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    rounds: RoundsOption = 8,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
) -> None:
    """Time our sampler beside diffusers' pipeline on the same images."""
    _check("--preset", preset, PRESETS)
    place = ready(device)
    from tools.bench import measure
    from tools.bench.timing import row_of

    head = {"batch_size": batch_size, "dtype": dtype.value}
    row = row_of(head, lambda: measure.generate(_shape(preset), place, dtype.value, batch_size, rounds))
    _save(out, ["generate", preset, place], tag, place, rounds=rounds, rows=[row])


@app.command(name="eval")
def evaluation(
    preset: PresetOption = "benchtop",
    num: Annotated[int, typer.Option(min=2, help="Images; at full size also half as many.")] = 2048,
    metric: MetricOption = None,
    device: DeviceOption = Device.auto,
    out: OutOption = DEFAULT_OUT,
    tag: TagOption = None,
) -> None:
    """Time an evaluation and the generation in it; at full size, draw both on to 30,000 images."""
    _check("--preset", preset, PRESETS)
    place = ready(device)
    from tools.bench import measure
    from tools.bench.timing import row_of

    with _folder() as folder:
        row = row_of(
            {"images": num},
            lambda: measure.evaluation(_shape(preset), folder, num, split_names(metric), place),
        )
    _save(out, ["eval", preset, place], tag, place, rows=[row])


@app.command()
def gpu(device: DeviceOption = Device.cuda, out: OutOption = DEFAULT_OUT) -> None:
    """Measure everything that needs a GPU: SD2.1-base's shape with random weights, nothing to download."""
    from tools.bench.processes import gpu as run_all

    run_all(out, device.value, _say)


@app.command()
def page(
    results: Annotated[Path, typer.Argument(help="Folder of the result files.")] = DEFAULT_OUT,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("docs/performance.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where the page differs.")] = False,
) -> None:
    """Write the page of all results."""
    from tools.bench.page import page as text_of

    text = text_of(results)
    if not check:
        write_text_atomic(out, text)
    elif not out.is_file() or out.read_text(encoding="utf-8") != text:
        raise RgbenchError(f"{out}: differs from {results}; write it again: python -m tools.bench page")
    typer.echo(out)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _check(option: str, name: str, known: Sequence[str] | dict[str, str]) -> None:
    if name not in known:
        raise UsageError(f"{option} {name}: {suggest(name, known)}")


def _shape(preset: str) -> Any:
    from tools.bench.networks import SD21_BASE

    return {"benchtop": None, "sd21-base": SD21_BASE}[preset]


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rgbench-bench-") as folder:
        yield Path(folder)


def _save(out: Path, words: list[str], tag: str | None, device: str, **measured: Any) -> None:
    from tools.bench.timing import save

    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", "tools.bench", *given])
    head = {"what": words[0], "preset": words[1]}
    typer.echo(save(out, [*words, *([tag] if tag else [])], command, device, head | measured))


if __name__ == "__main__":
    app(prog_name="python -m tools.bench")
