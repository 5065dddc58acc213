"""The README's tables and pictures, copied from the committed report: ``python -m tools.readme``."""

from __future__ import annotations

import re
from pathlib import Path

from rgbench.core.errors import UsageError
from rgbench.core.io import write_text_atomic

REPORT = Path("results/report/report.md")
README = Path("README.md")
BLOCK = re.compile(r"(<!-- results: begin [^\n]*-->\n).*?(<!-- results: end -->)", re.DOTALL)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
SHOWN_PICTURE = re.compile(r"(spectra|rewards|training)-|grid-[^-]+\.png")
TABLES = re.compile(r"(?ms)^### Tables\n\n(.*?)(?=^\*\*Difference |^### )")  # verdicts and comparison


def shown_results(report: str, folder: Path) -> str:
    """Verdicts, comparison and pictures of the report, with picture paths relative to the README.

    Args:
        report: text of ``report.md``.
        folder: of the report, relative to the README.

    Raises:
        UsageError: a report without results.
    """
    tables = TABLES.search(report)
    if tables is None:
        raise UsageError(f"{folder / 'report.md'}: no results to show; make it with `rgbench report`")
    shown = [(title, file) for title, file in PICTURE.findall(report) if SHOWN_PICTURE.match(file)]
    return "\n\n".join([tables[1].strip(), *(f"![{title}]({folder.as_posix()}/{file})" for title, file in shown)])


def with_results(readme: str, results: str) -> str:
    """Replace the README's results block.

    Raises:
        UsageError: a README without the block's markers.
    """
    if not BLOCK.search(readme):
        raise UsageError(f"{README}: the markers of the results block are gone")
    return BLOCK.sub(lambda m: f"{m[1]}\n{results}\n\n{m[2]}", readme)


def main() -> None:
    results = shown_results(REPORT.read_text(encoding="utf-8"), REPORT.parent)
    write_text_atomic(README, with_results(README.read_text(encoding="utf-8"), results))


if __name__ == "__main__":
    main()
