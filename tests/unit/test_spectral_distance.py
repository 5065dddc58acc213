"""Log-spectral distance between models: from what results keep, in the report, in comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from rgbench.evaluate.results import Result, write_result
from rgbench.judge.models import gather
from rgbench.metrics.base import Interval
from rgbench.metrics.reference import LOSSY
from rgbench.report.report import report
from rgbench.report.tables import AMONG, SPECTRAL_NOTES, spectral_tables
from tests.results_maker import make

RINGS = 16
RADIUS = ((np.arange(RINGS) + 1) / 32).tolist()


def result(name: str, shift: np.ndarray | float, left: np.ndarray | None = None, **given) -> Result:
    """A result with a spectrum of ``shift`` dB above 1/f²; chroma is a tenth of it."""
    power = np.array(RADIUS) ** -2.0 * 10 ** (np.broadcast_to(shift, RINGS) / 10)
    extra = {"radius": RADIUS, "power": power.tolist(), "chroma_power": (power / 10).tolist()}
    if left is not None:
        extra["power_left_out"] = (power * 10 ** (left / 10)).tolist()
    made = make(name, given.pop("metric", "hfer_gap_db"), 1.0, half=0.5, **given)
    return made.model_copy(update={"extra": extra})


@pytest.fixture
def results(tmp_path):
    """A teacher, two seeds of LCD and of a student whose spectrum is 3 dB up, and one of another."""
    left = np.random.default_rng(1).normal(0, 0.1, (20, RINGS))
    made = {"teacher": 0.0, "lcd-s0": 0.5, "lcd-s1": 0.7, "rg_lcd-s0": 3.0, "rg_lcd-s1": 3.4, "lrm-s0": -1.0}
    for name, shift in made.items():
        kept = {"teacher": left, "lrm-s0": -left}.get(name)  # not what the same prompts would do: an interval
        write_result(tmp_path, result(name, shift, kept))
    return tmp_path


def test_the_report_shows_distances_to_teacher_and_lcd(results):
    (comparison,) = gather(results)
    (table,) = spectral_tables(comparison)
    assert [head.text for head in table.headings] == [
        *("Luma, to the teacher (dB)", "Chroma, to the teacher (dB)", "Luma, to LCD (dB)", "Chroma, to LCD (dB)")
    ]
    cells = {labels[0]: cells for labels, cells in table.rows}
    assert cells["RG-LCD"][0].number == pytest.approx(3.2) and cells["RG-LCD"][2].number == pytest.approx(2.6)
    assert cells["RG-LCD"][0].high == pytest.approx(3.2 + 12.706 * 0.2, abs=1e-3), "t of two seeds"
    assert cells["LCD"][2].number == pytest.approx(0.2) and cells["LCD"][2].low is None, "seed against seed"
    assert 0.6 < cells["LRM"][0].low < 1 < cells["LRM"][0].high < 1.4
    assert cells["LRM"][2].number == pytest.approx(1.5) and cells["LRM"][2].low is None, "LCD's results keep no groups"
    assert "Teacher" not in cells and set(SPECTRAL_NOTES.values()) < set(table.notes)


def test_without_a_gap_there_is_no_table(tmp_path):
    write_result(tmp_path, make("lcd-s0", "hps_aa0", 1.0))
    assert spectral_tables(gather(tmp_path)[0]) == []
    write_result(tmp_path, result("lcd-s0", 0.5))
    assert spectral_tables(gather(tmp_path)[0]) == [], "one model alone"


def test_levels_make_a_whole_report_and_no_end_of_one_is_good(tmp_path):
    """A full-size model without real images of its size: the base is the target."""
    for name, shift, value in (("teacher", 0.0, -15.0), ("lcd-s0", 0.5, -14.0), ("rg_lcd-s0", 3.0, -8.0)):
        made = result(name, shift, metric="hfer_db", level=True)
        interval = Interval(low=value - 0.1, high=value + 0.1, level=0.95, method="made up")
        write_result(tmp_path / "results", made.model_copy(update={"value": value, "interval": interval}))
    report(tmp_path / "results", tmp_path / "report", [])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Log-spectral distance to other models" in text and "HFER_DB (dB) →" not in text
    assert "nearer to real" not in text
    assert AMONG not in text


def test_beside_lossy_real_images_no_model_is_called_nearer_to_real(tmp_path):
    """A student that went from +3 to +1 dB of JPEG photographs has moved away from LCD, no more."""
    for name, value in (("lcd-s0", 3.0), ("rg_lcd-s0", 1.0)):
        made = result(name, value)
        protocol = made.protocol.model_copy(update={"fields": {**made.protocol.fields, "reference": {"lossy": True}}})
        interval = Interval(low=value - 0.1, high=value + 0.1, level=0.95, method="made up")
        changed = {"value": value, "interval": interval, "protocol": protocol, "flags": (LOSSY,)}
        write_result(tmp_path / "results", made.model_copy(update=changed))
    report(tmp_path / "results", tmp_path / "report", ["md"])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "fell from 3.00 to 1.00 dB" in text and "away from LCD" in text and "nearer to real" not in text
    assert "‡ flagged by the evaluation: real images were lossy, which takes from their high frequencies" in text
