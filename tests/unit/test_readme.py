"""The README shows what the committed report says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.judge.verdict import Outcome
from rgbench.report.report import Choice, check
from rgbench.report.words import ANSWERS, answer_words
from tools.readme import METRICS, README, REPORT, glossary, shown_results, with_results

ROOT = Path(__file__).parents[2]


def test_readme_holds_the_committed_reports_tables_and_pictures():
    readme, report = ((ROOT / p).read_text(encoding="utf-8") for p in (README, REPORT))
    assert readme == with_results(readme, shown_results(report, REPORT.parent))


def test_the_committed_page_is_small():
    assert (ROOT / REPORT).with_suffix(".html").stat().st_size < 4e6


def test_pictures_of_the_block_are_there():
    shown = shown_results((ROOT / REPORT).read_text(encoding="utf-8"), REPORT.parent)
    paths = [line.split("](")[1].rstrip(")") for line in shown.splitlines() if line.startswith("![")]
    assert paths and all((ROOT / path).is_file() for path in paths)


def test_verdicts_are_shown_with_an_answer_each():
    report = (
        "### Tables\n\n**Verdicts, x**\n\n"
        "| Model | Runs | Verdict | Compared with | Trained reward | Gold | Set distance | Recall |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| RG-LCD | a, 6 seeds | over-optimised | lcd | ▲ +1 | ▼ −2 | = 0 | ▼ −1 |\n\n- note\n\n"
        "### Plots and images\n\n![r](rewards-x.png)\n![w](wins-x.png)\n![g](grid-x.png)\n![d](grid-difference-x.png)\n"
    )
    assert shown_results(report, Path("results/report")) == (
        "| Model | Runs | Trained reward | Gold | Set distance | Verdict |\n| --- | --- | --- | --- | --- | --- |\n"
        "| RG-LCD | a, 6 seeds | ▲ +1 | ▼ −2 | = 0 | over-optimised |\n\n"
        f"- **RG-LCD**: {answer_words(Outcome.OVER_OPTIMISED, [])}.\n\n"
        "![g](results/report/grid-x.png)\n\n![r](results/report/rewards-x.png)"
    )
    assert set(ANSWERS) == set(Outcome)
    paid = report.replace("over-optimised", "paid for").replace("▼ −2", "▲ +2")
    assert "at the cost of recall." in shown_results(paid, Path("results/report"))


def test_the_readme_is_read_in_two_minutes():
    readme = (ROOT / README).read_text(encoding="utf-8")
    words = re.sub(r"```.*?```|!\[.*?\]\(.*?\)|\(.*?\)|<!--.*?-->", "", readme, flags=re.DOTALL).split()
    block = re.search("results: begin.*results: end", readme, re.DOTALL)
    assert len(words) < 600 and len(re.findall(r"[A-Za-z]+", block[0])) < 250


def test_missing_block_or_report_is_an_error():
    with pytest.raises(UsageError, match="markers"):
        with_results("# no block", "x")
    with pytest.raises(UsageError, match="no verdicts"):
        shown_results("# empty", Path("results/report"))


def test_the_committed_report_is_what_the_committed_results_give():
    models = re.search(r"rgbench report results .*--model (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert models is not None
    choice = Choice(models=tuple(models[1].split(",")))
    compared = check(ROOT / "results", ROOT / "results" / "report", [], choice=choice)
    assert [file.suffix for file in compared] == [".md", ".tex", ".csv", ".html"]


def test_the_page_of_metrics_is_made_from_their_classes():
    assert (ROOT / METRICS).read_text(encoding="utf-8") == glossary()
