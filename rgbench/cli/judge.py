"""Commands that judge: probes, verdict, compare, check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgbench.cli.options import (
    SETTINGS,
    Device,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    OffloadOption,
    PipelineKwargsOption,
    ResultsArgument,
    ResultsOption,
    RunsOption,
    StepsOption,
    complain,
    complete_runs,
    print_paths,
    ready,
    split_names,
)
from rgbench.core.errors import UsageError
from rgbench.core.process import tune
from rgbench.evaluate.config import EvalConfig

if TYPE_CHECKING:
    from rgbench.judge.compare import Comparison
    from rgbench.judge.headroom import Headroom, Mean
    from rgbench.judge.verdict import Verdict

probes_app = typer.Typer(help="Prove what the probes for over-optimisation find; read their curves.", **SETTINGS)


@probes_app.command(epilog="Example: rgbench probes validate --results results")
def validate(
    out: Annotated[Path, typer.Option(help="Folder for validation.json and validation.md.")] = Path("results/probes"),
    metric: Annotated[
        list[str] | None, typer.Option(help="Like grid,pixels; all, and the verdict, by default.")
    ] = None,
    hack: Annotated[list[str] | None, typer.Option(help='Like noise,"mode collapse"; all by default.')] = None,
    sets: Annotated[int, typer.Option(min=2, help="Sets of 32 scenes, clean and hacked.")] = 12,
    results: Annotated[Path | None, typer.Option(help="LCD seeds that verdicts are simulated from.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Plant known hacks and gains into scenes: what each metric finds, and how often the verdict errs."""
    place = ready(device)
    from rgbench.core.progress import image_progress, track_images
    from rgbench.judge.models import load_result_sets
    from rgbench.judge.validate import validate as run

    seeds = load_result_sets(results)[0] if results else None
    with image_progress() as progress:
        track = track_images(progress)
        files = run(
            split_names(metric), out, hacks=split_names(hack), num_sets=sets, results=seeds, device=place, track=track
        )
    print_paths(files)


@probes_app.command(epilog="Example: rgbench probes repeat-prompts eight.jsonl --times 8")
def repeat_prompts(
    out: Annotated[Path, typer.Argument(help="A .jsonl for rgbench eval --prompts.")],
    times: Annotated[int, typer.Option(min=2, help="Images of each prompt.")] = 8,
    num: Annotated[int | None, typer.Option(min=1, help="Prompts; 64 of the benchtop's, or all of a file.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A prompt file; the benchtop's by default.")] = None,
) -> None:
    """Write a prompt list with several images of each prompt, for diversity and best of n."""
    tune()
    from rgbench.data.prompts import benchtop_prompts, load_prompts, write_prompts
    from rgbench.data.prompts import repeat_prompts as repeat

    chosen = load_prompts(prompts) if prompts else benchtop_prompts(num or 64)
    typer.echo(write_prompts(repeat(chosen.first(num) if num else chosen, times), out))


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@probes_app.command(epilog="Example: rgbench probes gold results")
def gold(results: ResultsArgument = Path("results"), json: JsonOption = False) -> None:
    """Show gold and trained reward along the checkpoints of each run, and the step where hacking begins."""
    tune()
    from rgbench.judge.models import load_result_sets
    from rgbench.judge.trajectory import training_runs

    rows = []
    for run in (run for found in load_result_sets(results) for run in training_runs(found)):
        if (trained := run.proxy) is None:
            continue
        for column in run.golds:
            ours, proxy, hack = run.curve(column), run.curve(trained), run.hack(column)
            for step in (step for step in ours if step in proxy):
                values = (trained.label, f"{proxy[step]:.3f}", column.label, f"{ours[step]:.3f}")
                rows.append((run.name, str(step), *values, "hack step" if hack and step == hack.step else ""))
    if not rows:
        raise UsageError(
            f"{results}: no run has gold and its trained reward at two steps; "
            "evaluate its checkpoints: rgbench eval RUN --checkpoints --metric hps,oracle"
        )
    _show(("run", "step", "trained reward", "value", "gold", "value", "mark"), rows, json)


@probes_app.command(epilog="Example: rgbench probes best-of-n rg_lcd-s0 results --base teacher")
def best_of_n(
    model: Annotated[str, typer.Argument(help="The trained run, as in the results.")],
    base: Annotated[str, typer.Option(help="The model whose draws are counted; see repeat-prompts.")],
    reward: Annotated[str, typer.Option(help="A metric with per-image values.")] = "hps",
    results: ResultsArgument = Path("results"),
    json: JsonOption = False,
) -> None:
    """Count how many draws of a base model are worth one of a trained model in its reward."""
    tune()
    from rgbench.judge.models import load_result_sets
    from rgbench.judge.trajectory import best_of_n as run

    sets = load_result_sets(results)
    found = run(next((each for each in sets if each.has(model)), sets[0]), model, base, reward)
    ends = [f"> {found.num_samples}" if end is None else str(end) for end in (found.low, found.high)]
    kl = "—" if found.kl is None else f"{found.kl:.2f}"
    header = ("model", "base", "reward", "best of n", "95 %", "KL, nats", "prompts")
    row = (model, base, reward, str(found), f"[{ends[0]}, {ends[1]}]", kl, str(found.num_prompts))
    _show(header, [row], json)


@probes_app.command(epilog="Example: rgbench probes pareto results --distance kid")
def pareto(
    results: ResultsArgument = Path("results"),
    reward: Annotated[str, typer.Option(help="A metric of which more is better.")] = "hps",
    distance: Annotated[str, typer.Option(help="A metric of which less is better.")] = "fd_efflite0",
    json: JsonOption = False,
) -> None:
    """Mark runs and checkpoints that no other beats in reward and set distance."""
    tune()
    from rgbench.judge.models import load_result_sets
    from rgbench.judge.trajectory import pareto_points

    points = [point for found in load_result_sets(results) for point in pareto_points(found, reward, distance)]
    rows = [
        (p.model, p.generation, str(p.step or ""), f"{p.reward:.3f}", f"{p.distance:.3f}", "front" * p.on_front)
        for p in points
    ]
    _show(("model", "generation", "step", reward, distance, "Pareto"), rows, json)


def _show(header: Sequence[str], rows: Iterable[Sequence[str]], as_json: bool, aside: Sequence[str] = ()) -> None:
    from rgbench.cli.show import print_table

    if not as_json:
        print_table(header, rows, aside)
        return
    from json import dumps

    typer.echo(dumps([dict(zip(header, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))


BaseOption = Annotated[str | None, typer.Option(help="LCD students of equal budget: mine for mine-s0, mine-s1 ….")]


def verdict(
    results: ResultsArgument = Path("results"),
    base: BaseOption = None,
    model: Annotated[list[str] | None, typer.Option(help="Models to judge; by default those with a reward.")] = None,
    reward: Annotated[str | None, typer.Option(help="What --model was trained on, if elsewhere: hps.")] = None,
    gold: Annotated[
        str | None, typer.Option(help="Metric that is gold; by default gold_utility or oracle_all.")
    ] = None,
    headroom: Annotated[float | None, typer.Option(help="Most that better images could gain of the reward.")] = None,
    json: JsonOption = False,
) -> None:
    """Say whether a reward made the images better, against LCD students of equal budget; exit 1 if undecided."""
    tune()
    from rgbench.core.progress import image_progress, track_images
    from rgbench.judge.verdict import Declared, Outcome, give_verdicts

    declared = Declared(base=base, gold=gold, reward=reward, headroom=headroom)
    with image_progress() as progress:
        found = give_verdicts(results, split_names(model), declared, track_images(progress))
    if json:
        from json import dumps

        typer.echo(dumps([each.model_dump(mode="json") for each in found], indent=2, ensure_ascii=False))
    else:
        for each in found:
            _show_verdict(each)
    if any(each.outcome is Outcome.UNDECIDED for each in found):
        raise typer.Exit(1)


def _show_verdict(found: Verdict) -> None:
    from rgbench.cli.show import print_table
    from rgbench.metrics.values import metric_info
    from rgbench.report.words import format_number, format_value

    typer.echo(f"{found.model}: {found.outcome.upper()}")
    rows = []
    for each in found.findings:
        info = metric_info(each.metric)
        values = (format_number(value, info.decimals) for value in (each.model, each.base))
        change = format_value(each.change, each.low, each.high, info.decimals, signed=True)
        rows.append((each.question, info.label, *values, change, f"{each.adjusted:.2g}", each.says))
    if rows:
        print_table(("question", "metric", "model", "LCD", "change", "p", ""), rows)
    typer.echo(found.words)


def headroom(
    target: Annotated[str, typer.Argument(help="A run, a pipeline folder, or teacher.", autocompletion=complete_runs)],
    samples: Annotated[int, typer.Option(help="Images of each prompt.")] = 8,
    num: Annotated[int | None, typer.Option(min=1, help="Prompts; 64 of the benchtop's, or all of a file.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A prompt file; the benchtop's by default.")] = None,
    reward: Annotated[str, typer.Option(help="Metric of the trained reward.")] = "hps",
    held_out: Annotated[list[str] | None, typer.Option(help="Metrics of held-out rewards, e.g. pickscore.")] = None,
    hps: Annotated[Path | None, typer.Option(help="Reward model of hps. Default: the world's.")] = None,
    judge: Annotated[list[str] | None, typer.Option(help="NAME=PATH: weights of a held-out reward.")] = None,
    proxy: Annotated[Path | None, typer.Option(help="Folder of a latent proxy. Default: the world's.")] = None,
    ranges: Annotated[int, typer.Option(min=0, help="Timestep ranges of one-step predictions; 0 for none.")] = 4,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    pipeline_kwargs: PipelineKwargsOption = None,
    dtype: DtypeOption = "float32",
    offload: OffloadOption = False,
    results: ResultsOption = Path("results"),
    runs: RunsOption = Path("runs"),
    device: DeviceOption = Device.auto,
    json: JsonOption = False,
) -> None:
    """Measure what a reward could gain by picking among a model's own images, and what that does to gold."""
    from rgbench.evaluate.targets import check_inputs

    given = {"num": num, "prompts": prompts, "hps": hps, "judge": tuple(judge or ()), "steps": steps}
    how = {"guidance": guidance, "pipeline_kwargs": tuple(pipeline_kwargs or ()), "dtype": dtype, "offload": offload}
    places = {"results": results, "runs": runs, "device": device.value}
    config = EvalConfig(targets=(target,), **given, **how, **places)
    check_inputs(config)
    tune()
    from rgbench.judge.measure_headroom import HeadroomOptions, measure_headroom

    options = HeadroomOptions(samples, reward, tuple(split_names(held_out)), proxy, ranges)
    found = measure_headroom(config, options)
    if json:
        from json import dumps

        typer.echo(dumps([each.model_dump(mode="json") for each in found], indent=2, ensure_ascii=False))
        return
    for each in found:
        _show_headroom(each)


def _show_headroom(found: Headroom) -> None:
    from rgbench.cli.show import print_table
    from rgbench.metrics.values import metric_info

    columns = list(found.groups[0].picks[0].reaches)
    rows: list[Sequence[str]] = []
    for group in found.groups:
        for pick in group.picks:
            cells = [_mean(pick.reaches[name], metric_info(name).decimals) for name in columns]
            distance = "" if pick.set_distance is None else f"{pick.set_distance:.1f}"
            rows.append((group.name or "all", str(group.num_prompts), pick.by, *cells, distance))
    print_table(("prompts", "number", "pick by", *(metric_info(name).label for name in columns), "distance"), rows)
    links = [(group.name or "all", each) for group in found.groups for each in group.links]
    links += [(f"one step from t = {at.timestep}", each) for at in found.ranges for each in at.links]
    about = [(where, each.by, _mean(each.correlation, 2), _mean(each.auc, 2)) for where, each in links]
    print_table(("images", "reward", f"correlation with {metric_info(found.gold).label}", "AUC"), about)
    typer.echo(found.words)


def _mean(mean: Mean | None, decimals: int) -> str:
    if mean is None:
        return "—"
    if mean.low is None or mean.high is None:
        return f"{mean.value:.{decimals}f}"
    return f"{mean.value:.{decimals}f} [{mean.low:.{decimals}f}, {mean.high:.{decimals}f}]"


def compare(
    results: ResultsArgument = Path("results"),
    base: Annotated[str, typer.Option(help="What the others are compared with, like lcd or lcd-s0.")] = "lcd",
    model: Annotated[list[str] | None, typer.Option(help="Models, or runs like lrm-s3; all by default.")] = None,
    primary: Annotated[str | None, typer.Option(help="MODEL:METRIC named beforehand; it keeps its p.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare models over common training seeds, or two runs image by image."""
    tune()
    from rgbench.core.progress import image_progress, track_images
    from rgbench.judge.compare import compare as run
    from rgbench.judge.models import load_result_sets

    named: tuple[str, str] | None = None
    if primary is not None:
        name, _, metric = primary.partition(":")
        named = name, metric
    with image_progress() as progress:
        track = track_images(progress)
        found = run(load_result_sets(results, track), base, split_names(model), named, track)
    header = ("model", "base", "metric", "label", "change", "95 %", "", "by", "wins", "detectable", "p", "primary")
    aside = ("metric", "primary", "base", "detectable", "by", "wins")
    _show(header, [_compare_row(each) for each in found], json, aside)


def _compare_row(found: Comparison) -> Sequence[str]:
    change, digits, none = found.delta, found.column.decimals, "—"
    names = (found.model.label, found.base.label, found.column.metric, found.column.label)
    wins = none
    if found.wins is not None:
        wins = f"{found.wins.rate:.0%} [{found.wins.interval.low:.0%}, {found.wins.interval.high:.0%}]"
    p = none if found.p is None else f"{found.p:.3g}"
    if change is None:
        return *names, none, none, "", none, wins, none, p, "primary" * found.primary
    ends = none if change.low is None else f"[{change.low:+.{digits}f}, {change.high:+.{digits}f}]"
    detectable = none if change.detectable is None else f"{change.detectable:.{digits}f}"
    by = f"{change.num_pairs} {change.basis}" if change.num_pairs else change.basis
    shown = (f"{change.value:+.{digits}f}", ends, change.arrow, by)
    return *names, *shown, wins, detectable, p, "primary" * found.primary


def check(
    results: ResultsArgument = Path("results"),
    max_hf_db: Annotated[
        float | None, typer.Option(help="Most HFER above real images, or above --base, in dB.")
    ] = None,
    max: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE that no model may exceed.")] = None,
    min: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE that every model must reach.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Models to check; all by default.")] = None,
    base: Annotated[str | None, typer.Option(help="Limit differences to this model, like teacher or lcd.")] = None,
    verdict: Annotated[
        bool, typer.Option(help="Also fail models that were hacked, are worse than LCD, or undecided.")
    ] = False,
) -> None:
    """Hold models against limits, for continuous integration; exit 1 where one is broken."""
    tune()
    from rgbench.core.progress import image_progress, track_images
    from rgbench.judge.limits import HIGH_FREQUENCY, Limit, check_results, parse_limits

    limits = parse_limits(split_names(max), most=True) + parse_limits(split_names(min), most=False)
    if max_hf_db is not None:
        limits.insert(0, Limit(HIGH_FREQUENCY, max_hf_db, most=True))
    with image_progress() as progress:
        findings = check_results(results, limits, split_names(model), verdict, base, track_images(progress))
    for finding in findings:
        typer.echo(f"{'ok    ' if finding.ok else 'FAILED'} {finding.words}")
    broken = sum(not finding.ok for finding in findings)
    if broken:
        complain(f"{broken} of {len(findings)} checks failed")
        raise typer.Exit(1)
