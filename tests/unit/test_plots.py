"""Plots: the same bytes each time, readable with many models, drawn from what the files hold."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rgbench.reporting import plots
from rgbench.reporting.gather import Comparison, gather
from tests.history.plausible import write_model

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"


@pytest.fixture(scope="module")
def old() -> Comparison:
    return gather(HISTORY)[0]


@pytest.mark.parametrize("draw", [plots.spectra, plots.rewards])
def test_svg_is_the_same_bytes_and_loads_nothing(old, draw):
    one, two = plots.svg(draw(old)), plots.svg(draw(old))
    assert one == two
    assert not re.search(rb'(href|src)="https?:', one) and b"<dc:date>" not in one


def test_spectra_draw_each_models_gap_to_real(old):
    canvas = plots.spectra(old)
    left, right = canvas.axes
    lines = {line.get_label(): line for line in right.lines}
    assert set(lines) >= {"Teacher: HFER -1.10 dB", "LCD: HFER -1.90 dB", "RG-LCD: HFER +4.20 dB", "LRM: HFER 0.00 dB"}
    gap = lines["RG-LCD: HFER +4.20 dB"].get_ydata()
    radius = np.array([2.0**-k for k in (6, 5, 4, 3, 2, 1)])
    np.testing.assert_allclose(gap, 10 * 4.2 * radius / 5)
    assert "dB" in left.get_ylabel() and "cycles/pixel" in left.get_xlabel()


def test_rewards_hold_the_trained_reward_against_oracle_and_distance(old):
    left, right = plots.rewards(old).axes
    assert left.get_title(loc="left") == "HPS aa1 against Oracle, all right"
    assert right.yaxis_inverted(), "better upwards"
    points = {line.get_label(): line for line in right.lines if line.get_marker() not in ("None", "|", "_")}
    assert points["RG-LCD"].get_xydata().tolist() == [[29.4, 41.015]]
    assert points["RG-LCD"].get_markerfacecolor() == plots.LIGHT.paper, "hollow: trained on this reward"
    assert points["LCD"].get_markerfacecolor() != plots.LIGHT.paper


def test_dark_theme_has_its_own_paper(old):
    assert plots.spectra(old, plots.DARK).axes[0].get_facecolor() != plots.spectra(old).axes[0].get_facecolor()


def test_many_models_are_named_by_method(tmp_path):
    for i in range(12):
        write_model(
            tmp_path, "external", None, model=f"model-{i}", metrics=("hps_aa1", "oracle_all"), num=4, rows=False
        )
    canvas = plots.rewards(gather(tmp_path)[0])
    texts = [text.get_text() for text in canvas.legends[0].get_texts()]
    assert texts == ["External, 12 models"]


def test_dollar_signs_in_names_are_no_mathematics(tmp_path):
    for name in ("a$x^{$", "b"):
        write_model(tmp_path, "external", None, model=name, metrics=("hps_aa1", "oracle_all"), num=4, rows=False)
    assert plots.png(plots.rewards(gather(tmp_path)[0])).startswith(b"\x89PNG")


def test_nothing_is_drawn_without_data(tmp_path):
    write_model(tmp_path, "lcd", 0, metrics=("hps_aa1",), num=4)
    comparison = gather(tmp_path)[0]
    assert not plots.has_spectra(comparison) and not plots.has_rewards(comparison)


def test_colours_keep_apart_without_colour_vision():
    """Pairwise luminance or blue-yellow contrast, which every common colour blindness keeps."""
    for palette in (plots.COLOURS, plots.DARK_COLOURS):
        rgb = {name: np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for name, code in palette.items()}
        seen = {name: np.array([c @ [0.3, 0.6, 0.1], c[2] - c[:2].mean()]) for name, c in rgb.items()}
        names = list(seen)
        assert min(np.abs(seen[a] - seen[b]).max() for i, a in enumerate(names) for b in names[:i]) > 0.08


def test_png_has_the_figures_size(old):
    image = Image.open(io.BytesIO(plots.png(plots.spectra(old))))
    assert image.width == 1600 and image.info.get("Software") is None
