"""``rgbench report``: comparison tables, plots, image grid and page, from result files alone."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from rgbench.errors import UsageError
from rgbench.files import write_bytes_atomic, write_text_atomic
from rgbench.reporting import plots
from rgbench.reporting.document import markdown_document
from rgbench.reporting.gather import gather
from rgbench.reporting.grids import grid_png
from rgbench.reporting.latex import latex_document
from rgbench.reporting.page import page
from rgbench.reporting.sections import Section, section
from rgbench.reporting.spreadsheet import long_csv

FORMATS = ("md", "tex", "csv", "html")


def report(results: Path, out: Path, formats: list[str]) -> list[Path]:
    """Writes the report of everything under `results` into `out`.

    ``report.md`` comes with its pictures (SVG and PNG) beside it; ``report.html`` holds
    its own. The same results give the same bytes of md, tex and csv.

    Args:
        results: folder of result files, as `rgbench eval` writes them.
        out: made if it is not there; files of an earlier report are replaced.
        formats: of "md", "tex", "csv", "html"; empty means all.

    Returns:
        The files written, in the order of writing.

    Raises:
        UsageError: an unknown format; no results; a result file or kept image that cannot be read.
    """
    wanted = _formats(formats)
    sections = [section(comparison, results) for comparison in gather(results)]
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "md": ("report.md", lambda: markdown_document(sections)),
        "tex": ("report.tex", lambda: latex_document(sections)),
        "csv": ("report.csv", lambda: long_csv([part.comparison for part in sections])),
        "html": ("report.html", lambda: page(sections)),
    }
    written = []
    for name in wanted:
        file, make = texts[name]
        write_text_atomic(out / file, make())
        written.append(out / file)
    if "md" in wanted:
        for part in sections:
            written += _pictures(part, out)
    return written


def _formats(formats: list[str]) -> list[str]:
    for name in formats:
        if name not in FORMATS:
            close = get_close_matches(name, FORMATS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(FORMATS)}"
            raise UsageError(f"--format: unknown format {name!r}; {hint}")
    return [name for name in FORMATS if not formats or name in formats]


def _pictures(part: Section, out: Path) -> list[Path]:
    files: dict[str, bytes] = {}
    for plot in part.plots:
        canvas = plot.draw(part.comparison, plots.LIGHT)
        files[part.plot_name(plot, "svg")] = plots.svg(canvas)
        files[part.plot_name(plot, "png")] = plots.png(canvas)
    if part.grid is not None:
        files[part.grid_name] = grid_png(part.grid)
    for name, data in files.items():
        write_bytes_atomic(out / name, data)
    return [out / name for name in files]
