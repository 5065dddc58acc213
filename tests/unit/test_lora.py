"""LoRA files of every layout: diffusers' own result, or a refusal that names the tensor."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from rgbench.core.errors import UsageError
from rgbench.core.io import read_safetensors_metadata
from rgbench.models.lora import DIFFUSERS_FILE, EMBEDDING_FILE, PEFT_CONFIG, PEFT_FILE, adapter_files, merge_lora
from rgbench.models.student import COND_PROJ, Student, load_student
from tests import sd_folders

UNET_LAYERS = ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "ff.net.2"]  # linear, 1×1 and 3×3 convolutions
PARTS = ("unet", "text_encoder")
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd_folders.save_teacher(tmp_path_factory.mktemp("base") / "sd15", "sd15")


@cache
def loaded(base: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    return (
        UNet2DConditionModel.from_pretrained(base / "unet"),
        CLIPTextModel.from_pretrained(base / "text_encoder"),
    )


def networks(base: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    return copy.deepcopy(loaded(base))


def adapters(network: Any, layers: list[str], **options: Any) -> tuple[State, dict[str, Any]]:
    """Random adapters under peft's names without prefix, and their configuration."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 4, "target_modules": layers, "init_lora_weights": False} | options
    network.add_adapter(LoraConfig(**config))
    state = {key: value.clone() for key, value in get_peft_model_state_dict(network).items()}
    return state, network.peft_config["default"].to_dict()


def kohya(state: State, prefix: str, alpha: float | None) -> State:
    out = {}
    for key, value in state.items():
        layer, _, part = key.partition(".lora_")
        stem = prefix + layer.replace(".", "_")
        out[f"{stem}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = value
        out |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    return out


def older(state: State, prefix: str) -> State:
    """Names of diffusers before peft: attention processors, and text encoders with to_q for q_proj."""
    out = {}
    for key, value in state.items():
        layer, _, part = key.partition(".lora_")
        head, _, last = layer.removesuffix(".0").rpartition(".")
        if prefix == "unet.":
            name = f"{head}.processor.{last}_lora"
        else:
            last = {"q_proj": "to_q_lora", "out_proj": "to_out_lora"}[last]
            name = f"text_model.{head}.{last}"
        out[f"{prefix}{name}.{'down' if part.startswith('A') else 'up'}.weight"] = value
    return out


def by_diffusers(base: Path, path: Path) -> tuple[State, State]:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    folder, name = (path.parent, path.name) if path.is_file() else (path, DIFFUSERS_FILE)
    pipeline.load_lora_weights(folder, weight_name=name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict(), pipeline.text_encoder.state_dict()


def by_rgbench(base: Path, path: Path) -> tuple[State, State]:
    unet, text = networks(base)
    merge_lora(path, {"unet": unet, "text_encoder": text})
    return unet.state_dict(), text.state_dict()


def save_diffusers(folder: Path, base: Path, **options: Any) -> Path:
    unet, text = networks(base)
    (of_unet, unet_config), (of_text, text_config) = (
        adapters(unet, UNET_LAYERS, **options),
        adapters(text, TEXT_LAYERS, **options),
    )
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=of_unet,
        text_encoder_lora_layers=of_text,
        unet_lora_adapter_metadata=unet_config if options else None,
        text_encoder_lora_adapter_metadata=text_config if options else None,
    )
    return folder


def save_kohya(folder: Path, base: Path, alpha: float | None) -> Path:
    unet, text = networks(base)
    state = kohya(adapters(unet, UNET_LAYERS)[0], "lora_unet_", alpha)
    state |= kohya(adapters(text, TEXT_LAYERS)[0], "lora_te_text_model_", alpha)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def save_older(folder: Path, base: Path) -> Path:
    unet, text = networks(base)
    state = older(adapters(unet, ["to_q", "to_out.0"])[0], "unet.")
    state |= older(adapters(text, ["q_proj", "out_proj"])[0], "text_encoder.")
    folder.mkdir()
    save_file(state, folder / DIFFUSERS_FILE)
    return folder


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "diffusers": save_diffusers,
    "diffusers, alpha": lambda folder, base: save_diffusers(folder, base, lora_alpha=1),
    "diffusers, rank-stabilised": lambda folder, base: save_diffusers(folder, base, lora_alpha=3, use_rslora=True),
    "diffusers, patterns": lambda folder, base: save_diffusers(
        folder, base, lora_alpha=2, rank_pattern={"to_q": 2, "q_proj": 3}, alpha_pattern={"attn2.to_k": 8, "fc1": 1}
    ),
    "kohya, alpha": lambda folder, base: save_kohya(folder, base, 1.0),
    "kohya": lambda folder, base: save_kohya(folder, base, None),
    "older diffusers": save_older,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_lora_is_diffusers_own(base: Path, tmp_path: Path, layout: str) -> None:
    path = LAYOUTS[layout](tmp_path / "lora", base)
    plain = [network.state_dict() for network in networks(base)]
    for own, theirs, before in zip(by_rgbench(base, path), by_diffusers(base, path), plain, strict=True):
        moved = [key for key in before if not torch.equal(before[key], theirs[key])]
        assert len(moved) >= 4
        for key in before:
            torch.testing.assert_close(own[key], theirs[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 1}, {"lora_alpha": 3, "use_rslora": True}])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_folder_of_peft_is_merged_at_its_own_scale(base: Path, tmp_path: Path, part: str, options: dict) -> None:
    index = ("unet", "text_encoder").index(part)
    config = LoraConfig(
        **{"r": 4, "target_modules": UNET_LAYERS if part == "unet" else TEXT_LAYERS, "init_lora_weights": False}
        | options
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(networks(base)[index], config)
    wrapped.save_pretrained(tmp_path / "peft")
    expected = wrapped.merge_and_unload().state_dict()
    ours = by_rgbench(base, tmp_path / "peft")
    for key, value in ours[index].items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
    other = networks(base)[1 - index].state_dict()
    assert all(torch.equal(value, other[key]) for key, value in ours[1 - index].items())


CHANGES = ["delete", "rename", "add", "reshape", "double"]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An intact file of each of two layouts."""
    root = tmp_path_factory.mktemp("whole")
    save_diffusers(root / "lora", base, lora_alpha=1)
    return {"diffusers": root / "lora" / DIFFUSERS_FILE, "kohya": save_kohya(root, base, 1.0)}


@settings(max_examples=50)
@given(layout=st.sampled_from(["diffusers", "kohya"]), change=st.sampled_from(CHANGES), data=st.data())
def test_every_tensor_counts(
    base: Path,
    whole: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    change: str,
    data: st.DataObject,
) -> None:
    """Without, beside or with another tensor the file is refused; of a doubled tensor the result is another."""
    state, header = load_file(whole[layout]), read_safetensors_metadata(whole[layout])
    name = data.draw(st.sampled_from(sorted(state)))
    file = tmp_path_factory.mktemp("changed") / whole[layout].name
    if change == "delete":
        del state[name]
    elif change == "rename":
        state[name.replace("attn", "atn").replace("layers", "leyers").replace("conv", "cov") + "_"] = state.pop(name)
    elif change == "add":
        state[f"{name}.more"] = torch.zeros(2)
    elif change == "reshape":
        state[name] = torch.zeros(7, 7)
    else:
        state[name] = state[name] * 2
    save_file(state, file, header)
    if change == "double":
        before, after = by_rgbench(base, whole[layout]), by_rgbench(base, file)
        assert any(not torch.equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a)
    else:
        with pytest.raises(UsageError, match=rf"{file.name}: .*'\S*(lora|alpha)"):
            merge_lora(file, dict(zip(PARTS, loaded(base), strict=True)))  # which leaves no trace


@pytest.mark.parametrize("change", ["dora", "loha", "sdxl", "bias"])
def test_other_kinds_are_refused_by_name(base: Path, tmp_path: Path, change: str) -> None:
    file = save_kohya(tmp_path, base, 1.0)
    state = load_file(file)
    down = next(name for name in state if name.endswith(".lora_down.weight"))
    stem = down.removesuffix(".lora_down.weight")
    extra = {
        "dora": f"{stem}.dora_scale",
        "loha": f"{stem}.hada_w1_a",
        "sdxl": "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "bias": f"{stem}.lora_up.bias",
    }[change]
    save_file(state | {extra: torch.ones(4)}, file)
    with pytest.raises(UsageError, match=f"kohya.safetensors: .*{extra}"):
        by_rgbench(base, file)


def test_a_refused_lora_leaves_no_trace(base: Path, tmp_path: Path) -> None:
    file = save_kohya(tmp_path, base, 1.0)
    state = load_file(file)
    last = [name for name in state if name.endswith("lora_up.weight")][-1]
    save_file(state | {last: torch.full_like(state[last], float("nan"))}, file)
    unet, text = networks(base)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(UsageError, match="not finite"):
        merge_lora(file, {"unet": unet, "text_encoder": text})
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "not a plain LoRA"),
        ({"peft_type": "LOHA"}, "not a plain LoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"r": 8}, "rank 8, its tensors have 4"),
        ({"lora_alpha": None}, "gives no lora_alpha"),
        ({"lora_alpha": "4"}, "gives no lora_alpha"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern"),
    ],
)
def test_configurations_that_cannot_be_followed_are_refused(
    base: Path, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    unet, _ = networks(base)
    wrapped = get_peft_model(unet, LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / PEFT_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UsageError, match=said):
        by_rgbench(base, tmp_path)
    file.unlink()
    with pytest.raises(UsageError, match=PEFT_CONFIG):
        by_rgbench(base, tmp_path)


def test_two_scales_are_refused(base: Path, tmp_path: Path) -> None:
    save_diffusers(tmp_path, base, lora_alpha=1)
    file = tmp_path / DIFFUSERS_FILE
    state, header = load_file(file), read_safetensors_metadata(file)
    layers = {name.partition(".lora_")[0] for name in state}
    save_file(state | {f"{layer}.alpha": torch.tensor(2.0) for layer in layers}, file, header)
    with pytest.raises(UsageError, match=r"\.alpha' and its configuration both give a scale"):
        by_rgbench(base, tmp_path)


def test_several_files_and_none_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such LoRA"):
        by_rgbench(base, tmp_path)
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"{DIFFUSERS_FILE}, {PEFT_FILE}"):
        by_rgbench(base, tmp_path)


def test_the_guidance_embedding_beside_the_adapters_is_part_of_the_student(base: Path, tmp_path: Path) -> None:
    save_diffusers(tmp_path, base)
    width = networks(base)[0].time_embedding.linear_1.in_features
    embedding = torch.randn(width, 16)
    save_file({COND_PROJ: embedding}, tmp_path / EMBEDDING_FILE)
    scheduler = {"_class_name": "LCMScheduler", "original_inference_steps": 25, "timestep_scaling": 5.0}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    without = load_student(Student(str(base), lora=tmp_path / DIFFUSERS_FILE), torch.device("cpu"), torch.float32)
    assert torch.equal(without.unet.state_dict()[COND_PROJ], embedding), "named by its file too"
    found = load_student(Student(str(base), lora=tmp_path), torch.device("cpu"), torch.float32)
    assert torch.equal(found.unet.state_dict()[COND_PROJ], embedding) and found.unet.config.time_cond_proj_dim == 16
    assert (found.original_inference_steps, found.timestep_scaling) == (25, 5.0)
    assert adapter_files(tmp_path) == [tmp_path / DIFFUSERS_FILE, tmp_path / EMBEDDING_FILE]
    save_file({COND_PROJ: torch.randn(width + 1, 16)}, tmp_path / EMBEDDING_FILE)
    with pytest.raises(UsageError, match=EMBEDDING_FILE):
        load_student(Student(str(base), lora=tmp_path), torch.device("cpu"), torch.float32)


def test_no_library_speaks_of_it(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        by_rgbench(base, save_kohya(tmp_path, base, 1.0))
    assert not [record for record in caplog.records if record.name.startswith(("diffusers", "peft"))]
