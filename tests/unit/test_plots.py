"""Plots: the same bytes each time, readable with many models, drawn from what the results hold."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rgbench.judge.compare import win_rate
from rgbench.judge.models import ResultSet, load_result_sets
from rgbench.report import plots
from tests.conftest import ROOT
from tests.history.plausible import write_model
from tests.results_maker import make_result

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"


def read(root: Path) -> ResultSet:
    (found,) = load_result_sets(root)
    return found


def draw(results: ResultSet) -> dict[str, Figure]:
    """Figures by stem."""
    return {plot.stem: figure for plot, figure in plots.draw(results)[0].items()}


@pytest.fixture(scope="module")
def old() -> ResultSet:
    return read(HISTORY)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> ResultSet:
    """Three runs with checkpoints at 4 steps each, fragility and a log of the proxy's agreement."""
    root = tmp_path_factory.mktemp("full")
    write_model(root, "teacher", None, num=16)
    log = [
        {"step": step, "pair_accuracy": 0.6, "fidelity/kendall_tau": 0.1 * step, "fidelity/kendall_tau/0-250": 0.2}
        for step in (1, 2, 3, 4)
    ]
    for method in ("lcd", "rg_lcd", "lrm"):
        for step in (1, 2, 3, 4):
            last = {"drops": True, "log": log if method == "lrm" else None} if step == 4 else {}
            write_model(root, method, 0, num=16, training=(step, 4), **last)
    return read(root)


@pytest.fixture(scope="module")
def drawn(full: ResultSet) -> dict[str, Figure]:
    return draw(full)


@pytest.fixture(scope="module")
def of_old(old: ResultSet) -> dict[str, Figure]:
    return draw(old)


def test_full_results_have_every_plot_and_old_ones_a_word_on_each_that_is_missing(drawn, old, of_old):
    assert list(drawn) == [plot.stem for plot in plots.PLOTS] and len(drawn) == 8
    assert list(of_old) == ["rewards", "spectra"]
    missing = " ".join(plots.draw(old)[1])
    for command in ("--checkpoints", "--metric fragility", "lrm.yaml", "--metric spectrum", "--metric hps"):
        assert command in missing


def test_files_are_the_same_bytes_and_load_nothing_and_axes_are_labelled(full, drawn):
    for stem, again in draw(full).items():
        one, two = (plots.save(figure, "svg") for figure in (drawn[stem], again))
        assert one == two, stem
        assert not re.search(rb'(href|src)="https?:', one) and b"<dc:date>" not in one
        assert all(axes.get_title(loc="left") or axes.get_ylabel() for axes in again.axes), "a panel says what it shows"


def test_a_users_settings_do_not_reach_in(full, drawn, tmp_path):
    with mpl.rc_context({"lines.linewidth": 9, "savefig.dpi": 30, "svg.fonttype": "none", "axes.grid": False}):
        for stem, figure in draw(full).items():
            assert plots.save(figure, "svg") == plots.save(drawn[stem], "svg"), stem
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    surroundings = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rgbench", "report", str(HISTORY), "--out", "out", "--format", "md"]
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "spectra-benchtop.png").is_file(), done.stderr


def test_spectra_draw_each_models_gap_to_real_and_to_the_teacher(of_old):
    real, teacher = of_old["spectra"].axes
    gap = {line.get_label(): line.get_ydata() for line in real.lines}
    assert set(gap) >= {"Teacher", "LCD", "RG-LCD", "LRM"}
    radius = np.array([2.0**-k for k in (6, 5, 4, 3, 2, 1)])
    np.testing.assert_allclose(gap["RG-LCD"], 10 * 4.2 * radius / 5)
    against = {line.get_label(): line.get_ydata() for line in teacher.lines}
    np.testing.assert_allclose(against["RG-LCD"], gap["RG-LCD"] - gap["Teacher"])
    assert "Teacher" not in against
    assert "dB" in real.get_ylabel() and "cycles/pixel" in real.get_xlabel() and "teacher" in teacher.get_ylabel()


def test_spectra_without_real_images_are_shown_beside_the_teachers(tmp_path):
    """As of a model that was evaluated on prompts of one's own."""
    for model, gain in (("teacher", 1.0), ("mine", 2.0)):
        extra = {"hfer_db": {"radius": [0.125, 0.25, 0.5], "power": [4 * gain, 2 * gain, gain]}}
        method = "external" if model == "mine" else None
        make_result(tmp_path, model, method, values={"hfer_db": -12.0}, extra=extra, reference=None)
    power, teacher = draw(read(tmp_path))["spectra"].axes
    assert power.get_title(loc="left") == "Power spectrum" and len(power.lines) == 2
    assert teacher.get_title(loc="left") == "Gap to the teacher"
    (gap,) = [line.get_ydata() for line in teacher.lines if line.get_label() == "mine"]
    assert gap == pytest.approx([10 * np.log10(2)] * 3)


def test_rewards_hold_the_trained_reward_against_oracle_and_distance(of_old):
    left, right = of_old["rewards"].axes
    assert left.get_title(loc="left") == "HPS against Oracle, all right"
    assert right.yaxis_inverted() and not left.yaxis_inverted(), "better upwards"
    points = {line.get_label(): line for line in right.lines if line.get_marker() not in ("None", "|", "_")}
    assert points["RG-LCD"].get_xydata().tolist() == [[29.4, 41.015]]
    assert points["RG-LCD"].get_markerfacecolor() == plots.PAPER, "hollow: trained on this reward"
    assert points["LCD"].get_markerfacecolor() != plots.PAPER


def test_the_pareto_front_holds_the_students_that_no_other_one_beats_in_both(drawn):
    axes = drawn["rewards"].axes[1]
    (front,) = [line for line in axes.lines if str(line.get_label()).startswith("Pareto")]
    paths = [line.get_xydata() for line in axes.lines if line.get_marker() == "."]
    reached = np.concatenate(paths)
    assert len(paths) == 3 and len(reached) == 12, "three runs of four points each"
    for x, y in front.get_xydata():
        assert [x, y] in reached.tolist()
        assert not ((reached[:, 0] > x) & (reached[:, 1] < y)).any()


def test_training_draws_proxy_and_gold_and_marks_the_hack_step(drawn):
    proxy, gold, path = drawn["training"].axes
    assert proxy.get_title(loc="left") == "Trained reward (proxy): HPS"
    assert gold.get_title(loc="left") == "Gold: Oracle, all right"
    assert proxy.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    marks = [line for line in gold.lines if line.get_marker() == "v"]
    assert [mark.get_xdata()[0] for mark in marks] == [2, 2], "both guided runs; LCD was trained on no reward"
    assert all(mark.get_markerfacecolor() == plots.INK for mark in marks)
    assert path.get_xlabel() == proxy.get_ylabel() and path.get_ylabel() == gold.get_ylabel()


def test_octaves_draw_each_models_gaps(drawn):
    (axes,) = drawn["octaves"].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["LRM"] == [-0.5, 1.25] and "dB" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1/8 to 1/4", "1/4 to 1/2"]


def test_distributions_count_every_image_once(full, drawn):
    scores = plots.scores_of(full, full.trained_reward())
    assert [len(values) for values in scores.values()] == [16] * 4
    axes = drawn["distributions"].axes[0]
    medians = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
    assert medians == [float(np.median(values)) for values in reversed(scores.values())]


def test_win_rates_are_those_of_the_judge_and_add_up_to_one(full, drawn):
    matrix = np.asarray(drawn["wins"].axes[0].images[0].get_array())
    np.testing.assert_allclose((matrix + matrix.T)[~np.eye(4, dtype=bool)], 100)
    found = win_rate(full.models[3], full.models[1], full.trained_reward())
    assert matrix[3, 1] == pytest.approx(100 * found.rate)
    assert drawn["wins"].axes[0].get_title(loc="left") == "HPS†: row against column"


def test_win_rates_that_are_not_significant_are_in_brackets(tmp_path):
    base = np.random.default_rng(0).normal(size=64)
    for model, shift in (("lcd-s0", 0.0), ("lrm-s0", 0.0), ("rg_lcd-s0", 1.0)):
        make_result(tmp_path, model, rows={"hps": base + shift})
    written = [text.get_text() for text in draw(read(tmp_path))["wins"].axes[0].texts]
    assert sorted(written) == ["(50)", "(50)", "0", "0", "100", "100"]


def test_fragility_draws_means_with_intervals_and_each_change(drawn):
    left, right = drawn["fragility"].axes
    points = {line.get_label(): line.get_ydata() for line in right.lines}
    assert list(points["LRM"]) == [1.0, pytest.approx(-0.15)]
    assert [text.get_text() for text in right.get_xticklabels()] == ["JPEG 75", "blur, 1 px"]
    assert left.get_ylabel() == "extra reward drop vs. real images"


def test_fidelity_draws_held_out_measures_before_training_pairs(drawn):
    held_out, pairs = drawn["fidelity"].axes
    assert held_out.get_title(loc="left") == "Kendall tau, held-out samples"
    lines = {line.get_label(): line for line in held_out.lines}
    np.testing.assert_allclose(lines["LRM"].get_xydata(), [(step, 0.1 * step) for step in (1, 2, 3, 4)])
    assert lines["LRM"].get_linestyle() != lines["LRM, 0-250"].get_linestyle()
    assert pairs.get_title(loc="left") == "Pair accuracy, training pairs"


def test_fidelity_of_several_seeds_is_their_mean_and_range(tmp_path):
    for seed, value in ((0, 0.5), (1, 0.7)):
        log = [{"step": step, "pair_accuracy": value} for step in range(1, 5 + seed)]
        write_model(tmp_path, "lrm", seed, metrics=("hps",), num=4, log=log)
    (axes,) = draw(read(tmp_path))["fidelity"].axes
    line = next(line for line in axes.lines if line.get_label() == "LRM")
    np.testing.assert_allclose(line.get_ydata(), 0.6)
    (band,) = axes.collections
    assert {round(y, 6) for _, y in band.get_paths()[0].vertices} == {0.5, 0.7}


def test_many_models_are_named_by_method(tmp_path):
    for i in range(12):
        write_model(tmp_path, "external", None, model=f"model-{i}", metrics=("hps", "oracle_all"), num=4, rows=False)
    texts = [text.get_text() for text in draw(read(tmp_path))["rewards"].legends[0].get_texts()]
    assert texts[0] == "External, 12 models" and not any("model-" in text for text in texts)


def test_one_variant_has_one_shape_and_one_method_one_colour(tmp_path):
    for method in ("rg_lcd", "lrm"):
        for variant in ("", "-b10"):
            write_model(tmp_path, method, 0, model=f"{method}{variant}-s0", metrics=("hps", "oracle_all"), num=4)
    axes = draw(read(tmp_path))["rewards"].axes[0]
    look = {line.get_label(): (line.get_marker(), line.get_color()) for line in axes.lines}
    assert look["RG-LCD, b10"][0] == look["LRM, b10"][0] != look["LRM"][0] == look["RG-LCD"][0]
    assert look["RG-LCD, b10"][1] == look["RG-LCD"][1] != look["LRM"][1]


def test_dollar_signs_in_names_are_no_mathematics(tmp_path):
    for name in ("a$x^{$", "b"):
        write_model(tmp_path, "external", None, model=name, metrics=("hps", "oracle_mean"), num=4)
    figures = draw(read(tmp_path))
    assert {"rewards", "distributions", "wins"} <= figures.keys()
    assert all(plots.save(figure, "png").startswith(b"\x89PNG") for figure in figures.values())


def test_colours_keep_apart_without_colour_vision():
    """Pairwise luminance or blue-yellow contrast, which every common colour blindness keeps."""
    for palette in (plots.COLOURS, plots.DARK_COLOURS):
        rgb = {name: np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for name, code in palette.items()}
        seen = {name: np.array([c @ [0.3, 0.6, 0.1], c[2] - c[:2].mean()]) for name, c in rgb.items()}
        names = list(seen)
        assert min(np.abs(seen[a] - seen[b]).max() for i, a in enumerate(names) for b in names[:i]) > 0.08


def test_png_has_the_figures_size(of_old):
    image = Image.open(io.BytesIO(plots.save(of_old["spectra"], "png")))
    assert image.width == 1600 and image.info.get("Software") is None


def test_nothing_of_a_legend_or_an_axis_is_cut_off(tmp_path):
    """A panel alone with long names, and two with long labels: all of it lies on the paper."""
    log = [{"step": step, "pair_accuracy": 0.6 + 0.001 * step} for step in range(40)]
    for method, models in (("lrm", ("a-longer-name-than-most", "another-long-name")), ("rg_lcd", ("one", "two"))):
        for model in models:
            write_model(tmp_path, method, 0, model=f"{model}-s0", num=16, drops=True, log=log)
    figures = draw(read(tmp_path))
    for stem in ("fidelity", "distributions", "fragility"):
        figure = figures[stem]
        figure.draw_without_rendering()
        inside = figure.bbox.padded(2)
        labels = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)]
        for box in (part.get_window_extent() for part in (*figure.legends, *labels)):
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, stem
    left, right = figures["fragility"].axes
    points = [line for line in right.lines if line.get_marker() not in ("None", "")]
    assert len({(line.get_color(), line.get_marker()) for line in points}) == 4, "each model can be told apart"
    assert sorted(tick.get_text() for tick in left.get_xticklabels()) == [
        *("LRM, a-longer-name-than-most", "LRM, another-long-name", "RG-LCD, one", "RG-LCD, two")
    ]
