"""Folders as users have them: plain, fp16 and sharded weights, other schedulers, and what is wrong with others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rgbench.core.errors import UsageError
from rgbench.models.folder import check_folder, config_sha256, find_weights, missing_parts, weights_sha256
from rgbench.models.pipeline import load_models, load_network
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
        find_weights(folder / "unet", "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(other.read_bytes())
    assert find_weights(folder / "unet", "unet").variant is None, "the plain file goes before its variants"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_loaded_and_hashed(plain, tmp_path, variant):
    folder = sd_folders.save_teacher(tmp_path / "shards", "sd15", max_shard_size="40KB", variant=variant)
    files = find_weights(folder / "unet", "unet").files
    assert len(files) > 1 and all(f.name.endswith(".safetensors") for f in files)
    assert torch.equal(load(folder).unet.conv_out.weight, load(plain).unet.conv_out.weight)
    before = weights_sha256(folder)
    data = bytearray(files[-1].read_bytes())
    data[-1] ^= 1
    files[-1].write_bytes(data)
    assert weights_sha256(folder) != before, "a file that changed is hashed again"
    files[0].unlink()
    with pytest.raises(UsageError, match=f"{files[0].name}: missing"):
        load(folder)


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    folder = sd_folders.save_teacher(tmp_path / "shards", "sd15", max_shard_size="40KB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    for wrong in ({**names, "conv_in.bias": "../vae/x.safetensors"}, {}, "x"):
        change(index, weight_map=wrong) if wrong != "x" else index.write_text('"x"')
        with pytest.raises(UsageError, match="does not name files beside it"):
            find_weights(folder / "unet", "unet")
    change_back = {"weight_map": names}
    index.write_text(json.dumps(change_back))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="keep the file or the shards"):
        find_weights(folder / "unet", "unet")


WRONG = [
    ("model_index.json", {"_class_name": "KandinskyPipeline"}, "a KandinskyPipeline"),
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
    assert torch.equal(models.schedule, usual.schedule)
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


def test_the_configuration_is_hashed_apart_from_the_weights(plain, tmp_path):
    folder = sd_folders.save_teacher(tmp_path / "same", "sd15")
    same, weights = config_sha256(folder), weights_sha256(folder)
    assert same == config_sha256(plain) == load(folder).config_sha256
    change(folder / "unet" / "config.json", _name_or_path="elsewhere", _diffusers_version="9.9")
    assert config_sha256(folder) == same, "what the library notes does not count"
    seen = {same}
    for name, values in [
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}),
        ("vae/config.json", {"scaling_factor": 0.2}),
        ("unet/config.json", {"norm_eps": 1e-4}),
    ]:
        change(folder / name, **values)
        seen.add(config_sha256(folder))
    for file in sorted((folder / "tokenizer").glob("*")):
        if file.name in ("vocab.json", "merges.txt", "tokenizer.json"):
            file.write_text(file.read_text() + " ")
            seen.add(config_sha256(folder))
    assert len(seen) > 6 and weights_sha256(folder) == weights


COMPONENTS = ["unet", "vae", "text_encoder"]
CHANGES = ["delete", "rename", "add", "reshape", "rescale", "twice"]


@settings(max_examples=60)
@given(component=st.sampled_from(COMPONENTS), how=st.sampled_from(CHANGES), data=st.data())
def test_every_tensor_counts(plain, tmp_path_factory, component: str, how: str, data: st.DataObject) -> None:
    """A network whose files lack, rename or add a tensor is refused by its name; of rescaled ones it is another."""
    folder = tmp_path_factory.mktemp("changed") / component
    shutil.copytree(plain / component, folder)
    (file,) = find_weights(folder, component).files
    state = load_file(file)
    name = data.draw(st.sampled_from(sorted(state)))
    if how == "delete":
        del state[name]
    elif how == "rename":
        state[f"model.{name}"] = state.pop(name)
    elif how == "add":
        state[f"{name}.more"] = torch.zeros(2)
    elif how == "reshape":
        state[name] = torch.zeros(7, 7, 7)
    elif how == "rescale":
        state[name] = state[name] * 3 + 1
    save_file(state, file, {"format": "pt"})
    if how == "rescale":
        loaded = load_network(find_weights(folder, component), torch.float32).state_dict()
        assert sum(torch.equal(value, state[name]) for value in loaded.values() if value.shape == state[name].shape)
        return
    if how == "twice":  # two shards that both hold a tensor
        save_file({name: state[name]}, folder / "second.safetensors", {"format": "pt"})
        file.rename(folder / "first.safetensors")
        shards = {key: "first.safetensors" for key in state} | {f"{name}.": "second.safetensors"}
        index = {"metadata": {}, "weight_map": shards}
        (folder / f"{file.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=str(folder)) as caught:
        load_network(find_weights(folder, component), torch.float32)
    if how in ("delete", "rename", "add", "reshape"):
        assert name.removeprefix("text_model.") in str(caught.value)


def test_constants_of_older_text_encoders_are_no_weights(plain, tmp_path):
    shutil.copytree(plain / "text_encoder", tmp_path / "text_encoder")
    (file,) = find_weights(tmp_path / "text_encoder", "text_encoder").files
    state, length = load_file(file), sd_folders.tiny.CONTEXT
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(length)[None]}, file, {"format": "pt"})
    loaded = load_network(find_weights(tmp_path / "text_encoder", "text_encoder"), torch.float32)
    assert len(loaded.state_dict()) == len(state)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_half_a_download_is_named(plain, tmp_path, component, share):
    folder = tmp_path / "t"
    shutil.copytree(plain, folder)
    (file,) = find_weights(folder / component, component).files
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UsageError, match=f"{component}/{file.name}: not a readable safetensors file"):
        load(folder)


BROKEN = [
    ("unet/config.json", {"block_out_channels": "wide"}),
    ("unet/config.json", {"sample_size": None}),
    ("unet/config.json", {"cross_attention_dim": 17}),
    ("unet/config.json", {"_class_name": "UNet2DModel"}),
    ("vae/config.json", {"_class_name": "AutoencoderTiny"}),
    ("vae/config.json", {"norm_num_groups": 3}),
    ("text_encoder/config.json", {"hidden_size": "x"}),
    ("text_encoder/config.json", {"num_attention_heads": 3}),
    ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
    ("scheduler/scheduler_config.json", {"beta_schedule": "square"}),
]


@pytest.mark.parametrize(("name", "values"), BROKEN)
def test_broken_configurations_are_named(plain, tmp_path, name, values):
    shutil.copytree(plain, tmp_path / "t")
    change(tmp_path / "t" / name, **values)
    with pytest.raises(UsageError, match=f"{tmp_path}/t/{name.split('/')[0]}"):
        load(tmp_path / "t")


def test_a_broken_tokenizer_is_named(plain, tmp_path):
    for name in [file.name for file in (plain / "tokenizer").glob("*.json")]:
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        shutil.copytree(plain, tmp_path / "t")
        file = tmp_path / "t" / "tokenizer" / name
        file.write_text(file.read_text()[:-5])
        with pytest.raises(UsageError, match=f"tokenizer/{name}"):
            load(tmp_path / "t")


def test_no_library_speaks_of_what_is_wrong(plain, tmp_path, capfd):
    shutil.copytree(plain, tmp_path / "t")
    (file,) = find_weights(tmp_path / "t" / "text_encoder", "text_encoder").files
    save_file(dict(list(load_file(file).items())[3:]), file, {"format": "pt"})
    with pytest.raises(UsageError, match="3 tensors missing"):
        load(tmp_path / "t")
    assert capfd.readouterr() == ("", "")
