"""``rgbench probes``, ``verdict`` and ``check``: what the probes find, what it means, and limits on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgbench.cli.options import SETTINGS, Device, DeviceOption, complain, print_paths, ready, split_names, tune
from rgbench.core.errors import UsageError

if TYPE_CHECKING:
    from rgbench.judge.compare import MethodContrast, ModelContrast
    from rgbench.judge.verdict import FigureChange, Verdict


probes_app = typer.Typer(help="Prove what the probes for over-optimisation find; read their curves.", **SETTINGS)


@probes_app.command()
def validate(
    out: Annotated[Path, typer.Option(help="Folder for validation.json and validation.md.")] = Path("results/probes"),
    metric: Annotated[
        list[str] | None, typer.Option(help="Like grid,pixels; all probes, hps, oracle by default.")
    ] = None,
    hack: Annotated[list[str] | None, typer.Option(help='Like noise,"mode collapse"; all by default.')] = None,
    sets: Annotated[int, typer.Option(min=2, help="Sets of 32 scenes, clean and hacked.")] = 12,
    device: DeviceOption = Device.auto,
) -> None:
    """Plant known hacks into scenes at several doses: dose-response, detection AUC, the smallest dose found."""
    place = ready(device)
    from rgbench.core.progress import image_progress, track_images
    from rgbench.judge.validate import validate as run

    with image_progress() as progress:
        files = run(
            split_names(metric), out, hacks=split_names(hack), num_sets=sets, device=place, track=track_images(progress)
        )
    print_paths(files)


@probes_app.command()
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


ResultsArgument = Annotated[Path, typer.Argument(help="Folder of result files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@probes_app.command()
def gold(results: ResultsArgument = Path("results"), json: JsonOption = False) -> None:
    """Gold against proxy along the checkpoints of each run, and the step where hacking begins."""
    tune()
    from rgbench.evaluate.results import load_results
    from rgbench.judge.trajectory import gold_curves

    rows = []
    for curve in gold_curves(load_results(results)):
        for step, ours, proxy in zip(curve.steps, curve.gold_values, curve.proxy_values, strict=True):
            mark = "hack step" if curve.hack and step == curve.hack.step else "gold peaks" if step == curve.peak else ""
            rows.append((curve.model, str(step), curve.proxy[0], f"{proxy:.3f}", curve.gold[0], f"{ours:.3f}", mark))
    _show(("run", "step", "trained reward", "value", "gold", "value", "mark"), rows, json)


@probes_app.command()
def best_of_n(
    model: Annotated[str, typer.Argument(help="The trained model, as in the results.")],
    base: Annotated[str, typer.Option(help="The model whose draws are counted; see repeat-prompts.")],
    reward: Annotated[str, typer.Option(help="A metric with per-image rows.")] = "hps_aa1",
    results: ResultsArgument = Path("results"),
    json: JsonOption = False,
) -> None:
    """How many draws of a base model are worth one of a trained model in its reward."""
    tune()
    from rgbench.evaluate.results import load_results
    from rgbench.judge.trajectory import best_of_n as run
    from rgbench.judge.trajectory import find_result

    loaded = load_results(results)
    ours, theirs = (find_result(loaded, name, reward) for name in (model, base))
    found = run(ours, theirs)
    ends = [f"> {found.num_samples}" if end is None else str(end) for end in (found.low, found.high)]
    kl = "—" if found.kl is None else f"{found.kl:.2f}"
    header = ("model", "base", "reward", "best of n", "95 %", "KL, nats", "prompts")
    row = (model, base, reward, str(found), f"[{ends[0]}, {ends[1]}]", kl, str(found.num_prompts))
    _show(header, [row], json)


@probes_app.command()
def pareto(
    results: ResultsArgument = Path("results"),
    reward: Annotated[str, typer.Option(help="A metric of which more is better.")] = "hps_aa1",
    distance: Annotated[str, typer.Option(help="A metric of which less is better.")] = "fd_efflite0",
    json: JsonOption = False,
) -> None:
    """Models and checkpoints that no other beats in reward and set distance."""
    tune()
    from rgbench.evaluate.results import load_results
    from rgbench.judge.trajectory import pareto_points

    rows = [
        (
            p.model,
            p.generation,
            str(p.step or ""),
            f"{p.reward:.3f}",
            f"{p.distance:.3f}",
            "front" * p.on_front,
        )
        for p in pareto_points(load_results(results), reward, distance)
    ]
    _show(("model", "generation", "step", reward, distance, "Pareto"), rows, json)


def _show(header: Sequence[str], rows: Iterable[Sequence[str]], as_json: bool) -> None:
    from rgbench.cli.show import print_table

    if not as_json:
        print_table(header, rows)
        return
    from json import dumps

    typer.echo(dumps([dict(zip(header, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))


def verdict(
    results: ResultsArgument = Path("results"),
    base: Annotated[
        str | None, typer.Option(help="LCD students of equal budget: mine for mine-s0, mine-s1 …; found by default.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Models to judge; by default those with a reward.")] = None,
    reward: Annotated[str | None, typer.Option(help="What --model was trained on, if elsewhere: hps_aa1.")] = None,
    json: JsonOption = False,
) -> None:
    """Say whether a model is over-optimised, against LCD students of equal budget; exit 1 where it cannot be said."""
    tune()
    from rgbench.core.progress import image_progress, track_images
    from rgbench.judge.verdict import give_verdicts

    with image_progress() as progress:
        found = give_verdicts(results, base, split_names(model), reward, track_images(progress))
    if json:
        from json import dumps

        typer.echo(dumps([each.model_dump(mode="json") for each in found], indent=2, ensure_ascii=False))
    else:
        for each in found:
            _show_verdict(each)
    if any(each.verdict == "none" for each in found):
        raise typer.Exit(1)


def _show_verdict(found: Verdict) -> None:
    from rgbench.cli.show import print_table

    figures = [(family.name, figure) for family in found.families for figure in family.figures]
    figures += [("trained reward", figure) for figure in found.rewards]
    header = ("family", "figure", "model", "LCD", "teacher", "change for the worse", "δ", "detectable", "")
    print_table(header, [change_row(name, figure) for name, figure in figures])
    if found.delta_seeds:
        typer.echo(f"LCD is {found.base}; δ is from {', '.join(found.delta_seeds)}.")
    typer.echo(found.words)


def change_row(family: str, change: FigureChange) -> Sequence[str]:
    """Cells of one figure of a verdict; of a trained reward, the gain and "up"."""
    metric = change.metric

    def shown(value: float | None) -> str:
        return "—" if value is None else f"{value:.{metric.decimals}f}"

    label = f"{metric.label}, {metric.unit}" if metric.unit else metric.label
    bounds = f" [{shown(change.low)}, {shown(change.high)}]" if change.low is not None else ""
    mark = ("up" if family == "trained reward" else "worse") if change.clear else ""
    values = (shown(change.model), shown(change.base), shown(change.teacher))
    limits = (shown(change.delta), shown(change.detectable))
    return family, label, *values, f"{shown(change.deterioration)}{bounds}", *limits, mark


def compare(
    results: ResultsArgument = Path("results"),
    base: Annotated[str, typer.Option(help="What the others are compared with, like lcd or lcd-s0.")] = "lcd",
    primary: Annotated[str | None, typer.Option(help="METHOD:METRIC named beforehand; compares methods.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare models image by image or, with --primary, methods over training seeds."""
    tune()
    from rgbench.core.progress import image_progress, track_images
    from rgbench.judge.compare import compare_methods, compare_models
    from rgbench.judge.verdict import models_of

    with image_progress() as progress:
        track = track_images(progress)
        models = models_of(results, track)
        contrasts = compare_models(models, base, track) if primary is None else []
    if primary is None:
        if not contrasts:
            raise UsageError(f"{results}: no model here can be compared with {base}: none of its world and settings")
        header = ("model", "base", "metric", "difference", "95 %", "wins", "95 % of wins", "detectable")
        twice = named_twice(contrasts)
        _show(header, [model_row(found, twice) for found in contrasts], json)
    else:
        method, _, metric = primary.partition(":")
        rows = [method_row(found) for found in compare_methods(models, base, (method, metric))]
        _show(("method", "base", "metric", "seeds", "difference", "95 %", "detectable", "p", ""), rows, json)


def named_twice(contrasts: Sequence[ModelContrast]) -> set[str]:
    """Models compared at several settings, and metrics compared under several protocols."""
    ids: dict[str, set[str]] = {}
    for each in contrasts:
        ids.setdefault(each.model, set()).add(each.result.generation.id)
        ids.setdefault(each.result.metric.name, set()).add(each.result.protocol.id)
    return {name for name, found in ids.items() if len(found) > 1}


def model_row(contrast: ModelContrast, twice: set[str]) -> Sequence[str]:
    """Cells of one comparison of two models; with the id of what its name alone does not tell."""
    found, images, digits = contrast.found, contrast.images, contrast.result.metric.decimals
    model, metric = contrast.model, contrast.result.metric.name
    model += f" ({contrast.result.generation.id})" * (model in twice)
    metric += f" ({contrast.result.protocol.id})" * (metric in twice)
    row = (model, contrast.base, metric)
    value = "—" if found is None else f"{found.value:.{digits}f}"
    ends = "—" if found is None or found.low is None else f"[{found.low:.{digits}f}, {found.high:.{digits}f}]"
    if images is None:
        return *row, value, ends, "—", "—", "—"
    wins = f"[{images.wins.interval.low:.0%}, {images.wins.interval.high:.0%}]"
    return *row, value, ends, f"{images.wins.rate:.0%}", wins, f"{images.detectable:.{digits}f}"


def method_row(contrast: MethodContrast) -> Sequence[str]:
    """Cells of one comparison of two methods."""
    digits = contrast.result.metric.decimals
    ends = f"[{contrast.low:.{digits}f}, {contrast.high:.{digits}f}]"
    p = "too few seeds" if contrast.p is None else f"{contrast.p:.3g}"
    values = (str(len(contrast.seeds)), f"{contrast.mean:.{digits}f}", ends, f"{contrast.detectable:.{digits}f}", p)
    row = (contrast.method, contrast.base, contrast.result.metric.name)
    return *row, *values, "primary" if contrast.primary else ""


def check(
    results: ResultsArgument = Path("results"),
    max_hf_db: Annotated[float | None, typer.Option(help="Most HFER gap to real images, or to --base, in dB.")] = None,
    max: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE that no model may exceed.")] = None,
    min: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE that every model must reach.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Models to check; all by default.")] = None,
    base: Annotated[str | None, typer.Option(help="Limit differences to this model, like teacher or lcd.")] = None,
    verdict: Annotated[bool, typer.Option(help="Also fail models found over-optimised, or not judged.")] = False,
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
