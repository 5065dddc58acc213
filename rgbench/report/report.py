"""``rgbench report``: comparison tables, plots, image grids and one page, from results alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import write_bytes_atomic, write_text_atomic
from rgbench.core.progress import Track, untracked
from rgbench.judge.models import load_result_sets
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


def report(results: Path, out: Path, formats: Sequence[str] = (), track: Track = untracked) -> list[Path]:
    """Writes the report of everything under `results` into `out`.

    ``report.md`` comes with its pictures (SVG and PNG) beside it; ``report.html`` holds its own. The same results give
    the same bytes of md, tex and csv.

    Args:
        results: folder of results, as `rgbench eval` writes them.
        out: made if it is not there; files of an earlier report are replaced.
        formats: of "md", "tex", "csv", "html"; empty means all.
        track: shows how far it is.

    Returns:
        The files written, in the order of writing.

    Raises:
        UsageError: an unknown format; no results; a result or image that cannot be read.
    """
    wanted = _wanted(formats)
    sections = _sections(results, track)
    texts = {name: WRITERS[name](sections, track) for name in track(wanted, "writing", "formats")}
    out.mkdir(parents=True, exist_ok=True)  # not before all is read
    written = [out / f"report.{name}" for name in wanted]
    for path, text in zip(written, texts.values(), strict=True):
        write_text_atomic(path, text)
    for part in sections if "md" in wanted else ():
        written += _pictures(part, out, track)
    return written


def check(results: Path, out: Path, formats: Sequence[str] = (), track: Track = untracked) -> list[Path]:
    """Compares a written report with what the results give now, byte for byte; writes nothing.

    Pictures depend on the versions of the libraries that draw them, so of the page their bytes are left out; those that
    ``report.md`` shows must be there.

    Args:
        results: folder of results.
        out: where the report lies.
        formats: as for :func:`report`.
        track: shows how far it is.

    Returns:
        The files compared, all of them equal.

    Raises:
        UsageError: as :func:`report`.
        RgbenchError: a file is missing or differs; names the first line of each that does.
    """
    wanted = _wanted(formats)
    sections = _sections(results, track)
    files = [out / f"report.{name}" for name in wanted]
    tracked = track(files, "comparing", "formats")
    faults = [fault for file in tracked if (fault := _fault(file, WRITERS[file.suffix[1:]](sections, track)))]
    if "md" in wanted and not faults:
        pictures = PICTURE.findall((out / "report.md").read_text(encoding="utf-8"))
        faults = [
            f"{out / name}: missing, though report.md shows it" for name in pictures if not (out / name).is_file()
        ]
    if faults:
        command = shlex.join(["rgbench", "report", str(results), "--out", str(out)])
        raise RgbenchError("\n".join([*faults, f"make it again with: {command}"]))
    return files


def _wanted(formats: Sequence[str]) -> list[str]:
    for name in formats:
        if name not in FORMATS:
            close = get_close_matches(name, FORMATS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(FORMATS)}"
            raise UsageError(f"--format: unknown format {name!r}; {hint}")
    return [name for name in FORMATS if not formats or name in formats]


def _sections(results: Path, track: Track) -> list[Section]:
    sets = load_result_sets(results, track)
    return [section(found, current_verdicts(results, found)) for found in track(sets, "tables and grids", "worlds")]


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
