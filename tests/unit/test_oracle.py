"""The oracle's arithmetic, and render-and-match, which learns nothing, on what it must read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgbench.benchtop.oracle import CLASSIFIERS, HEADS, Classifier, Oracle, render_and_match, score_reading
from rgbench.benchtop.scenes import Scenes, sample_scenes, scene_batch


def truth(scenes: Scenes) -> torch.Tensor:
    return torch.stack([scenes.layout if s is None else getattr(scenes, n)[:, s] for n, s, _ in HEADS], 1)


class Fixed(nn.Module):
    """A judge that answers what it is told."""

    def __init__(self, reading: torch.Tensor) -> None:
        super().__init__()
        self.reading = reading

    def forward(self, images):
        return tuple(
            nn.functional.one_hot(self.reading[:, i].clamp(min=0), n).float() for i, (_, _, n) in enumerate(HEADS)
        )


@pytest.mark.parametrize("split", ["test", "heldout"])
def test_render_and_match_reads_clean_scenes(split):
    images, scenes = scene_batch(split, range(48))
    scores = score_reading(render_and_match(images, scenes.count), scenes)
    assert scores["mean"].mean() > 0.99


def test_render_and_match_notices_a_wrong_scene():
    images, scenes = scene_batch("test", range(32))
    shuffled = scenes[torch.arange(32).roll(1)]
    same_count = shuffled.count == scenes.count
    scores = score_reading(render_and_match(images, shuffled.count), shuffled)
    assert scores["all"][same_count].mean() < 0.1


def test_all_and_mean_of_a_reading():
    scenes = sample_scenes("test", range(64))
    reading = truth(scenes)
    right = score_reading(reading, scenes)
    assert (right["all"] == 1).all() and (right["mean"] == 1).all()
    reading[:, 2] = (reading[:, 2] + 1) % 8  # colour of slot 0
    wrong = score_reading(reading, scenes)
    assert (wrong["all"] == 0).all()
    two = scenes.count == 2
    assert torch.allclose(wrong["colour"], torch.where(two, 0.5, 0.0))
    assert torch.allclose(wrong["mean"], torch.where(two, 0.875, 0.75))


def test_majority_outvotes_one_judge_and_three_way_split_is_nobodys():
    images, scenes = scene_batch("test", range(16))
    good, bad, worse = truth(scenes), truth(scenes), truth(scenes)
    bad[:, 1] = (bad[:, 1] + 1) % 6
    oracle = Oracle({"a": Fixed(good), "b": Fixed(good), "c": Fixed(bad)})
    scores = oracle.score(images, scenes)
    assert (scores["all"] == 1).all()
    assert (scores["agreement"] < 1).all()
    worse[:, 1] = (worse[:, 1] + 2) % 6
    split = Oracle({"a": Fixed(good), "b": Fixed(bad), "c": Fixed(worse)}).score(images, scenes)
    assert (split["all"] == 0).all()


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_give_one_logit_per_class(kind):
    logits = Classifier(kind)(torch.rand(2, 3, 64, 64))
    assert [x.shape for x in logits] == [(2, n) for _, _, n in HEADS]


def test_unknown_attribute_is_an_error():
    with pytest.raises(ValueError, match="layout"):
        Scenes.from_dicts([{"layout": "sideways"}])
    with pytest.raises(ValueError, match="colour"):
        Scenes.from_dicts([{"layout": "centre", "shape0": "ring", "colour0": "mauve", "size0": "small"}])
