"""The README shows what the committed report says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.report.report import check
from tools.readme import README, REPORT, shown_results, with_results

ROOT = Path(__file__).parents[2]


def test_readme_holds_the_committed_reports_tables_and_pictures():
    readme, report = ((ROOT / p).read_text(encoding="utf-8") for p in (README, REPORT))
    assert readme == with_results(readme, shown_results(report, REPORT.parent))


def test_pictures_of_the_block_are_there():
    shown = shown_results((ROOT / REPORT).read_text(encoding="utf-8"), REPORT.parent)
    paths = [line.split("](")[1].rstrip(")") for line in shown.splitlines() if line.startswith("![")]
    assert paths and all((ROOT / path).is_file() for path in paths)


def test_the_first_tables_and_some_pictures_are_shown():
    report = (
        "### In words\n\nA.\n\n### Tables\n\n**Verdicts, x**\n\n| v |\n\n**Comparison, x**\n\n| c |\n\n"
        "**Difference to LCD, x**\n\n| d |\n\n### Plots and images\n\n![r](rewards-x.png)\n![w](wins-x.png)\n"
    )
    shown = shown_results(report, Path("results/report"))
    assert shown == "**Verdicts, x**\n\n| v |\n\n**Comparison, x**\n\n| c |\n\n![r](results/report/rewards-x.png)"


def test_missing_block_or_report_is_an_error():
    with pytest.raises(UsageError, match="markers"):
        with_results("# no block", "x")
    with pytest.raises(UsageError, match="no results"):
        shown_results("# empty", Path("results/report"))


def test_the_committed_report_is_what_the_committed_results_give():
    compared = check(ROOT / "results", ROOT / "results" / "report", [])
    assert [file.suffix for file in compared] == [".md", ".tex", ".csv", ".html"]
