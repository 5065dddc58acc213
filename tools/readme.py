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
VERDICTS = re.compile(r"(?ms)^\*\*Verdicts, .*?(?=^\*\*)")  # a row for each run; the words sum them up
SHOWN = re.compile(r"(?ms)^### In words\n.*?(?=^### Protocols\n)")


def shown_results(report: str, folder: Path) -> str:
    """Words, comparison and pictures of the report, with picture paths relative to the README.

    Args:
        report: text of ``report.md``.
        folder: of the report, relative to the README.

    Raises:
        UsageError: a report without results.
    """
    found = SHOWN.search(report)
    if found is None:
        raise UsageError(f"{folder / 'report.md'}: no results to show; make it with `rgbench report`")
    first, *_ = re.split(r"(?m)^\*\*Difference", VERDICTS.sub("", found[0]))
    shown = [(title, file) for title, file in PICTURE.findall(found[0]) if SHOWN_PICTURE.match(file)]
    pictures = [f"![{title}]({folder.as_posix()}/{file})" for title, file in shown]
    return "\n\n".join([first.strip(), *pictures])


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
