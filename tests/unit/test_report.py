"""The whole report: its files, their bytes, and what happens with little, much or nothing to report."""

import csv
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from rgbench.errors import UsageError
from rgbench.evaluation.results import load_results
from rgbench.reporting.api import report
from tests.history.plausible import write_model

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"
PDFLATEX = shutil.which("pdflatex")


@pytest.mark.parametrize("name", ["md", "tex", "csv"])
def test_snapshot(tmp_path, snapshot, name):
    path = report(HISTORY, tmp_path, [name])[0]
    assert path.read_text(encoding="utf-8") == snapshot


def test_all_formats_by_default_and_the_same_bytes_again(tmp_path):
    files = report(HISTORY, tmp_path / "one", [])
    names = sorted(file.name for file in files)
    pictures = [f"{stem}-benchtop.{kind}" for stem in ("rewards", "spectra") for kind in ("png", "svg")]
    assert names == sorted(["report.md", "report.tex", "report.csv", "report.html", *pictures])
    again = report(HISTORY, tmp_path / "two", ["csv", "html", "md", "tex"])
    for one, two in zip(files, again, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_markdown_names_the_pictures_that_it_wrote(tmp_path):
    shutil.copytree(HISTORY, tmp_path / "results")
    write_model(tmp_path / "results", "external", None, metrics=("hps_aa1",), num=4, images=1)
    files = report(tmp_path / "results", tmp_path / "out", ["md"])
    text = files[0].read_text()
    assert {f.name for f in files if f.suffix == ".png"} == {
        "rewards-benchtop.png",
        "spectra-benchtop.png",
        "grid-benchtop.png",
    }
    assert all(f"]({f.name})" in text for f in files if f.suffix == ".png")


def test_csv_holds_every_figure_unrounded(tmp_path):
    lines = list(csv.DictReader(report(HISTORY, tmp_path, ["csv"])[0].read_text(encoding="utf-8").splitlines()))
    figures = {(line["model"], line["protocol"]): line for line in lines if line["kind"] == "figure"}
    assert len(figures) == 4 * 5, "four rows of five columns, the missing ones too"
    for result in load_results(HISTORY):
        line = figures[(result.model, result.protocol.id)]
        if result.value is None:
            assert (line["shown"], line["value"]) == ("—", "")
        else:
            assert float(line["value"]) == result.value and line["files"].endswith(result.path.name)
            assert line["commands"] == result.command
    assert {line["kind"] for line in lines} == {"figure", "delta_lcd", "delta_teacher", "cost"}
    assert {line["world"] for line in lines} == {"benchtop"}


def test_unknown_format_is_a_usage_error_and_writes_nothing(tmp_path):
    with pytest.raises(UsageError, match="'html'"):
        report(HISTORY, tmp_path / "out", ["htlm"])
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_says_what_to_run(tmp_path):
    with pytest.raises(UsageError, match="rgbench eval"):
        report(tmp_path, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_the_report_may_lie_inside_the_results(tmp_path):
    shutil.copytree(HISTORY, tmp_path / "results")
    one, two = (report(tmp_path / "results", tmp_path / "results" / "report", ["md"])[0].read_text() for _ in range(2))
    assert one == two


def test_fifty_models_take_seconds_of_cpu(tmp_path):
    for i in range(50):
        method = ("lcd", "rg_lcd", "lrm")[i % 3]
        write_model(tmp_path, method, 0, model=f"{method}-{i}-s0", num=4)
    start = time.process_time()
    texts = report(tmp_path, tmp_path / "out", ["md", "tex", "csv"])
    assert time.process_time() - start < 20
    assert texts[0].read_text().count("| LRM |") >= 16


@pytest.mark.skipif(PDFLATEX is None, reason="no pdflatex here; `apt-get install texlive-latex-recommended` to compile")
def test_latex_compiles_alone(tmp_path):
    shutil.copytree(HISTORY, tmp_path / "results")
    write_model(tmp_path / "results", "lrm", 0, model="a_b%c&d$e#f{g}~^\\h<é🙂>-s0", metrics=("hps_aa1",), num=4)
    for i in range(30):
        write_model(tmp_path / "results", "external", None, model=f"model-{i}", num=4, rows=False)
    tex = report(tmp_path / "results", tmp_path / "out", ["tex"])[0]
    command = [PDFLATEX, "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={tmp_path}", str(tex)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=240)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    assert "Overfull" not in done.stdout and "Float too large" not in done.stdout
