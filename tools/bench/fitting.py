"""Rows that may not fit a device's memory: what was measured before stays, and what follows finds the memory free."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from rgbench.core.process import lacks_memory
from tools.bench.document import DOES_NOT_FIT


def row_of(head: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of a result, or that it does not fit; afterwards nothing of it is held.

    Args:
        head: which row it is.
        measure: makes what it needs and gives the row's figures; keeps neither.

    Returns:
        ``head`` with the figures, or with the device's words under :data:`DOES_NOT_FIT`.
    """
    try:
        found = measure()
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        found = {DOES_NOT_FIT: str(error).partition("\n")[0]}
    # Not while the error is handled, which holds the step's frames. Networks and hooks hold each other in cycles.
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    return head | found
