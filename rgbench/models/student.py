"""Students: a teacher's UNet made trainable, whole or through low-rank adapters (LoRA, arXiv 2106.09685).

LoRA students share every frozen weight with their teacher, so that teacher, student and target take the memory of one.

Students that are published as a UNet or as a LoRA alone, put on the base model that they were trained from.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import load_pickled_state_dict, load_safetensors, sha256_file
from rgbench.core.run import stream_seed
from rgbench.models.pipeline import DiffusionModels, load_models

ADAPTER = "default"


def make_student(teacher: UNet2DConditionModel, time_cond_proj_dim: int | None) -> UNet2DConditionModel:
    """The teacher's copy with a guidance embedding that starts as no guidance at all.

    The weights are the teacher's; the new ``cond_proj`` starts at zero, so that the student begins as exactly the
    teacher, whatever w it is given.

    Args:
        teacher: without ``time_cond_proj_dim``.
        time_cond_proj_dim: d of the guidance embedding; None for a student that is not told w.

    Returns:
        A trainable network on the teacher's device and of its dtype.

    Raises:
        UsageError: the teacher already has a guidance embedding (it is a student itself).
    """
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    return _network(teacher, weights, time_cond_proj_dim).requires_grad_(True)


def make_lora_student(
    teacher: UNet2DConditionModel,
    time_cond_proj_dim: int | None,
    *,
    rank: int,
    alpha: float,
    modules: Sequence[str],
    seed: int,
) -> UNet2DConditionModel:
    """The teacher with adapters W + (α/r)·B·A, of which A, B and the guidance embedding learn.

    B starts at zero, so that the student begins as exactly the teacher.

    Args:
        teacher: without ``time_cond_proj_dim``; its weights are shared, not copied.
        time_cond_proj_dim: d of the guidance embedding; None for a student that is not told w, as LCM-LoRA.
        rank: r.
        alpha: α.
        modules: ends of the names of the layers that are adapted; each names one at least.
        seed: of A.

    Returns:
        A network on the teacher's device and of its dtype.

    Raises:
        UsageError: as :func:`make_student`; or no layer has one of the names.
    """
    student = _network(teacher, dict(teacher.state_dict()), time_cond_proj_dim)
    names = adaptable(student)
    for module in modules:
        if not _named(names, module):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise UsageError(f"lora.modules: no layer of this UNet is named {module!r}; they end in {', '.join(ends)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "lora", 0))
        config = LoraConfig(r=rank, target_modules=list(modules), init_lora_weights=True)
        config.lora_alpha = alpha  # type: ignore[assignment]  # typed int, used as a number
        student.add_adapter(config, ADAPTER)
    if time_cond_proj_dim is not None:
        student.time_embedding.cond_proj.requires_grad_(True)
    return nn.Module.to(student, teacher.device, teacher.dtype).eval()


def adaptable(network: nn.Module) -> list[str]:
    """Names of the layers that an adapter can be put on."""
    return [name for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def _named(names: Sequence[str], module: str) -> bool:
    return any(name == module or name.endswith(f".{module}") for name in names)


def present(network: nn.Module, modules: Sequence[str]) -> list[str]:
    """Those of some names that a network has a layer for: a small UNet has no ``conv_shortcut``."""
    names = adaptable(network)
    return [module for module in modules if _named(names, module)]


def _network(
    teacher: UNet2DConditionModel, weights: dict[str, Tensor], time_cond_proj_dim: int | None
) -> UNet2DConditionModel:
    """A frozen network around tensors, with a guidance embedding of zeros.

    Args:
        teacher: its configuration is taken.
        weights: by the teacher's names; used as they are.
        time_cond_proj_dim: d of the guidance embedding, or None.

    Raises:
        UsageError: the teacher already has a guidance embedding.
    """
    if teacher.config.time_cond_proj_dim is not None:
        raise UsageError("the teacher has time_cond_proj_dim: it is a distilled student; name an undistilled model")
    with torch.device("meta"):  # no memory for weights that are replaced below
        network = UNet2DConditionModel.from_config(dict(teacher.config), time_cond_proj_dim=time_cond_proj_dim)
    if time_cond_proj_dim is not None:
        shape = network.time_embedding.cond_proj.weight.shape
        weights["time_embedding.cond_proj.weight"] = torch.zeros(shape, device=teacher.device, dtype=teacher.dtype)
    network.load_state_dict(weights, assign=True)
    # Evaluation mode: dropout, where a teacher has any, would draw outside the step's named streams.
    return network.requires_grad_(False).eval()


def trainable(student: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn, in the module's order."""
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


class Learned:
    """What a student learned, as a checkpoint holds it: of a LoRA student without the teacher's weights.

    Args:
        network: the student or its target.
        student: says which parameters learn.
    """

    def __init__(self, network: nn.Module, student: nn.Module) -> None:
        self.network = network
        self.names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Learned tensors by name."""
        state = self.network.state_dict()
        return {name: state[name] for name in self.names}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take them back.

        Raises:
            RgbenchError: other names; nothing is changed then.
        """
        if set(state_dict) != set(self.names):
            different = min(set(state_dict) ^ set(self.names))
            raise RgbenchError(f"the checkpoint's student has other learned weights, first {different!r}")
        self.network.load_state_dict(state_dict, strict=False)


def is_lora(network: UNet2DConditionModel) -> bool:
    """Whether the network is adapted, and not trained whole."""
    return bool(getattr(network, "peft_config", None))


def merged(network: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain UNet with the adapters' products added to its weights; the network itself where it has none."""
    if not is_lora(network):
        return network
    whole = copy.deepcopy(network)
    whole.fuse_lora()
    whole.unload_lora()
    return whole


def lora_state(network: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapters' weights under peft's names, which diffusers reads, on the CPU.

    diffusers' own older names exist for attention alone; a file of both is loaded in part.
    """
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


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
