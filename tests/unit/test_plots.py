"""Plots: the same bytes each time, readable with many models, drawn from what the files hold."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rgbench.core.io import write_json_atomic
from rgbench.evaluate.results import FILE
from rgbench.judge.models import Comparison, gather
from rgbench.metrics.statistics import t_interval, wilson_interval
from rgbench.report import plots
from rgbench.report import plots as distributions
from rgbench.report import plots as drawing
from rgbench.report import plots as fidelity
from rgbench.report import plots as fragility
from rgbench.report import plots as octaves
from rgbench.report import plots as rewards
from rgbench.report import plots as spectra
from rgbench.report import plots as training
from rgbench.report import plots as wins
from rgbench.report.report import report
from tests.history.plausible import write_fragility, write_model
from tests.results_maker import BASE, put

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"


@pytest.fixture(scope="module")
def old() -> Comparison:
    return gather(HISTORY)[0]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Three runs with checkpoints at 2 of 4 steps each, fragility and a log of the proxy's agreement."""
    root = tmp_path_factory.mktemp("full")
    write_model(root, "teacher", None, num=16)
    for method in ("lcd", "rg_lcd", "lrm"):
        for step in (1, 2, 3, 4):
            write_model(root, method, 0, num=16, training=(step, 4))
        write_fragility(root, method)
    folder = next(path.parent for path in root.glob("*/lrm-s0/*/*.json") if '"step": 4' in path.read_text())
    logged = [
        {"step": step, "pair_accuracy": 0.6, "fidelity/kendall_tau": 0.1 * step, "fidelity/kendall_tau/0-250": 0.2}
        for step in (1, 2, 3, 4)
    ]
    write_json_atomic(folder / FILE, {"schema_version": 1, "rows": logged})
    return gather(root)[0]


def test_the_full_results_have_every_plot_and_old_ones_a_word_on_each_that_is_missing(full, old):
    assert [plot.stem for plot in plots.PLOTS if plot.lacking(full)] == []
    assert len({plot.stem for plot in plots.PLOTS}) == 8
    reasons = {plot.stem: plot.lacking(old) for plot in plots.PLOTS}
    assert {stem for stem, reason in reasons.items() if not reason} == {"rewards", "spectra"}
    assert "--checkpoints" in reasons["training"] and "--metric fragility" in reasons["fragility"]
    assert "lrm.yaml" in reasons["fidelity"] and "--metric spectrum" in reasons["octaves"]


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.stem)
def test_svg_is_the_same_bytes_and_loads_nothing_and_axes_are_labelled(full, plot):
    canvas = plot.draw(full, plots.LIGHT)
    one, two = plots.svg(canvas), plots.svg(plot.draw(full, plots.LIGHT))
    assert one == two
    assert not re.search(rb'(href|src)="https?:', one) and b"<dc:date>" not in one
    for axes in canvas.axes:
        assert axes.get_title(loc="left") or axes.get_ylabel(), "a panel says what it shows"


def test_spectra_draw_each_models_gap_to_real_and_to_the_teacher(old):
    left, real, teacher = spectra.spectra_draw(old).axes
    lines = {line.get_label(): line for line in real.lines}
    assert set(lines) >= {"Teacher: HFER -1.10 dB", "LCD: HFER -1.90 dB", "RG-LCD: HFER +4.20 dB", "LRM: HFER 0.00 dB"}
    gap = lines["RG-LCD: HFER +4.20 dB"].get_ydata()
    radius = np.array([2.0**-k for k in (6, 5, 4, 3, 2, 1)])
    np.testing.assert_allclose(gap, 10 * 4.2 * radius / 5)
    against = {line.get_label(): line for line in teacher.lines}
    np.testing.assert_allclose(
        against["RG-LCD: HFER +4.20 dB"].get_ydata(), gap - lines["Teacher: HFER -1.10 dB"].get_ydata()
    )
    assert "dB" in left.get_ylabel() and "cycles/pixel" in left.get_xlabel() and "teacher" in teacher.get_ylabel()


def test_spectra_without_real_images_are_levels_beside_the_teachers(tmp_path):
    """As of a model that was evaluated on prompts of one's own."""
    for model, gain, steps in (("teacher", 1.0, 50), ("mine", 2.0, 4)):
        path = put(tmp_path, model, "hfer_db", -12.0, level=True, sampler_steps=steps, elsewhere=model == "mine")
        result = json.loads(path.read_text())
        result["extra"] |= {"radius": [0.125, 0.25, 0.5], "power": [4 * gain, 2 * gain, gain]}
        path.write_text(json.dumps(result))
    (comparison,) = gather(tmp_path)
    assert spectra.PLOT.lacking(comparison) == ""
    left, teacher = spectra.spectra_draw(comparison).axes
    assert (left.get_title(loc="left"), teacher.get_title(loc="left")) == ("Power spectrum", "Gap to the teacher")
    assert "real" not in [line.get_label() for line in left.lines] and len(left.lines) == 2
    gaps = sorted(line.get_ydata()[0] for line in teacher.lines if len(line.get_ydata()) == 3)
    assert gaps == pytest.approx([0, 10 * np.log10(2)])
    report(tmp_path, tmp_path / "report", [])


def test_rewards_hold_the_trained_reward_against_oracle_and_distance(old):
    left, right = rewards.draw(old).axes
    assert left.get_title(loc="left") == "HPS aa1 against Oracle, all right"
    assert right.yaxis_inverted(), "better upwards"
    points = {line.get_label(): line for line in right.lines if line.get_marker() not in ("None", "|", "_")}
    assert points["RG-LCD"].get_xydata().tolist() == [[29.4, 41.015]]
    assert points["RG-LCD"].get_markerfacecolor() == plots.LIGHT.paper, "hollow: trained on this reward"
    assert points["LCD"].get_markerfacecolor() != plots.LIGHT.paper


def test_the_pareto_front_holds_the_students_that_no_other_one_beats_in_both(full):
    axes = rewards.draw(full).axes[1]
    (front,) = [line for line in axes.lines if str(line.get_label()).startswith("Pareto")]
    drawn = [line.get_xydata() for line in axes.lines if line.get_marker() == "."]
    reached = np.concatenate(drawn)
    assert len(drawn) == 3 and len(reached) == 12, "three runs of four points each"
    for x, y in front.get_xydata():
        assert [x, y] in reached.tolist()
        assert not ((reached[:, 0] > x) & (reached[:, 1] < y)).any()


@pytest.mark.parametrize(
    ("points", "lower", "front"),
    [
        ([(1, 5), (2, 4), (2, 6), (3, 9)], True, [(2, 4), (3, 9)]),
        ([(1, 5), (2, 4), (3, 3)], False, [(1, 5), (2, 4), (3, 3)]),
        ([(1, 1), (1, 1)], True, [(1, 1)]),
        ([], True, []),
    ],
)
def test_pareto_front(points, lower, front):
    assert rewards.pareto_front(points, lower_is_better=lower) == front


def test_training_draws_proxy_and_gold_and_marks_the_hack_step(full):
    proxy, gold, path = training.training_draw(full).axes
    assert proxy.get_title(loc="left") == "Trained reward (proxy): HPS aa1"
    assert gold.get_title(loc="left") == "Gold: Oracle, mean"
    assert proxy.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    marks = [line for line in gold.lines if line.get_marker() == "v"]
    assert [mark.get_xdata()[0] for mark in marks] == [2, 2], "both guided runs; LCD was trained on no reward"
    assert all(mark.get_markerfacecolor() == plots.LIGHT.ink for mark in marks), "clear of the intervals"
    assert path.get_xlabel() == proxy.get_ylabel() and path.get_ylabel() == gold.get_ylabel()


def test_octaves_draw_each_models_gaps(full):
    (axes,) = octaves.octaves_draw(full).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["LRM"] == [-0.5, 1.25] and "dB" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1/8 to 1/4", "1/4 to 1/2"]


def test_distributions_count_every_image_once(full):
    column = full.trained_reward()
    scores = distributions.scored_rows(full, column)
    assert [len(values) for values in scores.values()] == [16] * 4
    axes = distributions.distributions_draw(full).axes[0]
    medians = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
    assert medians == [float(np.median(values)) for values in reversed(scores.values())]


def test_win_rates_count_ties_half_and_add_up_to_one(full, tmp_path):
    column = full.trained_reward()
    rows = {row.method: row for row in full.rows}
    ours, theirs = (list(rows[name].scores(rows[name].result(column, 0)).values()) for name in ("lrm", "lcd"))
    share = np.mean([a > b for a, b in zip(ours, theirs, strict=True)])
    found = wins.win_rate(rows["lrm"], rows["lcd"], column)
    assert found.rate == pytest.approx(share) and found.interval == wilson_interval(share * 16, 16)
    assert wins.win_rate(rows["lcd"], rows["lrm"], column).rate == pytest.approx(1 - share)
    assert wins.win_rate(rows["lcd"], rows["lcd"], column).rate == 0.5, "all ties"
    matrix = np.asarray(wins.wins_draw(full).axes[0].images[0].get_array())
    np.testing.assert_allclose((matrix + matrix.T)[~np.eye(4, dtype=bool)], 100)


def test_win_rates_that_are_not_clear_of_an_even_match_are_in_brackets(tmp_path):
    for model, shift in (("lcd-s0", 0.0), ("lrm-s0", 0.0), ("rg_lcd-s0", 1.0)):
        put(tmp_path, model, "hps_aa0", rows=BASE + shift)
    written = [text.get_text() for text in wins.wins_draw(gather(tmp_path)[0]).axes[0].texts]
    assert sorted(written) == ["(50)", "(50)", "0", "0", "100", "100"]


def test_win_rates_over_several_seeds_have_the_seeds_interval(tmp_path):
    for method in ("lcd", "lrm"):
        for seed in range(3):
            write_model(tmp_path, method, seed, metrics=("hps_aa0",), num=16)
    found = gather(tmp_path)[0]
    rows = {row.method: row for row in found.rows}
    column = found.column("hps_aa0")
    found = wins.win_rate(rows["lrm"], rows["lcd"], column)
    each = []
    for seed in rows["lrm"].members:
        ours, theirs = (rows[name].scores(rows[name].result(column, seed)) for name in ("lrm", "lcd"))
        each.append(np.mean([(ours[key] > theirs[key]) + (ours[key] == theirs[key]) / 2 for key in ours]))
    mean, low, high = t_interval(each)
    assert len(each) > 1 and found.rate == pytest.approx(mean)
    assert (found.interval.low, found.interval.high) == pytest.approx((max(0, low), min(1, high)))


def test_fragility_draws_means_with_intervals_and_each_change(full):
    left, right = fragility.fragility_draw(full).axes
    heights = [bar.get_height() for bar in right.patches]
    assert len(heights) == 3 * 2 and heights[0] == 1.0
    assert [text.get_text() for text in right.get_xticklabels()] == ["JPEG 75", "blur, 1 px"]
    assert "real images" in left.get_ylabel()


def test_fidelity_draws_held_out_measures_before_training_pairs(full):
    held_out, pairs = fidelity.fidelity_draw(full).axes
    assert held_out.get_title(loc="left") == "Kendall tau, held-out samples"
    everywhere, early, _chance = held_out.lines
    np.testing.assert_allclose(everywhere.get_xydata(), [(step, 0.1 * step) for step in (1, 2, 3, 4)])
    assert [line.get_label() for line in (everywhere, early)] == ["LRM", "LRM, 0-250"]
    assert everywhere.get_linestyle() != early.get_linestyle()
    assert pairs.get_title(loc="left") == "Pair accuracy, training pairs"


def test_dark_theme_has_its_own_paper(old):
    assert (
        spectra.spectra_draw(old, plots.DARK).axes[0].get_facecolor()
        != spectra.spectra_draw(old).axes[0].get_facecolor()
    )


def test_many_models_are_named_by_method(tmp_path):
    for i in range(12):
        write_model(
            tmp_path, "external", None, model=f"model-{i}", metrics=("hps_aa1", "oracle_all"), num=4, rows=False
        )
    canvas = rewards.draw(gather(tmp_path)[0])
    texts = [text.get_text() for text in canvas.legends[0].get_texts()]
    assert texts[0] == "External, 12 models" and not any("model-" in text for text in texts)


def test_dollar_signs_in_names_are_no_mathematics(tmp_path):
    for name in ("a$x^{$", "b"):
        write_model(tmp_path, "external", None, model=name, metrics=("hps_aa1", "oracle_mean"), num=4)
    comparison = gather(tmp_path)[0]
    for module in (rewards, distributions, wins):
        assert plots.png(module.draw(comparison)).startswith(b"\x89PNG")


def test_colours_keep_apart_without_colour_vision():
    """Pairwise luminance or blue-yellow contrast, which every common colour blindness keeps."""
    for palette in (drawing.COLOURS, drawing.DARK_COLOURS):
        rgb = {name: np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for name, code in palette.items()}
        seen = {name: np.array([c @ [0.3, 0.6, 0.1], c[2] - c[:2].mean()]) for name, c in rgb.items()}
        names = list(seen)
        assert min(np.abs(seen[a] - seen[b]).max() for i, a in enumerate(names) for b in names[:i]) > 0.08


def test_png_has_the_figures_size(old):
    image = Image.open(io.BytesIO(plots.png(spectra.spectra_draw(old))))
    assert image.width == 2400 and image.info.get("Software") is None


def test_nothing_of_a_legend_or_an_axis_is_cut_off(tmp_path):
    """A panel alone with long names, and two with long labels: all of it lies on the paper."""
    for method, models in (("lrm", ("a-longer-name-than-most", "another-long-name")), ("rg_lcd", ("one", "two"))):
        for model in models:
            write_model(tmp_path, method, 0, model=f"{model}-s0", num=16)
            write_fragility(tmp_path, method, model=f"{model}-s0")
    for folder in {path.parent for path in tmp_path.glob("*/*name*/*/*.json")}:
        rows = [{"step": step, "pair_accuracy": 0.6 + 0.001 * step} for step in range(40)]
        write_json_atomic(folder / FILE, {"schema_version": 1, "rows": rows})
    comparison = gather(tmp_path)[0]
    for module in (fidelity, distributions, fragility):
        canvas = module.draw(comparison)
        canvas.draw_without_rendering()
        inside = canvas.bbox.padded(2)
        parts = [
            *canvas.legends,
            *(axes.xaxis.label for axes in canvas.axes),
            *(axes.yaxis.label for axes in canvas.axes),
        ]
        for box in (part.get_window_extent() for part in parts):
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, module
    lines = [
        line for line in fidelity.fidelity_draw(comparison).axes[0].get_lines() if "mean of" in str(line.get_label())
    ]
    assert sorted(line.is_dashed() for line in lines) == [False, True], "two rows of one method can be told apart"
    left, right = fragility.fragility_draw(comparison).axes
    assert len({(bar[0].get_facecolor(), bar[0].get_hatch()) for bar in right.containers}) == 4
    assert sorted(tick.get_text() for tick in left.get_xticklabels()) == sorted(
        f"{name}-s0" for name in ("a-longer-name-than-most", "another-long-name", "one", "two")
    )
