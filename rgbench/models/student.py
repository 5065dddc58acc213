"""Students: a teacher's network made trainable, or published as a UNet or LoRA on its base model.

A student is trained whole or through low-rank adapters (LoRA, arXiv 2106.09685). LoRA students share every frozen
weight with their teacher, so that teacher, student and target take the memory of one.
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
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import check_sums, check_tensors, load_safetensors, load_tensors, sha256_file
from rgbench.core.run import stream_seed
from rgbench.core.shard import gather_all, mesh_of, part_of, shard
from rgbench.diffusion.schedule import is_same
from rgbench.models.folder import check_class, config_hash, explained, find_weights, read_config
from rgbench.models.lora import EMBEDDING_FILE, adapter_files, find_adapter, merge_lora
from rgbench.models.pipeline import GAMMA, STUDENT_SAMPLERS, DiffusionModels, load_models, load_network, read_scheduler

ADAPTER = "default"
ORIGINAL_STEPS, TIMESTEP_SCALING = 50, 10.0  # N of LCM's grid and s of its boundary condition: LCMScheduler's defaults
COND_PROJ = "time_embedding.cond_proj.weight"


def make_student(teacher: Any, time_cond_proj_dim: int | None) -> Any:
    """Copy the teacher and add a guidance embedding of zeros to a UNet.

    So the student begins as exactly the teacher for every w.

    Args:
        teacher: a UNet without ``time_cond_proj_dim``, or a transformer.
        time_cond_proj_dim: d of the guidance embedding; None for a student without w. A transformer that is told its
            guidance keeps its own embedding.

    Returns:
        A trainable network on the teacher's device and of its dtype.

    Raises:
        UsageError: the teacher already has a guidance embedding (it is a student itself), or can have none.
    """
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    return _network(teacher, weights, time_cond_proj_dim).requires_grad_(True)


def make_lora_student(
    teacher: Any,
    time_cond_proj_dim: int | None,
    *,
    rank: int,
    alpha: float,
    modules: Sequence[str],
    seed: int,
) -> Any:
    """Put adapters W + (α/r)·B·A on the teacher; A, B and the guidance embedding are trainable.

    B starts at zero, so that the student begins as exactly the teacher.

    Args:
        teacher: as of :func:`make_student`; its weights are shared, not copied.
        time_cond_proj_dim: d of the guidance embedding; None for a student without w, as LCM-LoRA.
        rank: r.
        alpha: α.
        modules: ends of the names of the adapted layers; each must name at least one.
        seed: of A.

    Returns:
        A network on the teacher's device and of its dtype.

    Raises:
        UsageError: as :func:`make_student`; or no layer has one of the names.
    """
    student = _network(teacher, dict(teacher.state_dict()), time_cond_proj_dim, whole=[COND_PROJ])  # with the adapters
    names = adaptable(student)
    for module in modules:
        if not _named(names, module):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            word = "UNet" if isinstance(student, UNet2DConditionModel) else "transformer"
            raise UsageError(
                f"lora.modules: no layer of this {word} is named {module!r}; they end in {', '.join(ends)}"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "lora", 0))
        config = LoraConfig(r=rank, target_modules=list(modules), init_lora_weights=True)
        config.lora_alpha = alpha  # type: ignore[assignment]  # typed int, used as a number
        student.add_adapter(config, ADAPTER)
    if time_cond_proj_dim is not None and isinstance(student, UNet2DConditionModel):
        student.time_embedding.cond_proj.requires_grad_(True)
    return nn.Module.to(student, teacher.device, teacher.dtype).eval()


def adaptable(network: nn.Module) -> list[str]:
    """Names of the layers that can take an adapter."""
    return [name for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def _named(names: Sequence[str], module: str) -> bool:
    return any(name == module or name.endswith(f".{module}") for name in names)


def present(network: nn.Module, modules: Sequence[str]) -> list[str]:
    """The module names that occur in a network: a small UNet has no ``conv_shortcut``."""
    names = adaptable(network)
    return [module for module in modules if _named(names, module)]


def _network(
    teacher: Any, weights: dict[str, Tensor], time_cond_proj_dim: int | None, whole: Sequence[str] = ()
) -> Any:
    """A frozen network around the teacher's tensors, with a guidance embedding of zeros where it is a UNet.

    It is in shards where the teacher is, but for the weights that are named ``whole``.

    Raises:
        UsageError: the teacher already has a guidance embedding, or can have none.
    """
    if not isinstance(teacher, UNet2DConditionModel):
        own = bool(teacher.config.get("guidance_embeds"))
        if own != (time_cond_proj_dim is not None):
            way = "is told its guidance; give 256" if own else "cannot be told its guidance; give null"
            raise UsageError(f"lcd.time_cond_proj_dim {time_cond_proj_dim}: this transformer {way}")
        return _around(weights, teacher, mesh=mesh_of(teacher), whole=whole)
    if teacher.config.time_cond_proj_dim is not None:
        raise UsageError("the teacher has time_cond_proj_dim: it is a distilled student; name an undistilled model")
    if time_cond_proj_dim is not None:
        shape = (teacher.time_embedding.linear_1.in_features, time_cond_proj_dim)
        weights[COND_PROJ] = torch.zeros(shape, device=teacher.device, dtype=teacher.dtype)
    return _around(weights, teacher, time_cond_proj_dim, mesh=mesh_of(teacher), whole=whole)


def _around(
    weights: dict[str, Tensor],
    base: Any,
    time_cond_proj_dim: int | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    mesh: DeviceMesh | None = None,
    whole: Sequence[str] = (),
    adapter: LoraConfig | None = None,
) -> Any:
    """A frozen network around tensors, which are used as they are, of the base's class and configuration or another."""
    added = {"time_cond_proj_dim": time_cond_proj_dim} if isinstance(base, UNet2DConditionModel) else {}
    with torch.device("meta"):  # no memory for weights that are replaced below
        network = type(base).from_config(dict(base.config if config is None else config), **added)
        if adapter is not None:
            network.add_adapter(adapter, ADAPTER)
    if mesh is not None:
        shard(network, mesh, [own for name, own in network.named_parameters() if name in whole])
        parts = network.state_dict()
        weights = {name: part_of(value, parts.get(name)) for name, value in weights.items()}
    network.load_state_dict(weights, assign=True)
    # Evaluation mode: dropout, where a teacher has any, would draw outside the step's named streams.
    return network.requires_grad_(False).eval()


def trainable(student: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in the module's order."""
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


class Learned:
    """The learned tensors of a student or its target, for checkpoints; without a LoRA student's frozen weights.

    Args:
        network: the student or its target.
        student: its trainable parameters are the learned ones.
    """

    def __init__(self, network: nn.Module, student: nn.Module) -> None:
        self.network = network
        self.names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Learned tensors by name."""
        state = self.network.state_dict()
        return {name: state[name] for name in self.names}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Load learned tensors.

        Raises:
            RgbenchError: other names; nothing is changed then.
        """
        if set(state_dict) != set(self.names):
            different = min(set(state_dict) ^ set(self.names))
            raise RgbenchError(f"the checkpoint's student has other learned weights, first {different!r}")
        self.network.load_state_dict(state_dict, strict=False)


def unsharded(network: Any, keep: bool) -> Any:
    """A whole copy of a sharded network on the CPU; all ranks call it.

    Args:
        network: a student or its target.
        keep: whether this rank wants the copy; the others get None.
    """
    weights = {name: value.cpu() for name, value in gather_all(network.state_dict(), keep).items()}
    adapter = network.peft_config[ADAPTER] if is_lora(network) else None
    return _around(weights, network, network.config.get("time_cond_proj_dim"), adapter=adapter) if keep else None


def is_lora(network: nn.Module) -> bool:
    """Whether the network is adapted, and not trained whole."""
    return bool(getattr(network, "peft_config", None))


def merged(network: Any) -> Any:
    """A plain network with the adapters' products added to its weights; a network without adapters as it is."""
    if not is_lora(network):
        return network
    whole = copy.deepcopy(network)
    whole.fuse_lora()
    whole.unload_lora()
    return whole


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights under peft's names, which diffusers reads, on the CPU.

    diffusers' own older names exist for attention alone; a file of both is loaded in part.
    """
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


@dataclass(frozen=True)
class Student:
    """A part that replaces or changes the base model's UNet.

    Attributes:
        base: a preset, or a pipeline folder.
        unet: a UNet folder in diffusers' layout, or a file of its tensors; None where it is a LoRA.
        lora: a LoRA file of diffusers', peft's or Kohya's layout, or its folder; None where it is a whole UNet.
        lora_weight: factor of the LoRA's own scale.
    """

    base: str
    unet: Path | None = None
    lora: Path | None = None
    lora_weight: float = 1.0

    @property
    def path(self) -> Path:
        """Where the part lies."""
        path = self.unet or self.lora
        assert path is not None
        return path


def load_student(student: Student, device: torch.device, dtype: torch.dtype) -> DiffusionModels:
    """Load a student's part into its base model.

    A LoRA is sampled as an LCM; a whole UNet as an LCM where it has a guidance embedding, else with the base's sampler.
    N and s of the LCM are those of the scheduler beside the part, where there is one.

    Args:
        student: base and part.
        device: where to put the weights.
        dtype: one floating type for all networks.

    Raises:
        UsageError: a missing file, or weights that do not fit the base model; names the first that differ.
    """
    models = load_models(student.base, device, dtype)
    if student.lora is None:
        unet, files = _whole_unet(student.path, models.unet, dtype)
    else:
        unet, files = _with_lora(student.lora, models, student.lora_weight)
    if unet.config.sample_size != models.unet.config.sample_size:
        sizes = f"{unet.config.sample_size}, the base's is {models.unet.config.sample_size}"
        raise UsageError(f"{student.path}: sample_size {sizes}; name the base it was trained from")
    unet.requires_grad_(False).eval()
    nn.Module.to(unet, device, dtype)
    ours = hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
    weight = "" if student.lora_weight == 1 else f" {student.lora_weight!r}"
    both = hashlib.sha256(f"{models.weights_sha256} {ours}{weight}".encode()).hexdigest()
    own = files[0].with_name("config.json")  # such as another norm_eps, of weights that fit
    config = f"{models.config_sha256} {config_hash(own) if own.is_file() else None}"
    models = replace(
        models,
        unet=unet,
        weights_sha256=both,
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        path=student.path,
    )
    is_lcm = student.lora is not None or unet.config.time_cond_proj_dim is not None
    return models.with_student(unet, *_sampler_settings(student.path, models)) if is_lcm else models


def sampled_as(models: DiffusionModels, sampler: str) -> DiffusionModels:
    """Sample the same networks with another sampler than their folder's.

    Args:
        models: the model.
        sampler: "ddim", "lcm" or "tcd".

    Raises:
        UsageError: DDIM for a student with a guidance embedding, which predicts the end of the path alone.
    """
    if sampler == models.sampler:
        return models
    if sampler != "ddim":
        steps = models.original_inference_steps or ORIGINAL_STEPS
        return models.with_student(models.unet, steps, TIMESTEP_SCALING, GAMMA if sampler == "tcd" else None)
    if models.unet.config.time_cond_proj_dim is not None:
        raise UsageError(f"{models.path}: its guidance embedding says that it is an LCM; leave out --sampler ddim")
    return replace(models, sampler="ddim", original_inference_steps=None)


def _whole_unet(path: Path, base: UNet2DConditionModel, dtype: torch.dtype) -> tuple[UNet2DConditionModel, list[Path]]:
    """A UNet from its folder or a file of its tensors, and its weight files."""
    folder = path / "unet" if (path / "unet").is_dir() else path
    if folder.is_dir():
        check_sums(folder)
        weights = find_weights(folder, "unet")
        unet = load_network(weights, dtype)
        _check_fit(path, unet.state_dict(), base)
        return unet, list(weights.files)
    if not path.is_file():
        raise UsageError(f"{path}: no such UNet; give a folder in diffusers' layout or a weight file")
    tensors = load_tensors(path)
    state = {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise UsageError(f"{path}: {len(tensors) - len(state)} tensors occur with and without the prefix 'unet.'")
    _check_fit(path, state, base)
    dim = _embedding_dim(path, state, base) if COND_PROJ in state else None
    own = path.with_name("config.json")  # the same network as its folder
    if own.is_file():
        check_class(path.parent, "unet")
    with explained(path):
        cast = {key: tensor.to(base.device, dtype) for key, tensor in state.items()}
        return _around(cast, base, dim, read_config(own) if own.is_file() else None), [path]


def _check_fit(path: Path, state: Mapping[str, Tensor], base: UNet2DConditionModel) -> None:
    """Refuse a UNet that differs from the base's by more than the guidance embedding: it has another base."""
    found, own = ({k: v for k, v in each.items() if k != COND_PROJ} for each in (state, base.state_dict()))
    check_tensors(path, found, own, "the base model", "name the base it was trained from")


def _with_lora(path: Path, models: DiffusionModels, weight: float) -> tuple[UNet2DConditionModel, list[Path]]:
    """The base's UNet with a LoRA merged into it and into the text encoder, and the LoRA's files."""
    unet, embedding = models.unet, find_adapter(path).with_name(EMBEDDING_FILE)
    if embedding.is_file():
        state = load_safetensors(embedding)
        if list(state) != [COND_PROJ]:
            raise UsageError(f"{embedding}: expected {COND_PROJ!r} alone, found {', '.join(sorted(state)[:5])}")
        whole = dict(unet.state_dict()) | {COND_PROJ: state[COND_PROJ].to(unet.device, unet.dtype)}
        unet = _around(whole, unet, _embedding_dim(embedding, state, unet))
    merge_lora(path, {"unet": unet, "text_encoder": models.text_encoder}, weight)
    return unet, adapter_files(path)


def _embedding_dim(path: Path, state: Mapping[str, Tensor], base: UNet2DConditionModel) -> int:
    """d of a guidance embedding, which maps to as many numbers as the base's timesteps have."""
    shape, outputs = tuple(state[COND_PROJ].shape), base.time_embedding.linear_1.in_features
    if len(shape) != 2 or shape[0] != outputs:
        raise UsageError(f"{path}: {COND_PROJ!r} is {shape}, the base needs ({outputs}, d)")
    return shape[1]


def _sampler_settings(path: Path, base: DiffusionModels) -> tuple[int, float, float | None]:
    """N, s and γ of a student's scheduler in or above the part's folder; else LCMScheduler's own, without γ.

    Raises:
        UsageError: its noise schedule or what it predicts is not the base's, or no number stands where one is due.
    """
    for folder in (path, *path.parents[:2]):
        for file in (folder / "scheduler_config.json", folder / "scheduler" / "scheduler_config.json"):
            if not file.is_file() or str(read_config(file).get("_class_name")) not in STUDENT_SAMPLERS:
                continue
            own = read_scheduler(file, base.device)
            same = is_same(own["schedule"], base.schedule)
            if not same or own["prediction_type"] != base.prediction_type:
                what = "noise schedule" if not same else f"prediction_type {own['prediction_type']}"
                raise UsageError(f"{file}: its {what} is not the base's; name the base it was trained from")
            steps = own["original_inference_steps"] or ORIGINAL_STEPS
            return steps, own["timestep_scaling"], own["gamma"] if own["sampler"] == "tcd" else None
    return ORIGINAL_STEPS, TIMESTEP_SCALING, None
