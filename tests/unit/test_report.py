"""The whole report: its files, their bytes, and what happens with little, much or nothing to report."""

import csv
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.evaluate.results import load_results
from rgbench.report.report import FORMATS, Choice, check, report
from tests.conftest import needs
from tests.history.plausible import write_model
from tests.results_maker import make_result

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"


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
    write_model(tmp_path / "results", "external", None, metrics=("hps",), num=4, images=1)
    files = report(tmp_path / "results", tmp_path / "out", ["md"])
    text = files[0].read_text()
    assert {f.name for f in files if f.suffix == ".png"} == {
        *("rewards-benchtop.png", "spectra-benchtop.png", "distributions-benchtop.png", "grid-benchtop.png"),
        *("grid-difference-benchtop.png", "grid-spectrum-benchtop.png", "worst-hps-benchtop.png"),
    }
    assert all(f"]({f.name})" in text for f in files if f.suffix == ".png")


def lines_of(root: Path, out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(report(root, out, ["csv"])[0].read_text(encoding="utf-8").splitlines()))


def test_csv_holds_every_value_unrounded(tmp_path):
    lines = lines_of(HISTORY, tmp_path)
    values = {(line["runs"], line["protocol"]): line for line in lines if line["kind"] == "value"}
    assert len(values) == 4 * 5, "four models of five columns, the missing ones too"
    for result in load_results(HISTORY):
        for value in result.values:
            line = values[result.head.model, value.protocol.id]
            if value.value is None:
                assert (line["shown"], line["value"]) == ("—", "")
            else:
                assert float(line["value"]) == value.value
                assert line["sources"] == f"benchtop/{result.head.model}/{result.head.generation.id}"
                assert line["commands"] == result.runs[result.run_of[value.key]].command
    assert {line["kind"] for line in lines} == {"value", "delta_lcd", "delta_teacher", "cost"}
    assert {line["step"] for line in lines} == {""}
    assert {line["world"] for line in lines} == {"benchtop"}


@pytest.mark.parametrize("name", ["=SUM(A1)", "+1+1", "-2+3", "@SUM(A1)"])
def test_no_text_of_the_csv_is_a_formula_and_numbers_stay_numbers(tmp_path, name):
    write_model(tmp_path, "external", None, model=name, metrics=("hfer_db",))
    for method in ("lcd", "rg_lcd"):
        write_model(tmp_path, method, 0, metrics=("hfer_db",))
    lines = lines_of(tmp_path, tmp_path / "out")
    assert {line["model"] for line in lines} == {f"'{name}", "LCD", "RG-LCD"}
    shown = [line["shown"] for line in lines if line["metric"] == "hfer_db"]
    assert any(text.startswith("−4.0") for text in shown) and any(text.startswith("+6.") for text in shown)
    assert all(line["value"] == "" or float(line["value"]) is not None for line in lines)
    cells = [cell for line in lines for cell in line.values()]
    assert all(re.match(r"[-+][\d.]+( ±| \[|$)", cell) for cell in cells if cell[:1] in ("=", "+", "-", "@"))


def test_gpu_time_memory_and_the_kl_of_choosing_are_columns_where_a_run_has_them(tmp_path):
    cost = {"train_gpu_sec": 880.4, "peak_gpu_gib": 21.125, "selection_kl": 1.2044}
    write_model(tmp_path, "lcd", 0, metrics=("hps",), cost=cost)
    text = report(tmp_path, tmp_path / "out", ["md"])[0].read_text()
    assert "Training GPU time (GPU s)" in text and "| 880 |" in text and "| 21.12 |" in text
    assert "KL of choosing the best of n, at most (nats)" in text and "| 1.20 |" in text


def test_a_report_of_some_models_and_metrics_under_other_names(cli, tmp_path):
    options = ("--model", "lrm", "--metric", "oracle,hps", "--label", "lrm=Proxy & co", "--title", "One <student>")
    done = cli("report", HISTORY, "--out", tmp_path, "--format", "md,csv,html", *options)
    assert done.returncode == 0 and "Proxy & co against LCD: " in done.stderr and "report.md" in done.stdout
    lines = list(csv.DictReader((tmp_path / "report.csv").read_text(encoding="utf-8").splitlines()))
    assert {line["model"] for line in lines} == {"LCD", "Proxy & co"}, "what it is compared with comes along"
    assert {line["metric"] for line in lines if line["kind"] == "value"} == {"hps", "oracle_all"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "# One &lt;student&gt;" in text and "Proxy &amp; co" in text
    assert "| HPS ↑" in text and "FD-EffLite0, n = 2048 ↓" not in text
    assert "<h1>One &lt;student&gt;</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cli("report", HISTORY, "--out", tmp_path, "--format", "md", "--check", *options).returncode == 0
    assert cli("report", HISTORY, "--out", tmp_path, "--format", "md", "--check").returncode == 1


def test_a_report_against_the_teacher(tmp_path):
    text = report(HISTORY, tmp_path, ["md"], choice=Choice(base="teacher"))[0].read_text(encoding="utf-8")
    assert "**RG-LCD against Teacher" in text and "**LRM against Teacher" in text


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--model", "lmr", "'lrm'"), ("--label", "lcdd=x", "'lcd'"), ("--label", "lcd", "NAME=TEXT"),
     ("--base", "teachr", "'teacher'"), ("--metric", "oracel_all", "'oracle_all'")],
)  # fmt: skip
def test_an_unknown_choice_names_the_nearest(cli, tmp_path, option, value, said):
    done = cli("report", HISTORY, "--out", tmp_path / "out", option, value)
    assert done.returncode == 2 and option in done.stderr and said in done.stderr
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(("reference", "flags"), [(None, ()), ({"lossy": True}, ("real images were lossy",))])
def test_without_good_real_images_no_model_is_called_nearer_to_real(tmp_path, reference, flags):
    """A full-size model without real images of its size, or a student 2 dB nearer to JPEG photographs."""
    for name, value in (("lcd-s0", 3.0), ("rg_lcd-s0", 1.0)):
        power = [10 ** (value / 10)] * 3
        extra = {"radius": [0.125, 0.25, 0.5], "power": power, "chroma_power": power}
        about = {"extra": {"hfer_db": extra}, "flags": {"hfer_db": flags}, "reference": reference}
        make_result(tmp_path / "results", name, values={"hfer_db": value}, half=0.1, **about)
    text = report(tmp_path / "results", tmp_path / "out", [])[0].read_text()
    assert "−2.00 ± 0.14, 3.00 → 1.00 dB" in text and "nearer to real" not in text and "HFER gap (dB) →" not in text
    assert "Log-spectral distance to other models" in text
    assert ("‡ flagged by the evaluation: real images were lossy; compare models" in text) == bool(flags)


def test_checkpoints_are_in_the_csv_with_their_step_and_command(tmp_path):
    for step in (1, 2, 3):
        write_model(tmp_path, "lrm", 0, metrics=("hps",), num=4, training=(step, 3))
    lines = [line for line in lines_of(tmp_path, tmp_path / "out") if line["kind"] == "checkpoint"]
    stored = {str(r.head.training["step"]): r.values[0].value for r in load_results(tmp_path) if r.is_checkpoint}
    assert {line["step"]: float(line["value"]) for line in lines} == stored and len(stored) == 2
    assert all(line["commands"] for line in lines)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    for method in ("lcd", "lrm"):
        write_model(root, method, 0, metrics=("hps", "oracle_all"), num=4, images=2)
    report(root, root / "report", [])
    return root


def test_a_report_of_the_same_results_passes_the_check_and_nothing_is_written(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert [path.name for path in check(written, written / "report", [])] == [f"report.{name}" for name in FORMATS]
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_value_fails_the_check_in_every_format(written, tmp_path, name):
    root = tmp_path / "results"
    shutil.copytree(written, root)
    write_model(root, "lrm", 0, metrics=("oracle_all",), num=4, shifts={"oracle_all": -9.0})
    with pytest.raises(RgbenchError, match=rf"report\.{name}:\d+: has .* where the results give") as caught:
        check(root, root / "report", [name])
    assert "rgbench report" in str(caught.value) and caught.value.exit_code == 1


def test_the_check_names_missing_files_and_forgives_redrawn_pictures(written, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(written, root)
    page = root / "report" / "report.html"
    page.write_text(re.sub(r"(image/webp;base64,)\w{9}", r"\1AAAAAAAAA", page.read_text("utf-8")), encoding="utf-8")
    assert check(root, root / "report", [])
    (root / "report" / "grid-benchtop.png").unlink()
    with pytest.raises(RgbenchError, match=r"grid-benchtop\.png: missing"):
        check(root, root / "report", [])
    (root / "report" / "report.csv").unlink()
    with pytest.raises(RgbenchError, match=r"report\.csv: cannot be read"):
        check(root, root / "report", ["csv"])


def test_the_check_on_the_command_line(cli, written):
    assert cli("report", written, "--check").returncode == 0
    done = cli("report", written, "--check", "--out", written / "elsewhere", "--model", "lrm", "--title", "Two words")
    assert done.returncode == 1 and "report.md: cannot be read" in done.stderr
    assert f"--out {written}/elsewhere --model lrm --title 'Two words'" in done.stderr


@pytest.mark.long
def test_sixty_runs_take_less_than_fifteen_seconds_of_cpu(tmp_path):
    for i in range(60):
        write_model(tmp_path, ("lcd", "rg_lcd", "lrm")[i % 3], i // 3, images=8, num=512)
    start = time.process_time()
    report(tmp_path, tmp_path / "out", [])
    assert time.process_time() - start < 15


@pytest.mark.long
def test_fifty_models_are_readable_in_every_format(tmp_path):
    for i in range(50):
        method = ("lcd", "rg_lcd", "lrm")[i % 3]
        write_model(tmp_path, method, 0, model=f"{method}-{i}-s0", num=4, images=3)
    texts = report(tmp_path, tmp_path / "out", [])
    assert texts[0].read_text().count("| LRM, ") >= 16
    assert max(file.stat().st_size for file in texts) < 25e6


@pytest.mark.long
def test_the_page_of_eight_models_and_64_large_prompts_stays_under_25_mb(tmp_path):
    write_model(tmp_path, "teacher", None, images=64, num=64, size=256)
    for i in range(7):
        method = ("lcd", "rg_lcd", "lrm")[i % 3]
        for step in (*range(10, 60, 10), 60):
            kept = 64 if step == 60 else 8
            write_model(
                tmp_path, method, 0, model=f"{method}-{i}-s0", images=kept, num=64, size=256, training=(step, 60)
            )
    file = report(tmp_path, tmp_path / "out", ["html"])[0]
    assert 1e6 < file.stat().st_size < 25e6
    assert file.read_text("utf-8").count('"group":"test"') == 64


@pytest.mark.long
@needs("pdflatex")
def test_latex_compiles_alone(tmp_path):
    shutil.copytree(HISTORY, tmp_path / "results")
    write_model(tmp_path / "results", "lrm", 0, model="a_b%c&d$e#f{g}~^\\h<é🙂>-s0", metrics=("hps",), num=4)
    for i in range(30):
        write_model(tmp_path / "results", "external", None, model=f"model-{i}", num=4, rows=False)
    tex = report(tmp_path / "results", tmp_path / "out", ["tex"])[0]
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={tmp_path}", str(tex)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=240)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    assert "Overfull" not in done.stdout and "Float too large" not in done.stdout
