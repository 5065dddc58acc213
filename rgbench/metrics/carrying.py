"""What a metric has gathered, as arrays: for a pass that goes on after a stop, and for shards that are merged.

A metric says in class attributes which of its attributes hold it; each is an array, a tensor, or a dict of them:

    gathers_per_image  one entry per position of the prompt set, along the last axis
    gathers_sums       added up over images
    gathers_within     metrics inside this one, a sequence

One that has none of the three, as a plug-in may, can be measured in a single uninterrupted pass only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

KINDS = ("gathers_per_image", "gathers_sums", "gathers_within")


def can_be_carried(metric: Any) -> bool:
    """Whether a metric, and all inside it, say what they gather."""
    inside = [part for name in getattr(metric, "gathers_within", ()) for part in getattr(metric, name)]
    return any(hasattr(metric, kind) for kind in KINDS) and all(map(can_be_carried, inside))


def gathered(metric: Any, positions: np.ndarray) -> dict[str, np.ndarray]:
    """What a metric gathered from the images at positions, which must be all that it saw."""
    state = {}
    for key, holder, name, per_image in _places(metric):
        array = _array(holder[name])
        state[key] = array[..., positions].copy() if per_image else array.copy()
    return state


def absorb(metric: Any, positions: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
    """Give a metric what another gathered from other images.

    Args:
        metric: made for the same prompts and protocol.
        positions: of those images.
        state: as :func:`gathered` gave it.
    """
    for key, holder, name, per_image in _places(metric):
        mine = _array(holder[name])
        merged = mine.copy()
        if per_image:
            merged[..., positions] = state[key]
        else:
            merged += state[key]
        target = holder[name]
        if isinstance(target, torch.Tensor):
            target.copy_(torch.from_numpy(merged))
        else:
            target[...] = merged


def _places(metric: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, bool]]:
    """Key, the dict that holds an array, its name there, and whether it has an entry per image."""
    for kind in KINDS[:2]:
        for path in getattr(metric, kind, ()):
            owner, name = metric, path
            while "." in name:
                head, _, name = name.partition(".")
                owner = getattr(owner, head)
            value = getattr(owner, name)
            holder, names = (value, list(value)) if isinstance(value, dict) else (vars(owner), [name])
            for key in names:
                yield f"{prefix}{path}/{key}", holder, key, kind == KINDS[0]
    for name in getattr(metric, "gathers_within", ()):
        for i, part in enumerate(getattr(metric, name)):
            yield from _places(part, f"{prefix}{name}/{i}/")


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
