"""Held-out rewards as metrics: the reward's own scores, per image and group, and weights that are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.registry import resolve
from rgbench.data.prompts import benchtop_prompts
from rgbench.metrics.reference import from_uint8
from rgbench.metrics.rewards import check_judges_asked, find_metric, parse_judges
from rgbench.metrics.values import Family, metric_info
from rgbench.rewards.aesthetic import AestheticReward, make_head
from rgbench.rewards.clip import CLIPScoreReward, HPSReward, PickScoreReward
from rgbench.rewards.remote import ProcessReward
from tests.process_workers import CHECKSUM, scorer
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
def test_a_metric_gives_the_rewards_own_scores(judges, tmp_path, name):
    context = make_context(benchtop_prompts(NUM), tmp_path, judges=judges)
    images = from_uint8(torch.randint(0, 256, (NUM, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte())
    metric = resolve("metric", name)(context)
    for at in (np.array([3, 1]), np.array([0, 2, 4])):
        metric.update(images[at], [context.prompts.prompts[i] for i in at], at)
    (found,) = metric.compute()
    reward, scale = by_hand(name, judges)
    expected = scale * reward(images, [prompt.text for prompt in context.prompts.prompts]).double().numpy()
    np.testing.assert_allclose(found.rows, expected, rtol=1e-4)
    assert found.value == pytest.approx(expected.mean(), rel=1e-4) and expected.std() > 0
    assert metric_info(found.metric).family is Family.HELD_OUT and set(found.extra["groups"]) == {"test", "heldout"}
    assert found.protocol.fields["reward"]["weights_sha256"] and not found.in_sample
    with pytest.raises(RgbenchError, match="'test/1' is not finite"):
        metric.update(images[1:2] * float("nan"), context.prompts.prompts[1:2], np.array([1]))


def test_a_reward_that_the_student_was_trained_on_is_in_sample(judges, tmp_path):
    reward, _ = by_hand("pickscore", judges)
    trained = ({"fingerprint": reward.fingerprint()},)
    context = make_context(benchtop_prompts(2), tmp_path, judges=judges, trained_rewards=trained)
    metric = resolve("metric", "pickscore")(context)
    metric.update(torch.rand(2, 3, 16, 16), context.prompts.prompts, np.arange(2))
    assert metric.compute()[0].in_sample


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "aesthetic"])
def test_missing_weights_are_named_with_size_and_command(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=f"--judge {name}=PATH: the weights .* GB.*hf download"):
        resolve("metric", name)(make_context(benchtop_prompts(1), tmp_path))


def judge_file(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def measure(name: str, prompts: int, folder: Path, given: list[str], **fields):
    judges = parse_judges(given)
    context = make_context(benchtop_prompts(prompts), folder, judges=judges, **fields)
    metric = find_metric(name, judges)(context)
    images = from_uint8(torch.randint(0, 256, (prompts, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte())
    metric.update(images, context.prompts.prompts, np.arange(prompts))
    return images, [prompt.text for prompt in context.prompts.prompts], metric.compute()[0]


def test_any_reward_is_a_metric_under_a_name_of_ones_own(tmp_path):
    file = judge_file(tmp_path, f"kind: hps\npath: {BENCHTOP.root / 'reward'}\nantialias: false\n")
    images, texts, found = measure("blurry", 3, tmp_path, [f"blurry={file}"])
    reward = HPSReward.load(BENCHTOP.root / "reward", antialias=False, device="cpu")
    np.testing.assert_array_equal(found.rows, reward(images, texts).double().numpy())
    assert found.metric == "blurry" and not found.in_sample
    kind = find_metric("blurry", {"blurry": file})
    (info,) = kind.infos
    assert (info.name, info.label, info.family) == ("blurry", "blurry", Family.HELD_OUT) and kind.needs == ("blurry",)
    assert metric_info("blurry", {"blurry": info}) is info, "as a result brings it along"


def test_a_process_is_a_metric(tmp_path, monkeypatch):
    """Its score is that of the 8-bit image, whatever the batch; in-sample where the student was trained on it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    worker = scorer(tmp_path, CHECKSUM.format(takes="uint8"))
    section = f"kind: process\npython: {sys.executable}\nworker: {worker}\n"
    file = judge_file(tmp_path, section, "ir.yaml")
    images, texts, found = measure("imagereward", 3, tmp_path, [f"imagereward={file}"])
    reward = ProcessReward.load(sys.executable, worker)
    one_by_one = [float(reward(images[i : i + 1].double(), texts[i : i + 1])) for i in range(3)]
    np.testing.assert_array_equal(found.rows, np.float32(one_by_one))
    assert (metric_info(found.metric).label, metric_info(found.metric).decimals) == ("ImageReward", 3)
    assert found.protocol.fields["reward"] == reward.fingerprint() and not found.in_sample
    for trained, expected in ((reward.fingerprint(), True), (reward.fingerprint() | {"code_sha256": "other"}, False)):
        rewards = ({"fingerprint": trained},)
        again = measure("imagereward", 3, tmp_path, [f"imagereward={file}"], trained_rewards=rewards)[2]
        assert again.in_sample is expected
    judge_file(tmp_path, section + "blur_sigma: 1.0\n", "ir.yaml")
    viewed = measure("imagereward", 3, tmp_path, [f"imagereward={file}"])[2]
    assert viewed.protocol.fields["reward"]["blur_sigma"] == 1.0 and not np.array_equal(viewed.rows, found.rows)


WRONG_FILES = [
    ("kind: process\npython: p\n", "mine.yaml:.*worker: missing"),
    ("kind: sum\nterms: []\n", "a sum cannot be a term of a sum|mine.yaml"),
    ("kind: hps\nantialias: true\nscale: 2\n", "mine.yaml:.*scale: unknown key"),
    (
        "kind: process\npython: /nowhere/python\nworker: hpsv3\n",
        "mine.yaml: reward.python /nowhere/python: cannot be st",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_a_rewards_file_that_is_wrong_is_explained(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=message):
        measure("mine", 1, tmp_path, [f"mine={judge_file(tmp_path, text)}"])


@pytest.mark.parametrize("name", ["imagereward", "hpsv3", "vqascore"])
def test_a_reward_in_another_environment_says_how_it_is_named(tmp_path, name):
    with pytest.raises(UsageError, match=f"--judge {name}=FILE.yaml, with kind: process, python: .* worker: {name}"):
        resolve("metric", name)(make_context(benchtop_prompts(1), tmp_path))


def test_judges_are_parsed():
    given = ["clip_score=a", "aesthetic_head=b", "mine=c d.yaml", "imagereward=e.yml"]
    assert {name: str(path) for name, path in parse_judges(given).items()} == dict(t.split("=") for t in given)
    for text in ("mine=x.pt", "clip_scor=x", "mine", "mine=", "Mine=x.yaml", "a-b=x.yaml"):
        with pytest.raises(UsageError, match="expected NAME=PATH, or a name of your own and a .yaml file"):
            parse_judges([text])
    for name in ("fid", "spectrum"):
        with pytest.raises(UsageError, match="is a metric of another kind"):
            parse_judges([f"{name}=x.yaml"])
    with pytest.raises(UsageError, match="--judge mine=x.yaml: is not asked for; add mine to --metric"):
        check_judges_asked(parse_judges(["clip_score=a", "mine=x.yaml"]), ["hps"])
    check_judges_asked(parse_judges(["clip_score=a", "mine=x.yaml"]), ["mine"])
    with pytest.raises(UsageError, match="unknown metric 'mine'"):
        find_metric("mine", {})
