"""Mixed precision: the arithmetic of the networks, over float32 weights."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(dtype: str, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which networks compute in ``dtype``; none for ``float32``.

    Args:
        dtype: ``train.dtype`` of a recipe.
        device_type: ``cpu`` or ``cuda``.
    """
    kind = AUTOCAST[dtype]
    if kind is None:
        return contextlib.nullcontext()
    # No cache of cast weights: one filled where no gradient is taken would cut the gradient elsewhere.
    return torch.autocast(device_type, dtype=kind, cache_enabled=False)
