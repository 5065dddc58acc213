"""Presets: what the full-size ones are, where they are looked for, and what is said when they are not there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.models.presets import PRESETS, HubFiles, Preset, find_preset, readable_size
from tests import sd_folders

FULL_SIZE = ("sd15", "sd21-base", "sd21")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def hub(preset: Preset) -> HubFiles:
    assert isinstance(preset.teacher, HubFiles)
    return preset.teacher


def snapshot(cache: Path, files: HubFiles) -> Path:
    """Where the hub's client puts a revision."""
    return cache / f"models--{files.repo.replace('/', '--')}" / "snapshots" / files.revision


def test_the_full_size_presets():
    settings = {name: (PRESETS[name].resolution, PRESETS[name].prediction_type) for name in FULL_SIZE}
    assert settings == {"sd15": (512, "epsilon"), "sd21-base": (512, "epsilon"), "sd21": (768, "v_prediction")}
    for name in FULL_SIZE:
        files = hub(PRESETS[name])
        assert re.fullmatch(r"[0-9a-f]{40}", files.revision) and "stabilityai" not in files.repo
        assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= {f.split("/")[0] for f in files.files}
    with pytest.raises(UsageError, match="did you mean 'sd21'"):
        find_preset("sd22")


def test_sdxl_is_found_in_either_precision(cache):
    preset, index = PRESETS["sdxl"], {"_class_name": "StableDiffusionXLPipeline"}
    assert (preset.resolution, preset.prediction_type) == (1024, "epsilon")
    folder = snapshot(cache, hub(preset))
    with pytest.raises(UsageError, match=r"unet/diffusion_pytorch_model\.safetensors \(10\.3 GB\).*13\.9 GB in all"):
        preset.teacher_folder()
    for name in hub(preset).files:
        file = folder / (name.replace(".safetensors", ".fp16.safetensors") if "_2/" in name else name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(index))
    assert preset.teacher_folder() == folder
    (folder / "text_encoder_2" / "model.fp16.safetensors").unlink()
    with pytest.raises(UsageError, match=r"hf download stabilityai/\S+ text_encoder_2/model\.safetensors --revision"):
        preset.teacher_folder()


@pytest.mark.parametrize(("name", "gigabytes", "guidance"), [("sd35-medium", "16.3", 4.5), ("flux-dev", "33.7", 3.5)])
def test_flows_are_gated_and_found_in_shards(cache, name, gigabytes, guidance):
    preset, index = PRESETS[name], {"_class_name": "FluxPipeline" if name == "flux-dev" else "StableDiffusion3Pipeline"}
    assert (preset.resolution, preset.prediction_type, preset.teacher_guidance) == (1024, "flow_prediction", guidance)
    assert re.fullmatch(r"[0-9a-f]{40}", hub(preset).revision)
    folder = snapshot(cache, hub(preset))
    with pytest.raises(UsageError, match=rf"{gigabytes} GB in all; accept its licence.*hf auth login; get it with: hf"):
        preset.teacher_folder()
    for file in (folder / file for file in hub(preset).files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(index))
    assert preset.teacher_folder() == folder
    shard = next(folder.glob("*/model-00002-of-00002.safetensors"))
    shard.unlink()
    with pytest.raises(UsageError, match=rf"hf download \S+ {shard.parent.name}/{shard.name} --revision"):
        preset.teacher_folder()


def test_configurations_are_enough_where_no_weights_are_asked_for(cache):
    preset = PRESETS["sdxl"]
    with pytest.raises(UsageError, match="configuration of the teacher: not in the Hugging Face cache") as caught:
        preset.teacher_folder(weights=False)
    assert ".safetensors" not in str(caught.value)
    folder = snapshot(cache, hub(preset))
    for name in shlex.split(str(caught.value).split("get it with: ")[1])[3:-2]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert preset.teacher_folder(weights=False) == folder


@pytest.mark.parametrize("offline", [True, False])
def test_what_is_missing_is_named_with_its_size_and_command(cache, monkeypatch, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    with pytest.raises(UsageError) as caught:
        PRESETS["sd21-base"].teacher_folder()
    message = str(caught.value)
    assert "unet/diffusion_pytorch_model.safetensors (3.46 GB)" in message and "5.16 GB in all" in message
    command = shlex.split(message.split("get it with: ")[1].split(" (HF_HUB_OFFLINE")[0])
    files = hub(PRESETS["sd21-base"])
    assert command[:3] == ["hf", "download", files.repo] and command[-2:] == ["--revision", files.revision]
    assert set(command[3:-2]) == set(files.files)
    assert ("HF_HUB_OFFLINE is on" in message) == offline
    assert not cache.exists(), "nothing was fetched"


def test_a_fetched_teacher_is_found(cache):
    """A real pipeline folder where the hub's client would have put it; in half precision it is found as well."""
    preset = PRESETS["sd15"]
    folder = snapshot(cache, hub(preset))
    sd_folders.save_teacher(folder, "sd15", variant="fp16")
    assert preset.teacher_folder() == folder
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(UsageError, match=r"hf download stable-diffusion-v1-5/stable-diffusion-v1-5 vae/diff\S+ --rev"):
        preset.teacher_folder()


def test_a_reward_is_a_file_of_the_cache(cache):
    preset = PRESETS["sd21"]
    with pytest.raises(UsageError, match=r"HPS_v2\.1_compressed\.pt \(1\.97 GB\).*hf download xswu/HPSv2"):
        preset.reward_folder()
    file = snapshot(cache, preset.reward) / "HPS_v2.1_compressed.pt"  # type: ignore[arg-type]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert preset.reward_folder() == file


def test_nobody_has_published_a_latent_proxy():
    with pytest.raises(UsageError, match="lrm_pretrain model.preset=sd21-base"):
        PRESETS["sd21-base"].latent_proxy_folder()


def test_sizes_are_readable():
    assert [readable_size(n) for n in (3_438_167_540, 573_514, 939)] == ["3.44 GB", "574 kB", "939 bytes"]
