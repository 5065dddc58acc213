"""Students that are published as a UNet or as a LoRA alone, put on the base model that they were trained from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors import SafetensorError
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.files import load_pickled_state_dict, load_safetensors, sha256_file
from rgbench.models import DiffusionModels, load_models

ORIGINAL_STEPS = 50  # N of LCM's training grid, and s of its boundary condition: LCMScheduler's defaults
TIMESTEP_SCALING = 10.0
COND_PROJ = "time_embedding.cond_proj.weight"


@dataclass(frozen=True)
class Student:
    """A part that replaces or changes the base model's UNet.

    Attributes:
        base: a preset, or a pipeline folder.
        unet: a UNet folder in diffusers' layout, or a file of its tensors; None where it is a LoRA.
        lora: a LoRA file of diffusers' or Kohya's layout, or its folder; None where it is a whole UNet.
    """

    base: str
    unet: Path | None = None
    lora: Path | None = None

    @property
    def path(self) -> Path:
        """Of the part."""
        path = self.unet or self.lora
        assert path is not None
        return path


def load_student(student: Student, device: torch.device, dtype: torch.dtype) -> DiffusionModels:
    """The base model with the student's weights, sampled as an LCM.

    A whole UNet is sampled as an LCM where it has a guidance embedding, and with the base's sampler where it has none;
    a LoRA always as an LCM.

    Args:
        student: base and part.
        device: where to put the weights.
        dtype: one floating type for all networks.

    Raises:
        UsageError: a missing file, or weights that do not fit the base model; names the first that differ.
    """
    models = load_models(student.base, device, dtype)
    if student.unet is not None:
        unet = _whole_unet(student.unet, models.unet)
        lcm = unet.config.time_cond_proj_dim is not None
    else:
        unet, lcm = _with_lora(student.path, models.unet), True
    unet.requires_grad_(False).eval()
    torch.nn.Module.to(unet, device, dtype)
    told = f"{models.weights_sha256} {_sha256(student.path)}"
    models = replace(models, unet=unet, weights_sha256=hashlib.sha256(told.encode()).hexdigest(), path=student.path)
    return models.with_student(unet, ORIGINAL_STEPS, TIMESTEP_SCALING) if lcm else models


def sampled_as(models: DiffusionModels, sampler: str) -> DiffusionModels:
    """The same networks under another sampler than their folder names.

    Args:
        models: the model.
        sampler: "ddim" or "lcm".

    Raises:
        UsageError: DDIM for a student with a guidance embedding, which predicts the end of the path alone.
    """
    if sampler == models.sampler:
        return models
    if sampler == "lcm":
        return models.with_student(models.unet, ORIGINAL_STEPS, TIMESTEP_SCALING)
    if models.unet.config.time_cond_proj_dim is not None:
        raise UsageError(f"{models.path}: its guidance embedding says that it is an LCM; leave out --sampler ddim")
    return replace(models, sampler="ddim", original_inference_steps=None)


def _whole_unet(path: Path, base: UNet2DConditionModel) -> UNet2DConditionModel:
    if path.is_dir() and (path / "unet").is_dir():
        path = path / "unet"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{path}: no config.json; give a UNet folder in diffusers' layout or a weight file")
        try:
            unet = UNet2DConditionModel.from_pretrained(path, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, SafetensorError) as error:
            first = str(error).strip().split("\n", 1)[0]
            raise UsageError(f"{path}: not a UNet of diffusers with safetensors weights ({first})") from error
        _check_fit(path, {key: tuple(t.shape) for key, t in unet.state_dict().items()}, base)
        return unet
    state = _read_tensors(path)
    dim = state[COND_PROJ].shape[1] if COND_PROJ in state else None
    unet = UNet2DConditionModel.from_config(dict(base.config), time_cond_proj_dim=dim)
    _check_fit(path, {key: tuple(tensor.shape) for key, tensor in state.items()}, base)
    unet.load_state_dict(state)
    return unet


def _check_fit(path: Path, found: dict[str, tuple[int, ...]], base: UNet2DConditionModel) -> None:
    """A UNet that is not the base's but for the guidance embedding was trained from another model."""
    own = {key: tuple(tensor.shape) for key, tensor in base.state_dict().items()}
    other = sorted(key for key in found.keys() | own.keys() if found.get(key) != own.get(key) and key != COND_PROJ)
    if other:
        key = other[0]
        raise UsageError(
            f"{path}: {len(other)} of {len(own)} tensors are not the base model's: {key!r} is "
            f"{found.get(key, 'missing')}, the base has {own.get(key, 'none')}; name the base it was trained from"
        )


def _with_lora(path: Path, unet: UNet2DConditionModel) -> UNet2DConditionModel:
    if not path.exists():
        raise UsageError(f"{path}: no such LoRA; give a .safetensors file or its folder")
    folder, name = (path, None) if path.is_dir() else (path.parent, path.name)
    try:
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(folder), weight_name=name, use_safetensors=True, local_files_only=True, unet_config=unet.config
        )
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise UsageError(f"{path}: not a LoRA that fits the base model ({first})") from error
    if not getattr(unet, "peft_config", None):
        raise UsageError(f"{path}: holds no LoRA of a UNet (no tensor named unet.…)")
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"{path}: no such UNet; give a folder in diffusers' layout or a weight file")
    state = load_safetensors(path) if path.suffix == ".safetensors" else load_pickled_state_dict(path)
    return {key.removeprefix("unet."): tensor for key, tensor in state.items()}


def _sha256(path: Path) -> str:
    """Over the weight files of a part, without their names."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
