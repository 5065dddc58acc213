"""The README's table and pictures, from the committed report, and ``docs/metrics.md``: ``python -m tools.readme``."""

from __future__ import annotations

import re
from pathlib import Path

from rgbench.core.errors import UsageError
from rgbench.core.io import write_text_atomic
from rgbench.judge.verdict import GOLD, QUESTIONS, REWARD, Outcome
from rgbench.metrics.values import Family, shipped_infos
from rgbench.report.tables import ARROWS
from rgbench.report.words import answer_words

REPORT = Path("results/report/report.md")
README = Path("README.md")
METRICS = Path("docs/metrics.md")
BLOCK = re.compile(r"(<!-- results: begin [^\n]*-->\n).*?(<!-- results: end -->)", re.DOTALL)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
SHOWN_PICTURES = (r"grid-[^-]+\.png", r"rewards-")
VERDICTS = re.compile(r"(?m)^\*\*Verdicts, [^\n]*\*\*\n\n((?:\|[^\n]*\n)+)")
PRICES = {question.name.capitalize() for question in QUESTIONS if question not in (REWARD, GOLD)}
COLUMNS = ("Model", "Runs", "Trained reward", "Gold", "Set distance", "Verdict")


def shown_results(report: str, folder: Path) -> str:
    """Verdicts in a table and in words, and two pictures, with picture paths relative to the README.

    Args:
        report: text of ``report.md``.
        folder: of the report, relative to the README.

    Raises:
        UsageError: a report without verdicts.
    """
    found = VERDICTS.search(report)
    if found is None:
        raise UsageError(f"{folder / 'report.md'}: no verdicts to show; make it with `rgbench report`")
    header, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in found[1].splitlines()]
    places = [header.index(name) for name in COLUMNS]
    table = [COLUMNS, ["---"] * len(COLUMNS), *([row[place] for place in places] for row in rows)]
    shown = ["\n".join(f"| {' | '.join(row)} |" for row in table)]
    sentences = []
    for row in rows:
        worse = [name for name, cell in zip(header, row, strict=True) if name in PRICES and cell.startswith("▼")]
        sentences.append(f"- **{row[0]}**: {answer_words(Outcome(row[header.index('Verdict')]), worse)}.")
    shown += ["\n".join(sentences)]
    pictures = PICTURE.findall(report)
    for wanted in SHOWN_PICTURES:
        shown += [f"![{title}]({folder.as_posix()}/{file})" for title, file in pictures if re.match(wanted, file)]
    return "\n\n".join(shown)


def with_results(readme: str, results: str) -> str:
    """Replace the README's results block.

    Raises:
        UsageError: a README without the block's markers.
    """
    if not BLOCK.search(readme):
        raise UsageError(f"{README}: the markers of the results block are gone")
    return BLOCK.sub(lambda m: f"{m[1]}\n{results}\n\n{m[2]}", readme)


def glossary() -> str:
    """Text of ``docs/metrics.md``: every value that a metric or a probe gives, by family."""
    parts = [
        "# Metrics",
        "Made from the metrics' classes by `python -m tools.readme`; `rgbench ls metrics` and `rgbench ls probes` list "
        "the same, with installed plug-ins. ↑ higher, ↓ lower, →0 nearest to the real images is better.",
    ]
    for family in Family:
        infos = [info for info in shipped_infos().values() if info.family is family]
        rows = [
            f"| `{info.name}` | {info.label} | {info.unit} {ARROWS[info.direction]} | {info.about} |" for info in infos
        ]
        parts += [
            f"## {family.value.capitalize()}",
            "\n".join(["| name | label | unit | |", "|---|---|---|---|", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    write_text_atomic(METRICS, glossary())
    results = shown_results(REPORT.read_text(encoding="utf-8"), REPORT.parent)
    write_text_atomic(README, with_results(README.read_text(encoding="utf-8"), results))


if __name__ == "__main__":
    main()
