"""Simulated preferences: wrong attributes, degradations, choices."""

from __future__ import annotations

import pytest
import torch

from rgbench.benchtop.preferences import TRAINED_DEGRADATIONS, PreferenceConfig, choose, utility
from rgbench.benchtop.scenes import sample_scenes, scene_batch
from tools.benchtop.clip import corrupt, share_right
from tools.benchtop.degradations import HELDOUT_DEGRADATIONS, degrade


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_wrong", [0, 1, 2, 3])
def test_corrupt_changes_exactly_so_many_attributes(num_wrong):
    scenes = sample_scenes("train", range(400))
    wrong = corrupt(scenes, torch.full((400,), num_wrong), generator())
    changed = ((1 - share_right(wrong, scenes)) * (1 + 3 * scenes.count)).round()
    assert (changed == num_wrong).all()
    assert (wrong.count == scenes.count).all()


def test_corrupt_makes_no_heldout_combination_and_keeps_given_ones():
    scenes = sample_scenes("train", range(2000))
    assert not corrupt(scenes, torch.full((2000,), 3), generator()).heldout().any()
    held = sample_scenes("heldout", range(50))
    assert corrupt(held, torch.zeros(50, dtype=torch.long), generator()).heldout().all()


@pytest.mark.parametrize("kind", TRAINED_DEGRADATIONS + HELDOUT_DEGRADATIONS)
def test_degradation_grows_with_strength_and_zero_changes_nothing(kind):
    images, _ = scene_batch("train", range(8))
    distances = []
    for strength in (0.0, 0.3, 1.0):
        out = degrade(images, torch.full((8,), strength), (kind,), generator())
        assert out.min() >= 0 and out.max() <= 1
        distances.append(float((out - images).abs().mean()))
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_choices_follow_bradley_terry_with_flips():
    config = PreferenceConfig(sharpness=4.0, flip_rate=0.1)
    difference = torch.full((40_000,), 0.25)
    share = float(choose(difference, config, generator()).float().mean())
    p = float(torch.sigmoid(torch.tensor(1.0)))
    assert share == pytest.approx(p * 0.9 + (1 - p) * 0.1, abs=0.01)


def test_utility_orders_right_above_wrong_and_clean_above_degraded():
    config = PreferenceConfig()
    right, degradation = torch.tensor([1.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    u = utility(right, degradation, config)
    assert u[0] > u[1] and u[0] > u[2]
    assert u[0] - u[2] == pytest.approx(config.degradation_weight)
