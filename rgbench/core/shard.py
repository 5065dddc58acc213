"""Networks in shards (torch's FSDP2): each rank holds a part of every tensor, and gathers a block while it runs.

torch averages the gradients of shards over the ranks, in the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: Any, mesh: DeviceMesh, whole: Collection[nn.Parameter] = ()) -> None:
    """Put a network's parts on the ranks of a mesh, block by block, in place.

    Args:
        network: of diffusers, which names the classes of its blocks; on any device, or without memory.
        mesh: of :meth:`rgbench.core.launch.Ranks.mesh`.
        whole: parameters that every rank keeps.
    """
    # Of FLUX, whose network changes no such view in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in reversed(list(network.modules())):  # a block before what it is part of
        if module is network or type(module).__name__ in network._no_split_modules:
            # Also the outermost: what is gathered is no parameter of an optimiser or an average.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))
            module.set_force_sum_reduction_for_comms(True)  # older gloo sums in silence where a mean is asked for


def mesh_of(network: nn.Module) -> DeviceMesh | None:
    """The ranks that share a network; None of a whole one."""
    return next((own.device_mesh for own in network.parameters() if isinstance(own, DTensor)), None)


def is_shard(tensor: Tensor) -> bool:
    """Whether other ranks hold the rest."""
    return isinstance(tensor, DTensor)


def gather(tensor: Tensor) -> Tensor:
    """A whole tensor; all ranks of a shard call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_all(tensors: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Whole tensors, those of shards on the CPU; all ranks call it.

    Args:
        tensors: by name, and what is none.
        keep: whether this rank wants them; the others get nothing.
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        value = gather(tensor)
        if keep:
            found[name] = value.cpu() if is_shard(tensor) else value
    return found


def part_of(tensor: Tensor, own: Any) -> Tensor:
    """This rank's part of a whole tensor, where ``own`` is a shard of such a one; else the tensor itself."""
    if not isinstance(own, DTensor) or own.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
