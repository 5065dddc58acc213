"""``rgbench report``: comparison tables, plots, image grids and one page, from results alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from rgbench.core.errors import RgbenchError, UsageError, suggest
from rgbench.core.io import write_bytes_atomic, write_text_atomic
from rgbench.core.progress import Track, untracked
from rgbench.core.registry import TABLES, resolve
from rgbench.judge.models import ResultSet, load_result_sets
from rgbench.judge.verdict import current_verdicts
from rgbench.report.formats import Section, latex, long_csv, markdown, section
from rgbench.report.grids import grid_png
from rgbench.report.page import page, without_pictures
from rgbench.report.plots import save

WRITERS: dict[str, Callable[[Sequence[Section], Track], str]] = {
    "md": lambda sections, _: markdown(sections),
    "tex": lambda sections, _: latex(sections),
    "csv": lambda sections, _: long_csv(sections),
    "html": page,
}
FORMATS = tuple(WRITERS)
PICTURE = re.compile(r"(?m)^!\[.*\]\(([^)]+)\)$")


@dataclass(frozen=True)
class Choice:
    """What a report shows.

    Attributes:
        models: names of models, without or with seed; what they are compared with comes along. All by default.
        metrics: names of metrics, or of their values, for tables and CSV. All by default.
        labels: names to show in place of a model's own.
        title: of the report.
        base: name of the model that all others are compared with; the LCD students of equal budget by default.
    """

    models: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    base: str | None = None

    def words(self) -> list[str]:
        """The options of ``rgbench report`` that make this choice."""
        given = [("--model", ",".join(self.models)), ("--metric", ",".join(self.metrics))]
        given += [("--label", f"{name}={text}") for name, text in self.labels.items()]
        given += [("--title", self.title), ("--base", self.base or "")]
        return [word for option, value in given if value for word in (option, value)]


ALL = Choice()


def report(
    results: Path, out: Path, formats: Sequence[str] = (), track: Track = untracked, choice: Choice = ALL,
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:  # fmt: skip
    """Writes the report of everything under `results` into `out`.

    ``report.md`` comes with its pictures (SVG and PNG) beside it; ``report.html`` holds its own. The same results give
    the same bytes of md, tex and csv.

    Args:
        results: folder of results, as `rgbench eval` writes them.
        out: made if it is not there; files of an earlier report are replaced.
        formats: of "md", "tex", "csv", "html"; empty means all.
        track: shows how far it is.
        choice: what to show.
        say: takes each model's answer.

    Returns:
        The files written, in the order of writing.

    Raises:
        UsageError: an unknown format, model or metric; no results; a result or image that cannot be read.
    """
    wanted = _wanted(formats)
    sections = _sections(results, track, choice)
    texts = {name: WRITERS[name](sections, track) for name in track(wanted, "writing", "formats")}
    out.mkdir(parents=True, exist_ok=True)  # not before all is read
    written = [out / f"report.{name}" for name in wanted]
    for path, text in zip(written, texts.values(), strict=True):
        write_text_atomic(path, text)
    for part in sections if "md" in wanted else ():
        written += _pictures(part, out, track)
    for reading in (reading for part in sections for reading in part.readings):
        say(f"{reading.title}: {reading.label}. {reading.answer}")
    return written


def check(
    results: Path, out: Path, formats: Sequence[str] = (), track: Track = untracked, choice: Choice = ALL
) -> list[Path]:
    """Compares a written report with what the results give now, byte for byte; writes nothing.

    Pictures depend on the versions of the libraries that draw them, so of the page their bytes are left out; those that
    ``report.md`` shows must be there.

    Args:
        results: folder of results.
        out: where the report lies.
        formats: as for :func:`report`.
        track: shows how far it is.
        choice: as for :func:`report`.

    Returns:
        The files compared, all of them equal.

    Raises:
        UsageError: as :func:`report`.
        RgbenchError: a file is missing or differs; names the first line of each that does.
    """
    wanted = _wanted(formats)
    sections = _sections(results, track, choice)
    files = [out / f"report.{name}" for name in wanted]
    tracked = track(files, "comparing", "formats")
    faults = [fault for file in tracked if (fault := _fault(file, WRITERS[file.suffix[1:]](sections, track)))]
    if "md" in wanted and not faults:
        pictures = PICTURE.findall((out / "report.md").read_text(encoding="utf-8"))
        faults = [
            f"{out / name}: missing, though report.md shows it" for name in pictures if not (out / name).is_file()
        ]
    if faults:
        command = shlex.join(["rgbench", "report", str(results), "--out", str(out), *choice.words()])
        raise RgbenchError("\n".join([*faults, f"make it again with: {command}"]))
    return files


def _wanted(formats: Sequence[str]) -> list[str]:
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"--format: unknown format {name!r}; {suggest(name, FORMATS)}")
    return [name for name in FORMATS if not formats or name in formats]


def _sections(results: Path, track: Track, choice: Choice) -> list[Section]:
    sets = load_result_sets(results, track)
    _check_names(results, sets, choice)
    chosen = [_chosen(found, choice) for found in sets]
    chosen = [found for found in chosen if found.models]
    metrics = tuple(name for metric in choice.metrics for name in _values_of(metric))
    return [
        section(found, current_verdicts(results, found), metrics, choice.title)
        for found in track(chosen, "tables and grids", "worlds")
    ]


def _chosen(found: ResultSet, choice: Choice) -> ResultSet:
    base = choice.base if choice.base and found.has(choice.base) else None
    found = replace(found, base=base, labels=choice.labels)
    return found.only(choice.models) if choice.models else found


def _values_of(metric: str) -> list[str]:
    """Names of a metric's values: ``recall`` and others of ``prdc``; a value's own name is itself."""
    table = next((table for table in ("metric", "probe") if metric in TABLES[table]), None)
    infos = resolve(table, metric).infos if table else ()
    return [metric, *(info.name for info in infos)]


def _check_names(root: Path, sets: Sequence[ResultSet], choice: Choice) -> None:
    known = {name for found in sets for model in found.models for name in (model.name, *model.names)}
    named = {"--model": choice.models, "--label": tuple(choice.labels), "--base": (choice.base,) if choice.base else ()}
    for option, names in named.items():
        for name in names:
            if name not in known:
                raise UsageError(f"{option}: no finished model {name!r} in {root}; {suggest(name, known)}")
    measured = {column.metric for found in sets for column in found.columns}
    for metric in choice.metrics:
        if not measured & set(_values_of(metric)):
            raise UsageError(f"--metric: {metric!r} was not measured; {suggest(metric, measured)}")


def _pictures(part: Section, out: Path, track: Track) -> list[Path]:
    files: dict[str, bytes] = {}
    world = part.results.world
    for plot, figure in track(list(part.plots.items()), f"{world}: plots", "plots"):
        for kind in ("svg", "png"):
            files[part.file_name(plot.stem, kind)] = save(figure, kind)
    for grid in track(part.grids, f"{world}: grids", "grids"):
        files[part.file_name(grid.key, "png")] = grid_png(grid, world)
    for name, data in files.items():
        write_bytes_atomic(out / name, data)
    return [out / name for name in files]


def _fault(file: Path, wanted: str) -> str:
    """How a file differs from what it should be, or nothing."""
    try:
        found = file.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    if file.suffix == ".html":
        found, wanted = without_pictures(found), without_pictures(wanted)
    if found == wanted:
        return ""
    lines = zip_longest(found.splitlines(keepends=True), wanted.splitlines(keepends=True))
    number, (ours, theirs) = next((i, pair) for i, pair in enumerate(lines, start=1) if pair[0] != pair[1])
    return f"{file}:{number}: has {_excerpt(ours, theirs)} where the results give {_excerpt(theirs, ours)}"


def _excerpt(line: str | None, other: str | None) -> str:
    """What of a line begins to differ from another one, in a few words."""
    if line is None:
        return "nothing"
    start = next((i for i, (a, b) in enumerate(zip(line, other or "", strict=False)) if a != b), 0)
    return repr(line[max(0, start - 20) : start + 40])
