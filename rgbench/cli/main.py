"""The command line. Verbs import what they need when they run: ``--help`` imports no torch.

Exit codes: 0; 1 failure; 2 wrong usage; 75 interrupted, resumable; 130 Ctrl-C.

``rgbench export``: either network of a run as a diffusers pipeline folder.

``rgbench doctor``: is this environment sound, has a recipe what it needs, does the code give the golden numbers.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rgbench import __version__
from rgbench.cli.judge import check, compare, probes_app, verdict
from rgbench.cli.options import (
    SETTINGS,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    ExplainingGroup,
    GuidanceOption,
    HeadOption,
    Kind,
    LaunchOption,
    NodesOption,
    NprocOption,
    OverridesArgument,
    ResultsOption,
    RunsOption,
    Sampler,
    StepsOption,
    complain,
    launch_words,
    print_paths,
    ready,
    say_what_matters,
    split_names,
    start_processes,
    tune,
)
from rgbench.core.errors import UsageError
from rgbench.core.process import is_main_rank, launched


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
    from rgbench.train.train import export_run

    typer.echo(export_run(run, network.value, out, where))


def doctor(
    recipe: Annotated[str | None, typer.Argument(help="List what this recipe needs instead.")] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Check this environment, or what a recipe needs."""
    from rgbench.cli.show import print_checks

    tune()
    if not print_checks(recipe, overrides or []):
        raise typer.Exit(1)


app = typer.Typer(cls=ExplainingGroup, help="Train, evaluate and compare reward-guided diffusion students.", **SETTINGS)
app.command()(export)
app.command()(doctor)
app.add_typer(probes_app, name="probes")
app.command()(compare)
app.command()(verdict)
app.command()(check)


def main() -> None:
    """Entry point of the ``rgbench`` command."""
    app(prog_name="rgbench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rgbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    say_what_matters()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.")],
    overrides: OverridesArgument = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/{recipe}-s{seed} by default.")] = None,
    resume: Annotated[str, typer.Option(help="auto goes on with an unfinished run; never refuses one.")] = "auto",
    device: DeviceOption = Device.auto,
    launch: LaunchOption = None,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    head: HeadOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check everything; train nothing.")] = False,
) -> None:
    """Train a student, in one process or in several."""
    words = launch_words(launch, nproc, nodes, head)
    if dry_run:
        tune()
        from rgbench.cli.show import print_plan

        print_plan(recipe, overrides or [], out, device.value)
        return
    if launch is not None and not launched():
        options = [*(["--out", str(out)] if out else []), "--resume", resume, "--device", device.value]
        start_processes("train", recipe, overrides or [], options, launch, nproc, nodes, head)
        return
    tune()
    from rgbench.train.train import train as run

    path = run(recipe, overrides or [], out=out, resume=resume, device=device.value, launch=words)
    if is_main_rank():
        typer.echo(path)


@app.command()
def cache(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.")],
    overrides: OverridesArgument = None,
    device: DeviceOption = Device.auto,
    launch: LaunchOption = None,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    head: HeadOption = None,
) -> None:
    """Encode a recipe's images and captions once, for every training from them."""
    launch_words(launch, nproc, nodes, head)
    if launch is not None and not launched():
        start_processes("cache", recipe, overrides or [], ["--device", device.value], launch, nproc, nodes, head)
        return
    tune()
    from rgbench.train.cache import cache as run

    folder = run(recipe, overrides or [], device=device.value, say=lambda line: typer.echo(line, err=True))
    if is_main_rank():
        typer.echo(folder)


@app.command(name="eval")
def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET", help="Runs, pipelines, folders of images, teacher; all finished runs by default."
        ),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Like fid,hps; all that fit by default.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Prompts; the protocol's own number by default.")] = None,
    seeds: Annotated[str, typer.Option(help="Like 0,1,7 or 0-7: an image of each prompt for each.")] = "0",
    prompts: Annotated[str | None, typer.Option(help="A .txt, .jsonl or COCO captions .json; the world's own.")] = None,
    base: Annotated[str | None, typer.Option(help="Preset or pipeline folder under a student given as a part.")] = None,
    unet: Annotated[Path | None, typer.Option(help="That student's UNet: a folder or a weight file.")] = None,
    lora: Annotated[Path | None, typer.Option(help="That student's LoRA.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Like coco14-30k; see: rgbench ls protocols.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of real images for set metrics and probes.")] = None,
    inception: Annotated[Path | None, typer.Option(help="The FID network's file, if not in its usual place.")] = None,
    hps: Annotated[Path | None, typer.Option(help="HPS checkpoint or open_clip folder; the world's own.")] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="A judge's weights, clip_score=PATH; or any reward, NAME=FILE.yaml.")
    ] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="The model's own by default.")] = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once.")] = None,
    results: ResultsOption = Path("results"),
    runs: RunsOption = Path("runs"),
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    force: Annotated[bool, typer.Option(help="Measure again what is there already.")] = False,
    keep_images: Annotated[int, typer.Option(min=0, help="Images kept for the report.")] = 64,
    save_images: Annotated[bool, typer.Option("--save-images", help="Keep them all, as PNG.")] = False,
    shard: Annotated[str | None, typer.Option(help="A share of the images: 3/64, auto; then rgbench merge.")] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Of each run its checkpoints too.")] = False,
) -> None:
    """Generate images with trained students and their teacher, and measure them."""
    tune()
    from rgbench.evaluate.evaluate import evaluate as run

    print_paths(
        run(
            targets or [],
            split_names(metric),
            num=num,
            seeds=seeds,
            base=base,
            unet=unet,
            lora=lora,
            prompts=prompts,
            protocol=protocol,
            reference=reference,
            inception=inception,
            hps=hps,
            judge=judge or [],
            runs=runs,
            results=results,
            sampler=sampler.value if sampler else None,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
            device=device.value,
            dtype=dtype.value,
            force=force,
            keep_images=keep_images,
            checkpoints=checkpoints,
            save_images=save_images,
            shard=shard,
        )
    )


@app.command()
def merge(results: ResultsOption = Path("results"), device: DeviceOption = Device.auto) -> None:
    """Put the shards of evaluations together, and store their figures."""
    tune()
    from rgbench.evaluate.evaluate import merge as run

    print_paths(run(results, device=device.value))


@app.command()
def export_data(
    out: Annotated[Path, typer.Argument(help="Folder for the tars.")],
    num: Annotated[int, typer.Option(min=1, help="Scenes.")] = 10_000,
    split: Annotated[str, typer.Option(help="train, test, heldout or all.")] = "train",
    shard_size: Annotated[int, typer.Option(min=1, help="Scenes per tar.")] = 1000,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")] = 95,
) -> None:
    """Write scenes as webdataset tars of JPEG and caption."""
    tune()
    from rgbench.data.tars import export_scenes

    print_paths(export_scenes(out, num, split=split, shard_size=shard_size, quality=quality))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    out: Annotated[Path | None, typer.Option(help="Folder of the report; RESULTS/report by default.")] = None,
    format: Annotated[list[str] | None, typer.Option(help="md, csv, tex, html; all by default.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Do not write; exit 1 if the report on disk is out of date (for CI)."),
    ] = False,
) -> None:
    """Write comparison tables, plots and one page from results."""
    tune()
    os.environ["MPLBACKEND"] = "agg"  # matplotlib refuses to be imported with a back end that it lacks, as a notebook's
    from rgbench.core.progress import image_progress, track_images
    from rgbench.report import report as api

    run = api.check if check else api.report
    with image_progress() as progress:
        files = run(results, out or results / "report", split_names(format), track_images(progress))
    print_paths(files)


@app.command()
def sample(
    target: Annotated[str, typer.Argument(help="A run, a pipeline folder, or teacher.")],
    prompt: Annotated[list[str], typer.Option(help="May be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("samples"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = Device.auto,
) -> None:
    """Make images from prompts."""
    tune()
    from rgbench.evaluate.evaluate import sample as run

    print_paths(run(target, prompt, out=out, seed=seed, steps=steps, guidance=guidance, device=device.value, runs=runs))


@app.command()
def ls(kind: Kind, runs: RunsOption = Path("runs"), results: ResultsOption = Path("results")) -> None:
    """List recipes, metrics, probes, rewards, workers, runs, results or protocols."""
    from rgbench.cli.show import listing, print_table

    print_table(*listing(kind.value, runs, results))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A recipe, a run, or a folder of results.")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Show a recipe, a run, or results."""
    from rgbench.cli.show import show as run

    run(name, runs)


@app.command()
def cp(recipe: str, dest: Path) -> None:
    """Copy a recipe, to change it."""
    from rgbench.core.config import find_recipe
    from rgbench.core.io import write_bytes_atomic

    source = find_recipe(recipe)
    target = dest / source.name if dest.is_dir() else dest
    if target.exists():
        raise UsageError(f"{target}: exists already; nothing was overwritten. Choose another name")
    write_bytes_atomic(target, source.read_bytes())
    typer.echo(target)


@app.command()
def validate(recipes: Annotated[list[str], typer.Argument(metavar="RECIPE")]) -> None:
    """Check recipes without running them."""
    from rgbench.train.recipe import load_recipe

    faults = 0
    for recipe in recipes:
        try:
            loaded = load_recipe(recipe)
        except UsageError as error:
            complain(str(error))
            faults += 1
        else:
            typer.echo(f"{recipe}: ok ({loaded.kind})")
    if faults:
        raise typer.Exit(UsageError.exit_code)
