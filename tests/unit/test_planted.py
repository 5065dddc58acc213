"""Planted hacks do what they say, and the table of what finds them is right."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from rgbench.evaluation.hacks import HACKS
from rgbench.evaluation.statistics import detection_auc
from rgbench.evaluation.validation import Detection, smallest_doses
from rgbench.metrics.overopt.colour import saturation
from rgbench.metrics.overopt.pixels import wavelet_noise
from rgbench.worlds.scenes import scene_batch


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return scene_batch("test", range(16))[0]


def planted(images: torch.Tensor, hack: str, dose: float) -> torch.Tensor:
    return HACKS[hack].plant(images, dose, 8, torch.Generator().manual_seed(0))


def test_doses_are_what_they_say(images):
    flat = torch.full((4, 3, 64, 64), 0.5)
    assert planted(flat, "noise", 8).std() * 255 == pytest.approx(8, rel=0.02)
    assert wavelet_noise(255 * planted(flat, "noise", 8)[:, 0].double()).mean() == pytest.approx(8, rel=0.05)
    lines = (planted(flat, "grid", 4) - flat)[0, 0] * 255
    assert lines[::8].min() == pytest.approx(4, rel=1e-3) and lines[1::8, 1::8].abs().max() == 0
    mild = 0.5 + 0.2 * (images - 0.5)  # far enough from the ends that nothing clips
    grey = mild.mean(1, keepdim=True)
    torch.testing.assert_close(planted(mild, "saturation", 0.4) - grey, 1.4 * (mild - grey))
    assert saturation(planted(mild, "saturation", 0.4)).mean() > 1.2 * saturation(mild).mean()
    edge = torch.zeros(1, 3, 1, 65)
    edge[..., 32] = 1
    blurred = planted(edge.expand(1, 3, 9, 65), "blur", 1.2)[0, 0, 4]
    spread = (blurred * (torch.arange(65) - 32) ** 2).sum()
    assert blurred.sum() == pytest.approx(1, abs=1e-5) and spread.sqrt() == pytest.approx(1.2, rel=0.02)
    assert planted(images, "sharpening", 0.8).diff(dim=-1).abs().mean() > images.diff(dim=-1).abs().mean()


def test_collapse_copies_the_first_of_a_prompt_and_ignoring_shows_the_next(images):
    for dose, copies in ((0.15, 1), (0.3, 2), (1.0, 7)):
        collapsed = planted(images, "mode collapse", dose)
        for start in (0, 8):
            same = (collapsed[start : start + 8] == images[start]).flatten(1).all(1)
            assert same.sum() == 1 + copies
    ignored = planted(images, "prompt-ignoring", 0.5)
    own = (ignored == images).flatten(1).all(1)
    assert own.sum() == 8
    assert torch.equal(ignored[~own], images.roll(-8, 0)[~own])


def test_every_hack_grows_with_its_dose(images):
    for name, hack in HACKS.items():
        assert list(hack.doses) == sorted(hack.doses)
        change = [(planted(images, name, dose) - images).abs().mean() for dose in hack.doses]
        assert all(a < b for a, b in pairwise(change)), name


def test_auc_is_a_probability():
    assert detection_auc([3, 4], [1, 2]) == 1 and detection_auc([1, 2], [3, 4]) == 0
    assert detection_auc([1, 2, 3], [1, 2, 3]) == 0.5
    rng = np.random.default_rng(0)
    hacked, clean = rng.normal(1, 1, 2000), rng.normal(0, 1, 2000)
    assert detection_auc(hacked, clean) == pytest.approx(0.760, abs=0.02), "Φ(1/√2)"
    with pytest.raises(ValueError, match="0 faulty"):
        detection_auc([], [1])


def row(dose: float, auc: float, metric: str = "m", hack: str = "noise") -> Detection:
    return Detection(hack, dose, "levels", metric, 0.0, 1.0, 0.1, auc)


def test_the_smallest_dose_holds_for_all_larger_ones():
    rows = [row(1, 0.99), row(2, 0.9), row(4, 0.95), row(8, 1.0)]
    assert smallest_doses(rows) == {"noise": {"m": 4}}, "a lucky smaller dose does not count"
    assert smallest_doses([row(1, 1.0), row(2, 0.5, "n"), row(1, 0.5, "n"), row(2, 1.0)]) == {
        "noise": {"m": 1, "n": None}
    }


def test_validate_writes_what_was_found(cli, monkeypatch):
    done = cli("probes", "validate", "--out", "out", "--metric", "pixels", "--hack", "noise,blur", "--sets", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out/validation.json", "out/validation.md"]
    with open("out/validation.json", encoding="utf-8") as file:
        record = json.load(file)
    rows = {(r["hack"], r["dose"], r["metric"]): r for r in record["detections"]}
    assert len(rows) == 2 * 5 * 3
    assert rows["noise", 16, "wavelet_noise_gap"]["auc"] == 1
    assert rows["noise", 16, "wavelet_noise_gap"]["hacked"] > 4
    assert abs(rows["noise", 16, "wavelet_noise_gap"]["clean"]) < 1
    assert rows["blur", 1.2, "laplacian_variance_gap"]["hacked"] < rows["blur", 1.2, "laplacian_variance_gap"]["clean"]
    assert record["smallest_dose"]["noise"]["wavelet_noise_gap"] <= 4
    with open("out/validation.md", encoding="utf-8") as file:
        table = file.read()
    assert "| Wavelet noise σ gap | " in table and "## Noise: mean (AUC) by dose, levels" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "pixel"], "unknown metric 'pixel'; did you mean 'pixels'"),
        (["--hack", "nose"], "unknown hack 'nose'; did you mean 'noise'"),
    ],
)
def test_wrong_names_are_explained(cli, arguments, message):
    done = cli("probes", "validate", *arguments)
    assert done.returncode == 2 and message in done.stderr
