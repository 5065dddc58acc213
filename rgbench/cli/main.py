"""The command line. Commands import what they need when they run: help and typos need no torch.

Exit codes: 0; 1 failure; 2 wrong usage; 75 interrupted, the same command continues; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rgbench import __version__
from rgbench.cli.arena import arena
from rgbench.cli.judge import check, compare, headroom, probes_app, verdict
from rgbench.cli.options import (
    SETTINGS,
    Device,
    DeviceOption,
    DtypeOption,
    ExplainingGroup,
    GuidanceOption,
    HeadOption,
    LaunchOption,
    NodesOption,
    NprocOption,
    OffloadOption,
    OverridesArgument,
    PipelineKwargsOption,
    RecipeArgument,
    ResultsArgument,
    ResultsOption,
    RunsOption,
    StepsOption,
    complain,
    complete_metrics,
    complete_recipes,
    complete_runs,
    complete_shown,
    launch_words,
    options_from,
    print_paths,
    ready,
    say_what_matters,
    split_names,
    start_processes,
)
from rgbench.core.errors import UsageError, suggest
from rgbench.core.io import check_place, write_bytes_atomic
from rgbench.core.process import is_main_rank, launched, tune
from rgbench.evaluate.config import EvalConfig

if TYPE_CHECKING:
    from rgbench.evaluate.results import ModelResult
    from rgbench.metrics.values import MetricValue

START, JUDGE, LOOK, MAINTAIN = "Start", "Judge", "Look", "Maintain"
DOCS = "Documentation: docs/ in the repository."
MAX_NAMED = 4  # metrics in a note under a table
ARROWS = {"lower": "↓", "higher": "↑", "reference": ""}

app = typer.Typer(
    cls=ExplainingGroup,
    help="Train, evaluate and compare reward-guided diffusion students.",
    epilog=DOCS,
    **SETTINGS | {"add_completion": True},
)


class Kind(StrEnum):
    """What ``rgbench ls`` lists."""

    recipes = "recipes"
    metrics = "metrics"
    probes = "probes"
    rewards = "rewards"
    workers = "workers"
    runs = "runs"
    results = "results"
    protocols = "protocols"


class Resume(StrEnum):
    """What ``rgbench train`` does where its run exists."""

    auto = "auto"
    never = "never"


class Network(StrEnum):
    """Which network of a run is exported."""

    student = "student"
    target = "target"


class Format(StrEnum):
    """Files of a report."""

    md = "md"
    csv = "csv"
    tex = "tex"
    html = "html"


def main() -> None:
    """Run the command of this process's command line."""
    app(prog_name="rgbench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rgbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    say_what_matters()


@app.command(rich_help_panel=START, epilog="Example: rgbench train lrm train.steps=500 seed=1")
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/{recipe}-s{seed}.")] = None,
    resume: Annotated[
        Resume, typer.Option(help="auto: resume if the run exists. never: fail if it exists.")
    ] = Resume.auto,
    device: DeviceOption = Device.auto,
    launch: LaunchOption = None,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    head: HeadOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check everything; train nothing.")] = False,
) -> None:
    """Train a student, in one process or in several."""
    words = launch_words(launch, nproc, nodes, head)
    if not launched():
        _check_recipe(recipe, overrides)
    if dry_run:
        tune()
        from rgbench.cli.show import print_dry_run

        print_dry_run(recipe, overrides or [], out, device.value)
        return
    if launch is not None and not launched():
        options = [*(["--out", str(out)] if out else []), "--resume", resume.value, "--device", device.value]
        start_processes("train", recipe, overrides or [], options, launch, nproc, nodes, head)
        return
    tune()
    from rgbench.train.train import train as run

    path = run(recipe, overrides or [], out=out, resume=resume.value, device=device.value, launch=words)
    if is_main_rank():
        from rgbench.cli.show import what_next

        typer.echo(path)
        typer.echo(what_next(path), err=True)


def _check_recipe(recipe: str, overrides: list[str] | None) -> None:
    """Answer a fault in a recipe before torch is imported."""
    from rgbench.train.recipe import load_recipe

    load_recipe(recipe, overrides or [])


@app.command(name="eval", rich_help_panel=START, epilog="Example: rgbench eval runs/lrm-s0 --metric fid,hps")
@options_from(EvalConfig, complete={"metrics": complete_metrics, "targets": complete_runs})
def evaluate(
    config: EvalConfig,
    paths: Annotated[
        bool,
        typer.Option("--paths", help="Print the files of the results, as into a pipe.", rich_help_panel="Results"),
    ] = False,
) -> None:
    """Generate images with models and measure them."""
    from rgbench.evaluate.targets import check_inputs

    check_inputs(config)
    check_place(config.results)
    tune()
    from rgbench.evaluate.evaluate import evaluate as run

    found = run(config)
    _print_results(found, paths)
    if found:
        typer.echo(f"Next: {shlex.join(['rgbench', 'report', str(config.results)])}", err=True)


def _check_formats(given: list[str] | None) -> list[str] | None:
    for name in split_names(given):
        if name not in list(Format):
            raise UsageError(f"--format: unknown format {name!r}; {suggest(name, Format)}")
    return given


@app.command(rich_help_panel=START, epilog="Example: rgbench report results --format md")
def report(
    results: ResultsArgument = Path("results"),
    out: Annotated[Path | None, typer.Option(help="Folder of the report. Default: RESULTS/report.")] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="md, csv, tex, html. Default: all.", callback=_check_formats)
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Models to show, with what they are compared with. Default: all.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metrics of tables and CSV, e.g. hps,oracle. Default: all.", autocompletion=complete_metrics),
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Name to show: rg_lcd=Guided.", metavar="NAME=TEXT")] = None,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "",
    base: Annotated[
        str | None, typer.Option(help="Model to compare with. Default: the LCD students of equal budget.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Do not write; exit 1 if the report on disk is out of date (for CI).")
    ] = False,
) -> None:
    """Write comparison tables, plots and one page from results."""
    formats, labels = split_names(format), {}
    for given in label or ():
        name, equals, text = given.partition("=")
        if not (name and equals and text):
            raise UsageError(f"--label {given}: not NAME=TEXT")
        labels[name] = text
    if not check:
        check_place(out or results / "report")
    tune()
    os.environ["MPLBACKEND"] = "agg"  # matplotlib refuses to be imported with a back end that it lacks, as a notebook's
    from rgbench.core.progress import image_progress, track_images
    from rgbench.report import report as api

    answers: list[str] = []
    run = api.check if check else partial(api.report, say=answers.append)
    choice = api.Choice(tuple(split_names(model)), tuple(split_names(metric)), labels, title, base)
    with image_progress() as progress:
        files = run(results, out or results / "report", formats, track_images(progress), choice)
    for answer in answers:
        typer.echo(answer, err=True)
    print_paths(file for file in files if file.stem == "report" or not sys.stdout.isatty())


@app.command(rich_help_panel=START, epilog='Example: rgbench sample lrm-s0 --prompt "a small red circle"')
def sample(
    target: Annotated[str, typer.Argument(help="A run, a pipeline folder, or teacher.", autocompletion=complete_runs)],
    prompt: Annotated[list[str], typer.Option(help="Prompt of an image; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder of the PNGs.")] = Path("samples"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    pipeline_kwargs: PipelineKwargsOption = None,
    dtype: DtypeOption = "float32",
    offload: OffloadOption = False,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = Device.auto,
) -> None:
    """Make images from prompts."""
    from rgbench.evaluate.targets import check_inputs

    arguments = tuple(pipeline_kwargs or ())
    check_inputs(EvalConfig(targets=(target,), runs=runs, pipeline_kwargs=arguments))
    check_place(out)
    tune()
    from rgbench.evaluate.evaluate import sample as run

    files = run(
        target,
        prompt,
        out=out,
        seed=seed,
        steps=steps,
        guidance=guidance,
        device=device.value,
        runs=runs,
        dtype=dtype,
        pipeline_kwargs=arguments,
        offload=offload,
    )
    print_paths(files)


app.command(rich_help_panel=JUDGE, epilog="Example: rgbench verdict results")(verdict)
app.command(rich_help_panel=JUDGE, epilog="Example: rgbench compare results --base lcd")(compare)
app.command(rich_help_panel=JUDGE, epilog="Example: rgbench headroom lcd-s0 --num 64")(headroom)
app.command(rich_help_panel=JUDGE, epilog="Example: rgbench check results --max-hf-db 1 --min oracle_all=80")(check)
app.command(rich_help_panel=JUDGE, epilog="Example: rgbench arena lcd-s0 rg_lcd-s0 --num 20")(arena)
app.add_typer(probes_app, name="probes", rich_help_panel=JUDGE, epilog="Example: rgbench probes gold results")


@app.command(rich_help_panel=LOOK, epilog="Example: rgbench ls metrics")
def ls(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    runs: RunsOption = Path("runs"),
    results: ResultsOption = Path("results"),
) -> None:
    """List recipes, metrics, probes, rewards, workers, runs, results or protocols."""
    from rgbench.cli.show import listing, print_table

    print_table(*listing(kind.value, runs, results), aside=("unit", "family", "label"))


@app.command(rich_help_panel=LOOK, epilog="Example: rgbench show lcd")
def show(
    name: Annotated[
        str, typer.Argument(help="A recipe, a run, or a folder of results.", autocompletion=complete_shown)
    ],
    runs: RunsOption = Path("runs"),
) -> None:
    """Show a recipe, a run, or results."""
    from rgbench.cli.show import show as run

    run(name, runs)


@app.command(rich_help_panel=LOOK, epilog="Example: rgbench doctor sd21/lrm")
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="List what this recipe needs instead.", autocompletion=complete_recipes)
    ] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Check the installation, or what a recipe still needs."""
    if recipe is not None:
        _check_recipe(recipe, overrides)
    from rgbench.cli.show import print_checks

    tune()
    if not print_checks(recipe, overrides or []):
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK, epilog="Example: rgbench plan sdxl/lcd_lora --gpu 4090")
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[
        str | None, typer.Option(help="Also say whether it fits, and how long it takes: h100, a100-80, 4090, ...")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train together; figures are of each.")] = 1,
) -> None:
    """Count the memory and the operations of a recipe's training step, without its weights."""
    _check_recipe(recipe, overrides)
    tune()
    from rgbench.cli.show import print_plan

    if not print_plan(recipe, overrides or [], gpu, gpus):
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK, epilog="Example: rgbench validate my.yaml")
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="YAML files or packaged recipes.", autocompletion=complete_recipes),
    ],
) -> None:
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


@app.command(rich_help_panel=MAINTAIN, epilog="Example: rgbench cp lrm my.yaml")
def cp(
    recipe: RecipeArgument,
    dest: Annotated[Path | None, typer.Argument(help="New file or a folder. Default: ./RECIPE.yaml.")] = None,
) -> None:
    """Copy a recipe, to change it."""
    from rgbench.core.config import find_recipe

    source = find_recipe(recipe)
    dest = dest or Path(source.name)
    target = dest / source.name if dest.is_dir() else dest
    if target.exists():
        raise UsageError(f"{target}: exists already and was not overwritten; choose another name")
    write_bytes_atomic(target, source.read_bytes())
    typer.echo(target)


@app.command(rich_help_panel=MAINTAIN, epilog="Example: rgbench export runs/lcd-s0 --network student")
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    network: Annotated[Network, typer.Option(help="The online network, or its EMA.")] = Network.student,
    out: Annotated[Path | None, typer.Option(help="A new folder. Default: {run}-{network} beside the run.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Write a network of a run's newest checkpoint as a diffusers pipeline folder."""
    where = ready(device)
    from rgbench.train.train import export_run

    typer.echo(export_run(run, network.value, out, where))


@app.command(rich_help_panel=MAINTAIN, epilog="Example: rgbench cache sd21/lrm data.path=tars")
def cache(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    device: DeviceOption = Device.auto,
    launch: LaunchOption = None,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    head: HeadOption = None,
    source: Annotated[
        Literal["data", "teacher"],
        typer.Option("--from", help="Encode the data's images, or sample its captions from the teacher."),
    ] = "data",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each caption, with --from teacher.")] = 1,
    score: Annotated[
        str | None, typer.Option(help="Reward that scores them, e.g. hps, with --from teacher.", metavar="KIND")
    ] = None,
) -> None:
    """Encode a recipe's images and captions once, for every training from them; or sample them from its teacher."""
    launch_words(launch, nproc, nodes, head)
    if source == "data" and (samples > 1 or score is not None):
        raise UsageError("--samples and --score are of a teacher's samples; add --from teacher")
    if not launched():
        _check_recipe(recipe, overrides)
    if launch is not None and not launched():
        options = ["--device", device.value, "--from", source, "--samples", str(samples)]
        options += [] if score is None else ["--score", score]
        start_processes("cache", recipe, overrides or [], options, launch, nproc, nodes, head)
        return
    tune()
    from rgbench.train.cache import cache as encode
    from rgbench.train.cache import cache_samples

    run = encode if source == "data" else partial(cache_samples, samples=samples, kind=score)
    folder = run(recipe, overrides or [], device=device.value, say=lambda line: typer.echo(line, err=True))
    if is_main_rank():
        typer.echo(folder)


@app.command(rich_help_panel=MAINTAIN, epilog="Example: rgbench merge --results results")
def merge(
    results: ResultsOption = Path("results"),
    device: DeviceOption = Device.auto,
    paths: Annotated[bool, typer.Option("--paths", help="Print the files of the results, as into a pipe.")] = False,
) -> None:
    """Put the shards of evaluations together, and store their values."""
    tune()
    from rgbench.evaluate.evaluate import merge as run

    _print_results(run(results, device=device.value), paths)


@app.command(rich_help_panel=MAINTAIN, epilog="Example: rgbench rm lrm-s0/lcm4-c5bec29a")
def rm(
    result: Annotated[list[str], typer.Argument(help="Like lrm-s0, lrm-s0/GENERATION or WORLD/lrm-s0/GENERATION.")],
    results: ResultsOption = Path("results"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove results."""
    from rgbench.evaluate.results import find_folders, remove_folder

    folders = [folder for name in result for folder in find_folders(results, name)]
    for folder in dict.fromkeys(folders):
        if yes or typer.confirm(f"Remove {folder}?", err=True):
            remove_folder(folder)
            typer.echo(folder)


@app.command(rich_help_panel=MAINTAIN, epilog="Example: rgbench export-data tars --num 1000")
def export_data(
    out: Annotated[Path, typer.Argument(help="Folder of the tars.")],
    num: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 10_000,
    split: Annotated[str, typer.Option(help="train, test, heldout or all.")] = "train",
    shard_size: Annotated[int, typer.Option(min=1, help="Scenes per tar.")] = 1000,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")] = 95,
) -> None:
    """Write benchtop scenes as webdataset tars of JPEG and caption."""
    check_place(out)
    tune()
    from rgbench.data.tars import export_scenes

    print_paths(export_scenes(out, num, split=split, shard_size=shard_size, quality=quality))


def _print_results(results: Sequence[ModelResult], paths: bool) -> None:
    """Print a table of models and metrics; the files on stdout where it is no terminal, and the table on stderr."""
    piped = not sys.stdout.isatty()
    if results:
        typer.echo("\n".join(result_lines(results)), err=piped)
    if paths or piped:
        print_paths(result.folder / "result.json" for result in results if result.folder is not None)


def result_lines(results: Sequence[ModelResult]) -> list[str]:
    """A plain-text table, its longer side down, and what its marks mean.

    Args:
        results: of one evaluation.
    """
    from rgbench.metrics.values import metric_info
    from rgbench.report.tables import FLAGS

    columns: dict[tuple[str, str], str] = {}
    cells: dict[tuple[int, tuple[str, str]], str] = {}
    flags: dict[str, list[str]] = {}
    for row, result in enumerate(results):
        for value in result.values:
            info = metric_info(value.metric, result.head.metrics)
            label = f"{info.label}{' gap' if value.reference else ''}"
            columns.setdefault(
                value.key, f"{label}{f', {info.unit}' if info.unit else ''} {ARROWS[info.direction]}".strip()
            )
            for flag in value.flags:
                flags.setdefault(flag, []).append(label)
            cells[row, value.key] = _cell(value, info.decimals)
    rows = [[_row_name(result), *(cells.get((i, key), "") for key in columns)] for i, result in enumerate(results)]
    table = [["", *columns.values()], *rows]
    if len(columns) > len(results):
        table = [list(line) for line in zip(*table, strict=True)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes = []
    for flag, labels in flags.items():
        distinct = list(dict.fromkeys(labels))
        where = ", ".join(distinct) if len(distinct) <= MAX_NAMED else f"{len(distinct)} metrics"
        notes.append(f"{where}: {FLAGS.get(flag, flag)}")
    if any(value.in_sample for result in results for value in result.values):
        notes.insert(0, "†: the model was trained on this reward")
    return [*lines, *notes]


def _row_name(result: ModelResult) -> str:
    fields, training = result.head.generation.fields, result.head.training
    name = f"{result.head.model} @ {training['step']}" if result.is_checkpoint else result.head.model
    return (
        f"{name} ({fields['sampler']}, {fields['steps']} steps, g {fields['guidance_scale']:g})"
        if "steps" in fields
        else name
    )


def _cell(value: MetricValue, decimals: int) -> str:
    """A value with half the width of its interval, or its ends where it is not in their middle."""
    if value.value is None:
        return "—"
    text = f"{value.value:.{decimals}f}{'†' * value.in_sample}"
    if value.interval is None:
        return text
    low, high = value.interval.low, value.interval.high
    if abs((low + high) / 2 - value.value) * 10 <= high - low:
        return f"{text} ± {(high - low) / 2:.{decimals}f}"
    return f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"
