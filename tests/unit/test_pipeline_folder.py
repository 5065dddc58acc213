"""Folders as users have them: plain, fp16 and sharded weights, other schedulers, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rgbench.core.errors import UsageError
from rgbench.models.folder import check_folder, find_weights, missing_parts, weights_sha256
from rgbench.models.pipeline import load_models
from tests import sd_folders


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return sd_folders.save_teacher(tmp_path_factory.mktemp("plain") / "sd15", "sd15")


def load(folder: Path):
    return load_models(folder, "cpu", torch.float32)


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_both_families_load(plain, tmp_path):
    sd15, sd21 = load(plain), load(sd_folders.save_teacher(tmp_path / "sd21", "sd21", "v_prediction"))
    assert (sd15.prediction_type, sd21.prediction_type) == ("epsilon", "v_prediction")
    for models in (sd15, sd21):
        assert (models.resolution, models.latent_shape, models.scaling_factor) == (64, (4, 8, 8), 0.18215)
        assert models.sampler == "ddim" and not models.ddim["set_alpha_to_one"]
    assert sd15.unet.down_blocks[0].attentions[0].proj_in.__class__ is torch.nn.Conv2d
    assert sd21.unet.down_blocks[0].attentions[0].proj_in.__class__ is torch.nn.Linear


def test_a_variant_is_used_where_it_is_the_only_one(plain, tmp_path):
    folder = sd_folders.save_teacher(tmp_path / "fp16", "sd15", variant="fp16")
    weights = check_folder(folder)
    assert {w.variant for w in weights.values()} == {"fp16"}
    assert weights["unet"].files[0].name == "diffusion_pytorch_model.fp16.safetensors"
    assert torch.equal(load(folder).unet.conv_in.weight, load(plain).unet.conv_in.weight)
    assert missing_parts(folder) == []
    other = folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors"
    other.write_bytes(weights["unet"].files[0].read_bytes())
    with pytest.raises(UsageError, match="several variants"):
        find_weights(folder, "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(other.read_bytes())
    assert find_weights(folder, "unet").variant is None, "the plain file goes before its variants"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_loaded_and_hashed(plain, tmp_path, variant):
    folder = sd_folders.save_teacher(tmp_path / "shards", "sd15", max_shard_size="40KB", variant=variant)
    files = find_weights(folder, "unet").files
    assert len(files) > 1 and all(f.name.endswith(".safetensors") for f in files)
    assert torch.equal(load(folder).unet.conv_out.weight, load(plain).unet.conv_out.weight)
    before = weights_sha256(folder)
    data = bytearray(files[-1].read_bytes())
    data[-1] ^= 1
    files[-1].write_bytes(data)
    assert weights_sha256(folder) != before, "a file that changed is hashed again"
    files[0].unlink()
    with pytest.raises(UsageError, match=f"{files[0].name}: missing; a shard"):
        load(folder)


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    folder = sd_folders.save_teacher(tmp_path / "shards", "sd15", max_shard_size="40KB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    for wrong in ({**names, "conv_in.bias": "../vae/x.safetensors"}, {}, "x"):
        change(index, weight_map=wrong) if wrong != "x" else index.write_text('"x"')
        with pytest.raises(UsageError, match="does not name files beside it"):
            find_weights(folder, "unet")
    change_back = {"weight_map": names}
    index.write_text(json.dumps(change_back))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="keep the file or the shards"):
        find_weights(folder, "unet")


WRONG = [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "a StableDiffusionXLPipeline"),
    ("unet/config.json", {"in_channels": 9}, "in_channels 9"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "conditioned on more than text"),
    ("unet/config.json", {"sample_size": [8, 16]}, "square images"),
    ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no noise schedule"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow'"),
]


def test_other_families_are_refused(tmp_path):
    folder = sd_folders.save_teacher(tmp_path / "other", "sd15")
    for name, values, message in WRONG:
        before = (folder / name).read_text()
        change(folder / name, **values)
        with pytest.raises(UsageError, match=message) as caught:
            load(folder)
        assert str(folder / name) in str(caught.value)
        (folder / name).write_text(before)


def test_another_sampler_lends_its_noise_schedule(plain, tmp_path):
    """Fine-tunes ship with Euler or DPM-Solver; their teachers are sampled with DDIM all the same."""
    folder = sd_folders.save_teacher(tmp_path / "euler", "sd15")
    values = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace", "set_alpha_to_one": True}
    change(folder / "scheduler" / "scheduler_config.json", **values)
    models, usual = load(folder), load(plain)
    assert torch.equal(models.alphas_cumprod, usual.alphas_cumprod)
    assert models.ddim == usual.ddim == {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


def test_what_is_missing_is_listed(tmp_path):
    folder = sd_folders.save_teacher(tmp_path / "part", "sd15")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "config.json").unlink()
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    absent = missing_parts(folder)
    assert absent == ["vae/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
                      "unet/diffusion_pytorch_model.safetensors"]  # fmt: skip
    with pytest.raises(UsageError, match=r"vae/config\.json: missing"):
        load(folder)
