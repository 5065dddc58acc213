"""From a recipe's ``reward:`` to a reward: published weights in the caches, its fields, plug-ins."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import sha256_file
from rgbench.rewards.aesthetic import make_head
from rgbench.rewards.base import CallableReward
from rgbench.rewards.config import PUBLISHED, HubWeights, RewardConfig
from rgbench.rewards.load import load_reward
from tests.clip_folder import save_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def empty_caches(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


MISSING = [
    (
        {"kind": "hps", "version": "2.1"},
        r"hps 2\.1 .*HPS_v2\.1_compressed\.pt; about 2 GB.*hf download xswu/HPSv2 HPS_v2\.1_compressed\.pt",
    ),
    ({"kind": "hps", "version": "2.0"}, r"HPS_v2_compressed\.pt"),
    ({"kind": "clip_score"}, r"hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K .*open_clip_model\.safetensors"),
    ({"kind": "pickscore"}, r"about 4 GB.*hf download yuvalkirstain/PickScore_v1 config\.json model\.safetensors"),
    ({"kind": "aesthetic", "head": "mlp"}, r"hf download openai/clip-vit-large-patch14"),
]


@pytest.mark.parametrize(("section", "message"), MISSING)
def test_missing_weights_name_the_command_that_gets_them(empty_caches, section, message):
    settings = TypeAdapter(RewardConfig).validate_python({"antialias": True, **section})
    with pytest.raises(UsageError, match=message):
        load_reward(settings, device="cpu")


def test_published_weights_are_found_in_the_caches(empty_caches, clip_folder):
    """A hub cache as huggingface_hub lays it out, and a head beside it."""
    weights = PUBLISHED["aesthetic"]
    repo = empty_caches / "hub" / "models--openai--clip-vit-large-patch14"
    shutil.copytree(clip_folder, repo / "snapshots" / weights.revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")  # what the hub holds now may be other weights
    shutil.copytree(clip_folder, repo / "snapshots" / "abc")
    section = {"kind": "aesthetic", "head": "linear", "antialias": True}
    settings = TypeAdapter(RewardConfig).validate_python(section)
    assert weights.find() == repo / "snapshots" / weights.revision and weights.revision in weights.command()
    with pytest.raises(
        UsageError, match=r"reward\.head_path: .*curl --fail --location .*weights/sa_0_4_vit_l_14_linear\.pth "
    ):
        load_reward(settings, device="cpu")
    head = empty_caches / "rgbench" / "weights" / "sa_0_4_vit_l_14_linear.pth"
    head.parent.mkdir(parents=True)
    torch.save(make_head("linear", 12).state_dict(), head)
    assert load_reward(settings, device="cpu")(torch.rand(1, 3, 8, 8), [""]).shape == (1,)


def test_every_published_weight_is_one_revision():
    """A branch may hold other weights under the same name tomorrow."""
    for weights in PUBLISHED.values():
        pinned = weights.revision if isinstance(weights, HubWeights) else weights.url
        assert re.search(r"(^|/raw/)[0-9a-f]{40}(/|$)", pinned), weights


def test_another_file_in_the_place_of_a_published_one_is_refused(empty_caches):
    weights = PUBLISHED["aesthetic mlp head"]
    assert weights.find() is None
    weights.path.parent.mkdir(parents=True)
    weights.path.write_bytes(b"<html>moved</html>")
    with pytest.raises(
        UsageError, match=rf"not the published file \(sha256 .*{weights.sha256}.*curl --fail --location"
    ):
        weights.find()
    own = replace(weights, sha256=sha256_file(weights.path))
    assert own.find() == weights.path and replace(weights, sha256=None).find() == weights.path


def test_a_recipes_fields_reach_the_reward(clip_folder, tmp_path):
    common = {"kind": "pickscore", "path": str(clip_folder), "antialias": False}
    adapter = TypeAdapter(RewardConfig)
    plain = load_reward(adapter.validate_python(common), device="cpu")
    assert not plain.antialias and plain.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    assert load_reward(adapter.validate_python(common), device="cpu", dtype=torch.float64).model.dtype == torch.float64
    viewed = load_reward(adapter.validate_python({**common, "blur_sigma": 1.5, "random_crop": 0.5}), device="cpu")
    assert (viewed.blur_sigma, viewed.random_crop, viewed.logit_scale) == (1.5, 0.5, plain.logit_scale)
    terms = [{**common, "scale": 3.0}, {**common, "antialias": True, "random_crop": 0.9}]
    total = {"kind": "sum", "terms": terms, "standardise": "none", "balance": "gradient"}
    both = load_reward(adapter.validate_python(total), device="cpu")
    assert (both.weights, both.standardise, both.balance) == ([3.0, 1.0], False, True)
    assert both.random_crop and [f["weight"] for f in both.fingerprints()] == [3.0, 1.0]


class Warmth:
    """A plug-in as an expert writes it."""

    name, differentiable = "warmth", True

    def __init__(self, size: int) -> None:
        self.size = size

    @classmethod
    def load(cls, path, *, antialias, device, dtype, size=28):
        return cls(size)

    def fingerprint(self) -> dict:
        return {"name": self.name, "size": self.size}

    def __call__(self, images, prompts):
        return images[:, 0].mean((1, 2))


def brightness(images, prompts):
    return [float(image.mean()) for image in images]


def test_plug_ins(monkeypatch):
    found = {
        "warmth": Warmth,
        "brightness": brightness,
        "broken": type("Broken", (), {"load": lambda path, **_: 3}),
    }
    monkeypatch.setattr("rgbench.rewards.config.names", lambda table: [*found, "hps"])
    monkeypatch.setattr("rgbench.rewards.load.resolve", lambda table, name: found[name])

    def load(**section):
        return load_reward(TypeAdapter(RewardConfig).validate_python({"antialias": True, **section}), device="cpu")

    warm = load(kind="warmth", options={"size": 14}, blur_sigma=1.0)
    assert warm.fingerprint() == {"name": "warmth", "size": 14, "blur_sigma": 1.0}
    with pytest.raises(UsageError, match=r"reward\.options: warmth does not take them: .*'sise'"):
        load(kind="warmth", options={"sise": 14})
    assert isinstance(load(kind="brightness"), CallableReward)
    with pytest.raises(UsageError, match="it takes no path or options"):
        load(kind="brightness", path="weights.pt")
    with pytest.raises(RgbenchError, match="the plug-in's load gave int, which lacks name"):
        load(kind="broken")
