"""``rgbench arena``: people compare images of models."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgbench.cli.options import Device, DeviceOption, ResultsOption, print_paths, ready, tune
from rgbench.core.errors import UsageError

if TYPE_CHECKING:
    from rgbench.arena.contest import Contest, Sources

LOCAL = ("127.0.0.1", "localhost", "::1")


class RaterKind(StrEnum):
    """Who votes where no person does."""

    simulated = "simulated"


def arena(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Models in RESULTS, folders of results, or folders of images."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the arena: votes and report.")] = Path("arena"),
    prompts: Annotated[
        str | None, typer.Option(help="Prompts of folders of images without a table: a file, or benchtop.")
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Take the first prompts alone.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of comparisons.")] = 0,
    results: ResultsOption = Path("results"),
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for the whole network.")] = LOCAL[0],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    export: Annotated[
        list[Path] | None, typer.Option(help="Write a page for one rater, named by the file: anna.html.")
    ] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="Add the answers that an exported page downloaded.")] = None,
    rater: Annotated[RaterKind | None, typer.Option(help="Let simulated annotators vote (benchtop).")] = None,
    raters: Annotated[int, typer.Option(min=1, help="Number of simulated raters.")] = 3,
    report: Annotated[bool, typer.Option("--report", help="Report the votes, and add them to the results.")] = False,
    device: DeviceOption = Device.auto,
) -> None:
    """Let people compare models blindly, image by image; report what they prefer."""
    asked = {"--export": export, "--merge": merge, "--rater": rater, "--report": report}
    given = [option for option, value in asked.items() if value]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]}: one at a time")
    if report:
        if models:
            raise UsageError("--report reads the arena in --out; leave the models out")
        _report(out)
        return
    if not given:
        _require_server()
    sources = _sources(models, prompts, num, results)
    where = ready(device) if rater else ""
    tune()
    from rgbench.arena.contest import open_contest

    with open_contest(out, sources, seed) as contest:
        if export:
            _export(contest, export)
        elif merge:
            _merge(contest, merge)
        elif rater:
            from rgbench.arena.simulated import vote_simulated

            print_paths(each.path for each in vote_simulated(contest, raters, where))
        else:
            _serve(contest, host, port, out)


def _require_server() -> None:
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"rgbench arena needs {' and '.join(missing)}: pip install 'rgbench[arena]'; or write pages with --export"
        )


def _sources(models: list[str] | None, prompts: str | None, num: int | None, results: Path) -> Sources | None:
    from rgbench.arena.contest import Sources

    if models:
        return Sources(models=tuple(models), prompts=prompts, num=num, results=str(results))
    if prompts is not None or num is not None:
        raise UsageError(
            f"--{'prompts' if prompts is not None else 'num'}: belongs to MODEL arguments; name the models"
        )
    return None


def _serve(contest: Contest, host: str, port: int, out: Path) -> None:
    from rgbench.arena.server import serve

    def say(link: str) -> None:
        typer.echo(f"Send this link to raters: {link}")
        if host not in LOCAL:
            typer.echo("Everybody who reaches this machine and has the link can vote; it is not encrypted.", err=True)
        typer.echo("Ctrl-C stops; the same command continues.", err=True)

    with suppress(KeyboardInterrupt):  # how a server is stopped
        serve(contest, host, port, say)
    everybody = contest.votes.raters.values()
    votes = sum(len(rater.votes) for rater in everybody)
    command = shlex.join(["rgbench", "arena", "--report", "--out", str(out)])
    typer.echo(f"{votes} votes of {len(everybody)} raters are stored; report them with: {command}", err=True)


def _export(contest: Contest, files: list[Path]) -> None:
    from rgbench.arena.page import export_page
    from rgbench.arena.votes import MAX_NAME
    from rgbench.core.io import file_stem, write_text_atomic
    from rgbench.data.files import clean_text

    for file in files:
        if file.suffix != ".html" or len(file.stem) > MAX_NAME or clean_text(file.stem, str(file)) != file.stem:
            raise UsageError(f"--export {file}: name it after its rater, such as anna.html")
    for file in files:
        known = contest.votes.raters.get(file_stem(file.stem))
        write_text_atomic(file, export_page(contest, known or contest.votes.join(file.stem)))
    print_paths(files)


def _merge(contest: Contest, files: list[Path]) -> None:
    for file in files:
        found = contest.merge(file)
        refused = f", {found.refused} refused (forged, damaged, or answered otherwise before)" if found.refused else ""
        typer.echo(f"{found.rater}: {found.new} new votes, {found.known} known{refused}")


def _report(out: Path) -> None:
    tune()
    os.environ["MPLBACKEND"] = "agg"
    from rgbench.arena.report import standing_rows, write_report
    from rgbench.arena.summary import store, summarise
    from rgbench.cli.show import print_table

    summary = summarise(out)
    print_table(("question", "model", "preferred, %", "strength", "votes", "ties"), standing_rows(summary))
    for each in summary.raters:
        if each.why_not:
            typer.echo(f"{each.rater.name}: left out: {each.why_not}", err=True)
    file = write_report(summary, out)
    folders = store(summary, shlex.join(["rgbench", "arena", "--report", "--out", str(out)]))
    typer.echo(f"Report: {file}", err=True)
    typer.echo(f"Results with people's preferences: {len(folders)}; show them with: rgbench report", err=True)
