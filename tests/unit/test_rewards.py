"""The HPS reward: preprocessing, contract, gradients, fingerprints, loading."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from rgbench.core.errors import UsageError
from rgbench.models.presets import WEIGHTS
from rgbench.rewards.base import fingerprint_id
from rgbench.rewards.clip import CLIP_MEAN, CLIP_STD, HPSReward, hps_preprocess
from rgbench.rewards.latent_proxy import LatentCLIP
from tests.parity import tiny

BENCHTOP_REWARD = WEIGHTS / "reward"


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("antialias", [False, True])
def test_preprocessing_pads_what_it_need_not_resize(antialias):
    out = hps_preprocess(pixels(2, 3, 28, 15), 28, antialias)
    assert out.shape == (2, 3, 28, 28)
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)  # zero before, not after, the normalisation
    assert torch.allclose(out[0, :, 3, 0], black) and torch.allclose(out[0, :, 3, -1], black)
    assert [bool(torch.allclose(out[0, :, 3, column], black)) for column in (5, 6, 20, 21)] == [
        True,
        False,
        False,
        True,
    ]


def test_bicubic_overshoot_is_not_clamped():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1.0
    out = (
        hps_preprocess(image, 28, False) * torch.tensor(CLIP_STD)[:, None, None]
        + torch.tensor(CLIP_MEAN)[:, None, None]
    )
    assert out.max() > 1.01 and out.min() < -0.01


def test_antialiasing_removes_what_the_model_cannot_see():
    """A pattern above the Nyquist limit of the target aliases without the filter."""
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    spread = {aa: float(hps_preprocess(stripes, 28, aa)[..., 4:-4].std(dim=-1).mean()) for aa in (False, True)}
    assert spread[False] > 5 * spread[True]


def test_the_reward_contract():
    reward = tiny.expert()
    images = pixels(4, 3, 16, 16)
    scores = reward(images, tiny.PROMPTS[:4])
    assert scores.shape == (4,) and scores.abs().max() <= 1
    assert torch.allclose(reward(images[1:2], tiny.PROMPTS[1:2]), scores[1:2], atol=1e-6)
    assert not torch.allclose(reward(images, tiny.PROMPTS[1:5]), scores, atol=1e-3), "prompts have no effect"
    assert reward.differentiable and reward.name == "hps"


def test_no_gradient_reaches_the_reward_or_its_texts():
    reward = tiny.expert()
    images = pixels(2, 3, 16, 16).requires_grad_()
    reward(images, tiny.PROMPTS[:2]).sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0
    assert all(p.grad is None for p in reward.model.parameters())
    assert not reward.text_features(tiny.PROMPTS).requires_grad


def test_text_features_are_encoded_once_per_distinct_prompt():
    reward = tiny.expert()
    lengths = []
    reward.model.token_embedding.register_forward_hook(lambda module, inputs, output: lengths.append(len(inputs[0])))
    features = reward.text_features(["a", "b", "a"] * 2)
    assert torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])
    assert torch.equal(reward.text_features(["a", "b"]), features[:2])
    assert lengths == [2]
    reward.text_features(["b", "a"])
    assert lengths == [2, 2]


def test_every_field_that_changes_scores_changes_the_fingerprint():
    prints = [
        tiny.expert().fingerprint(),
        tiny.expert(antialias=False).fingerprint(),
        tiny.expert(seed=3).fingerprint(),
    ]
    prints.append(tiny.expert(dtype=torch.float64).fingerprint())
    ids = [fingerprint_id(fingerprint) for fingerprint in prints]
    assert len(set(ids)) == 4 and all(len(name) == 8 for name in ids)
    assert fingerprint_id(dict(reversed(prints[0].items()))) == ids[0]
    keys = {"weights_sha256", "kernel", "antialias", "pad", "dtype", "token_limit", "mean", "std", "size"}
    assert keys <= prints[0].keys()
    assert json.loads(json.dumps(prints[0])) == prints[0]


def test_the_shipped_reward_loads_as_open_clip_does():
    reward = HPSReward.load(BENCHTOP_REWARD, antialias=True, device="cpu")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{BENCHTOP_REWARD}")
    images = pixels(2, 3, 64, 64)
    features = model.encode_image(hps_preprocess(images, 28, True), normalize=True)
    texts = model.encode_text(reward.tokenizer(tiny.PROMPTS[:2]), normalize=True)
    assert torch.allclose(reward(images, tiny.PROMPTS[:2]), (features * texts).sum(-1), atol=1e-6)
    assert reward.logit_scale == pytest.approx(model.logit_scale.exp().item())


@pytest.fixture
def small_architecture(monkeypatch, tmp_path):
    """A small model registered with open_clip under a name of its own, in place of ViT-H-14."""
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    (tmp_path / "rgbench-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "rgbench-small.json")
    monkeypatch.setattr("rgbench.rewards.clip.ARCHITECTURE", "rgbench-small")
    return open_clip.create_model("rgbench-small", pretrained=None)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_checkpoint_file(small_architecture, tmp_path, wrapped):
    state = small_architecture.state_dict()
    file = tmp_path / "HPS.pt"
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, file)
    reward = HPSReward.load(file, antialias=False, device="cpu")
    assert all(torch.equal(value, state[name]) for name, value in reward.model.state_dict().items())
    assert reward(pixels(2, 3, 16, 16), ["a", "b"]).shape == (2,)
    assert reward.fingerprint()["token_limit"] == 77
    save_file(state, tmp_path / "HPS.safetensors")
    again = HPSReward.load(tmp_path / "HPS.safetensors", antialias=False, device="cpu")
    assert torch.equal(again(pixels(2, 3, 16, 16), ["a", "b"]), reward(pixels(2, 3, 16, 16), ["a", "b"]))


def test_unusable_weights_are_explained(small_architecture, tmp_path):
    with pytest.raises(UsageError, match="no such reward"):
        HPSReward.load(tmp_path / "nothing.pt", antialias=True, device="cpu")
    with pytest.raises(UsageError, match=r"open_clip_config\.json: missing"):
        HPSReward.load(tmp_path, antialias=True, device="cpu")
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"tensors are not those of rgbench-small"):
        HPSReward.load(tmp_path / "other.pt", antialias=True, device="cpu")
    torch.save({"state_dict": {"visual.proj": object()}}, tmp_path / "hostile.pt")
    with pytest.raises(UsageError, match="refused"):
        HPSReward.load(tmp_path / "hostile.pt", antialias=True, device="cpu")


def test_hps_2_has_the_tensors_that_vit_h_14_has():
    with torch.device("meta"):
        model = open_clip.create_model("ViT-H-14", pretrained=None, device="meta")
    assert len(model.state_dict()) == 686
    assert sum(p.numel() for p in model.parameters()) == 986_109_441


CODE = """
import pathlib
pathlib.Path(__file__).with_name("executed").touch()
from transformers import CLIPTokenizer
class OwnTokenizer(CLIPTokenizer):
    pass
"""
VISION = {"image_size": 8, "patch_size": 2, "layers": 1, "width": 8, "head_width": 8}
HOSTILE = {
    "trust_remote_code": ({"tokenizer_kwargs": {"trust_remote_code": True}}, {}),
    "auto_map": ({}, {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer"] * 2}}),
    "hf_model_name": ({"hf_model_name": "someone/text-tower"}, {}),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_folder_that_names_code_is_refused(tmp_path, key):
    """As reward, as latent proxy, and as the CLIP that a proxy starts from; nothing is run or asked on stdin."""
    text, tokenizer = HOSTILE[key]
    loads = {
        "reward": lambda folder: HPSReward.load(folder, antialias=True, device="cpu"),
        "latent_proxy": lambda folder: LatentCLIP.load(folder, "cpu"),
        "clip": lambda folder: LatentCLIP.from_clip(folder, VISION, latent_channels=4, latent_scale=1.0),
    }
    for part, load in loads.items():
        folder = tmp_path / part
        shutil.copytree(WEIGHTS / part, folder)
        (folder / "rgbench.sha256").unlink(missing_ok=True)  # a hostile folder is sealed as it is, or not at all
        (folder / "own.py").write_text(CODE)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"] |= text
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        if part == "latent_proxy":
            own = json.loads((folder / "config.json").read_text())
            own["text_cfg"] |= text
            (folder / "config.json").write_text(json.dumps(own))
        own = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(own | tokenizer))
        with pytest.raises(UsageError, match=rf"{part}/\w+\.json: .*{key}"):
            load(folder)
        assert not (folder / "executed").exists()
