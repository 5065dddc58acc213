"""Weights of rewards, proxies and students: every tensor of a file goes into the network, or the file is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.io import SUMS, load_tensors, sha256_file
from rgbench.models.student import Student, load_student
from rgbench.rewards.aesthetic import AestheticReward, make_head
from rgbench.rewards.clip import HPSReward, PickScoreReward
from rgbench.rewards.latent_proxy import LatentCLIP
from tests import sd_folders
from tests.clip_folder import save_clip

CPU = torch.device("cpu")
SMALL = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
State = dict[str, Tensor]


class Loaded(NamedTuple):
    """A network's tensors, and what names them in results."""

    state: State
    identity: Any


class Part(NamedTuple):
    """A loader of weights: the file below a folder, and what is loaded of that folder."""

    file: str
    load: Callable[[Path], Loaded]


def hps(path: Path) -> Loaded:
    reward = HPSReward.load(path, antialias=True, device="cpu")
    return Loaded(reward.model.state_dict(), reward.fingerprint())


def pickscore(path: Path) -> Loaded:
    reward = PickScoreReward.load(path, antialias=True, device="cpu")
    return Loaded(reward.model.state_dict(), reward.fingerprint())


def aesthetic(path: Path) -> Loaded:
    head = path / "head.pth"
    reward = AestheticReward.load(
        path.parent / "pickscore", head="linear", head_path=head, antialias=True, device="cpu"
    )
    return Loaded(reward.head.state_dict(), reward.fingerprint())


def proxy(path: Path) -> Loaded:
    (path / SUMS).unlink(missing_ok=True)  # the loader itself, without the list of what was saved
    return Loaded(LatentCLIP.load(path, "cpu").clip.state_dict(), sha256_file(path / "model.safetensors"))


def unet_file(path: Path) -> Loaded:
    models = load_student(Student(str(path.parent / "base"), unet=path / "unet.safetensors"), CPU, torch.float32)
    return Loaded(models.unet.state_dict(), models.weights_sha256)


PARTS = {
    "open_clip": Part("open_clip_model.safetensors", hps),
    "hps": Part("HPS.pt", lambda path: hps(path / "HPS.pt")),
    "pickscore": Part("model.safetensors", pickscore),
    "aesthetic": Part("head.pth", aesthetic),
    "proxy": Part("model.safetensors", proxy),
    "unet": Part("unet.safetensors", unet_file),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    sd_folders.save_reward(root / "open_clip")
    sd_folders.save_proxy(root / "proxy")
    sd_folders.save_teacher(root / "base", "sd15")
    for name in ("hps", "aesthetic", "unet"):
        (root / name).mkdir()
    (root / "small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(root / "small.json")
    torch.save({"state_dict": open_clip.create_model("small", pretrained=None).state_dict()}, root / "hps" / "HPS.pt")
    save_clip(root / "pickscore")
    torch.save(make_head("linear", 12).state_dict(), root / "aesthetic" / "head.pth")
    state = load_file(root / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(state, root / "unet" / "unet.safetensors")
    return root


def save(state: State, file: Path) -> None:
    if file.suffix == ".pt":
        torch.save({"state_dict": state}, file)
    elif file.suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file, {"format": "pt"})


CHANGES = ["delete", "rename", "add", "reshape", "rescale"]


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_counts(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr("rgbench.rewards.clip.ARCHITECTURE", "small")
    for name in ("base", "pickscore"):  # which others are loaded onto
        (tmp_path / name).symlink_to(parts / name)
    place = tmp_path / "own"
    shutil.copytree(parts / part, place)
    file, load = place / PARTS[part].file, PARTS[part].load
    whole, before, rng = load_tensors(file), load(place), random.Random(part)
    for how in CHANGES * 2:
        state, name = dict(whole), rng.choice(sorted(whole))
        if how == "delete":
            del state[name]
        elif how == "rename":
            state[f"{name}_"] = state.pop(name)
        elif how == "add":
            state[f"{name}.more"] = torch.zeros(2)
        elif how == "reshape":
            state[name] = torch.zeros(7, 7, 7)
        else:
            state[name] = state[name] * 3 + 1
        save(state, file)
        if how == "rescale":
            after = load(place)
            assert after.identity != before.identity
            assert [key for key in after.state if not torch.equal(after.state[key], before.state[key])] == [name]
            assert torch.equal(after.state[name], state[name])
        else:
            with pytest.raises(UsageError, match=str(place)) as caught:
                load(place)
            assert name in str(caught.value), (how, str(caught.value))
