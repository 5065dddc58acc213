"""The arithmetic of the quality table and of the physics verdict."""

from __future__ import annotations

import pytest
import torch

from rgbench.benchtop.scenes import scene_batch
from tools.benchtop.physics import Outcome, verdict
from tools.benchtop.quality import Row, high_energy, spectrum_rows


def test_a_row_is_short_outside_its_bounds_or_without_a_value():
    assert Row("x", 0.95, 0.95).ok and not Row("x", 0.949, 0.95).ok
    assert Row("x", -3.9, -4.0, unit="dB", ceiling=4.0).ok and not Row("x", 4.1, -4.0, ceiling=4.0).ok
    assert not Row("x", None, 0.5).ok
    assert Row("reported only", 0.0).ok and "—" in str(Row("x", None))
    assert Row("x", 1.0, 0.5).to_dict()["ok"] is True


def test_spectrum_rows_of_blurred_scenes_fall_in_the_upper_octaves():
    images, _ = scene_batch("test", range(16))
    same = spectrum_rows(images, images)
    assert all(abs(row.value) < 1e-9 and row.ok for row in same)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    rows = {row.name: row for row in spectrum_rows(blurred, images)}
    assert not rows["VAE: energy above 0.25 against real"].ok
    assert rows["VAE: energy above 0.25 against real"].value < -4


def test_high_energy_sees_noise_and_not_contrast_of_slow_waves():
    x = torch.arange(64) / 64
    slow = (0.5 + 0.4 * torch.sin(2 * torch.pi * 3 * x)).expand(1, 3, 64, 64)
    checker = 0.5 + 0.1 * (torch.arange(64)[:, None] + torch.arange(64)[None]).remainder(2).sub(0.5).sign()
    assert high_energy(slow) < 1e-3
    assert high_energy(checker.expand(1, 3, 64, 64)) > 1e3


def outcomes(reward: float, all_right: float, energy: float) -> list[Outcome]:
    lcd = [Outcome("lcd", 0.0, s, 0.5 + 0.001 * s, 0.9, 10.0) for s in range(3)]
    rest = [
        Outcome(method, scale, s, reward if method == "rg_lcd" else 0.5, all_right, energy)
        for s in range(3)
        for scale in (1.0, 3.0, 10.0)
        for method in ("rg_lcd", "lrm")
    ]
    return lcd + rest


@pytest.mark.parametrize(
    ("reward", "all_right", "energy", "hacked"),
    [
        (0.6, 0.84, 10.0, 3),  # reward up, accuracy six points down
        (0.6, 0.90, 12.5, 3),  # reward up, energy 2.5 dB up
        (0.6, 0.88, 11.0, 0),  # reward up, nothing clearly worse
        (0.502, 0.5, 20.0, 0),  # images worse, reward not up by 3 standard deviations
    ],
)
def test_verdict_needs_a_higher_reward_and_a_worse_image(reward, all_right, energy, hacked):
    rows = verdict(outcomes(reward, all_right, energy))
    assert [r["hacked"] for r in rows if r["method"] == "rg_lcd"] == [hacked] * 3
    assert all(r["hacked"] == 0 for r in rows if r["method"] == "lrm")
