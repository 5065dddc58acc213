"""The web: pure in the index, degraded and captioned wrong as often as its parameters say, true elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rgbench.benchtop.preferences import TRAINED_DEGRADATIONS
from rgbench.benchtop.scenes import captions, render, scene_batch
from rgbench.benchtop.web import WEB, WebConfig, gaussian, training_batch, web_images, web_scenes, web_strength
from rgbench.data.batches import Batch
from rgbench.data.config import ScenesData
from rgbench.data.sources import open_source
from tools.benchtop.clip import share_right


def test_pictures_and_captions_are_pure_in_the_index():
    images, shown, texts = training_batch("web", range(48))
    again, shown_again, texts_again = training_batch("web", [40, 3])
    assert torch.equal(again, images[[40, 3]]) and texts_again == [texts[40], texts[3]]
    assert torch.equal(shown_again.colour, shown.colour[[40, 3]])
    assert images.min() >= 0 and images.max() <= 1


def test_captions_are_wrong_and_pictures_degraded_as_often_as_it_says():
    num = 6000
    shown, described = web_scenes(range(num))
    wrong = share_right(shown, described) < 1
    error = 3 * np.sqrt(0.25 / num)
    assert float(wrong.float().mean()) == pytest.approx(WEB.miscaptioned, abs=error)
    kind, strength = web_strength(range(num))
    degraded = strength > 0
    assert float(degraded.float().mean()) == pytest.approx(WEB.degraded, abs=error)
    assert strength[degraded].min() >= WEB.strength[0] and strength.max() <= WEB.strength[1]
    assert (kind * len(TRAINED_DEGRADATIONS)).long().unique().tolist() == list(range(len(TRAINED_DEGRADATIONS)))
    attributes = 1 + 3 * shown.count
    missed = ((1 - share_right(shown, described)) * attributes).round()
    assert missed.max() == WEB.max_wrong and (missed[wrong] >= 1).all()


def test_it_never_shows_nor_describes_a_held_out_combination():
    shown, described = web_scenes(range(3000))
    assert not shown.heldout().any() and not described.heldout().any()
    assert torch.equal(shown.count, described.count)


def test_without_faults_it_is_clean_and_true():
    clean = WebConfig(degraded=0, miscaptioned=0)
    shown, described = web_scenes(range(16), clean)
    assert torch.equal(web_images(shown, range(16), clean), render(shown, "web", range(16)))
    assert captions(shown, "web", range(16)) == captions(described, "web", range(16))


def test_its_noise_is_normal_and_its_own_for_each_index():
    drawn = gaussian(1, np.arange(4), 20_000)
    assert drawn.mean(1).abs().max() < 0.03 and (drawn.std(1) - 1).abs().max() < 0.03
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.03


def test_other_splits_are_clean_and_true():
    images, shown, texts = training_batch("train", range(8))
    expected, scenes = scene_batch("train", range(8))
    assert torch.equal(images, expected) and texts == captions(scenes, "train", range(8))
    assert torch.equal(shown.layout, scenes.layout)


def test_a_recipe_trains_from_it():
    source = open_source(ScenesData(kind="scenes", split="web"))
    batch = source.load([7, 1])
    assert isinstance(batch, Batch) and batch.ids == ["web/7", "web/1"]
    assert source.fingerprint() != open_source(ScenesData(kind="scenes", split="train")).fingerprint()
