"""Students: a teacher's UNet made trainable, whole or through low-rank adapters (LoRA, arXiv 2106.09685).

LoRA students share every frozen weight with their teacher, so that teacher, student and target take the memory of one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from rgbench.errors import RgbenchError, UsageError
from rgbench.run import stream_seed

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
