"""Held-out judges as metrics: the reward's own scores, per image and group, and weights that are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from rgbench.data.prompts import benchtop_prompts
from rgbench.errors import RgbenchError, UsageError
from rgbench.evaluation.command import Options
from rgbench.metrics.reference import from_uint8
from rgbench.registry import resolve
from rgbench.rewards.aesthetic import AestheticReward, make_head
from rgbench.rewards.clip_score import CLIPScoreReward
from rgbench.rewards.pickscore import PickScoreReward
from tests.tiny_models import BENCHTOP, make_context

NUM = 5


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, Path]:
    """The file layouts that are published, at tiny sizes."""
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2, "projection_dim": 12}
    vision = {**layers, "image_size": 8, "patch_size": 4, "projection_dim": 12}
    folder = tmp_path_factory.mktemp("judges")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    torch.save(make_head("mlp", 12).state_dict(), folder / "head.pth")
    return {
        "clip_score": BENCHTOP.root / "reward",
        "pickscore": folder,
        "aesthetic": folder,
        "aesthetic_head": folder / "head.pth",
    }


def by_hand(name: str, judges: dict[str, Path]):
    options = {"antialias": True, "device": "cpu"}
    if name == "clip_score":
        return CLIPScoreReward.load(judges[name], **options), 100
    if name == "pickscore":
        reward = PickScoreReward.load(judges[name], **options)
        return reward, reward.logit_scale
    return AestheticReward.load(judges[name], head="mlp", head_path=judges["aesthetic_head"], **options), 1


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "aesthetic"])
def test_a_judge_gives_its_own_scores(judges, tmp_path, name):
    context = make_context(benchtop_prompts(NUM), tmp_path, judges=judges)
    images = from_uint8(torch.randint(0, 256, (NUM, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte())
    metric = resolve("metric", name)(context)
    for at in (np.array([3, 1]), np.array([0, 2, 4])):
        metric.update(images[at], [context.prompts.prompts[i] for i in at], at)
    (found,) = metric.finish()
    reward, scale = by_hand(name, judges)
    expected = scale * reward(images, [prompt.text for prompt in context.prompts.prompts]).double().numpy()
    np.testing.assert_allclose(found.rows, expected, rtol=1e-4)
    assert found.value == pytest.approx(expected.mean(), rel=1e-4) and expected.std() > 0
    assert found.quantity.metric.family == "held-out reward" and set(found.extra["groups"]) == {"test", "heldout"}
    assert found.quantity.protocol["reward"]["weights_sha256"] and not found.in_sample
    with pytest.raises(RgbenchError, match="'test/1' is not finite"):
        metric.update(images[1:2] * float("nan"), context.prompts.prompts[1:2], np.array([1]))


def test_a_judge_that_the_student_was_trained_on_is_in_sample(judges, tmp_path):
    reward, _ = by_hand("pickscore", judges)
    trained = ({"fingerprint": reward.fingerprint()},)
    context = make_context(benchtop_prompts(2), tmp_path, judges=judges, trained_rewards=trained)
    metric = resolve("metric", "pickscore")(context)
    metric.update(torch.rand(2, 3, 16, 16), context.prompts.prompts, np.arange(2))
    assert metric.finish()[0].in_sample


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "aesthetic"])
def test_missing_weights_are_named_with_size_and_command(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=f"--judge {name}=PATH: the weights .* GB.*hf download"):
        resolve("metric", name)(make_context(benchtop_prompts(1), tmp_path))


def test_options_survive_the_file_of_a_shard_and_the_command_line():
    options = Options(("a", "b"), ("hps",), judge=("clip_score=x", "pickscore=y z"), hps=Path("h"), save_images=True)
    assert Options.from_json(options.to_json()) == options
    expected = "rgbench eval a b --metric hps --hps h --judge clip_score=x --judge 'pickscore=y z' --save-images"
    assert options.command() == expected
