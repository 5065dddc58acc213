"""What every metric offers to the one pass over the images, whatever it measures.

What a metric has gathered, as arrays: for a pass that goes on after a stop, and for shards that are merged.

A metric says in class attributes which of its attributes hold it; each is an array, a tensor, or a dict of them:

    gathers_per_image  one entry per position of the prompt set, along the last axis
    gathers_sums       added up over images
    gathers_within     metrics inside this one, a sequence

One that has none of the three, as a plug-in may, can be measured in a single uninterrupted pass only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

if TYPE_CHECKING:
    from rgbench.data.prompts import Prompt


Direction = Literal["lower", "higher", "target"]


class Metric(BaseModel):
    """How one scalar is named and shown.

    Attributes:
        name: its name in file names and columns.
        label: its name in tables; FD-EffLite0 is never called FID.
        direction: whether lower or higher is better, or nearness to 0.
        unit: "" for none.
        family: metrics of one family see the same kind of fault.
        decimals: digits shown after the point.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: str
    direction: Direction
    unit: str
    family: str
    decimals: int


class Interval(BaseModel):
    """A confidence interval and how it was made.

    Attributes:
        low: in the metric's unit.
        high: likewise.
        level: coverage, such as 0.95.
        method: in words, such as "Wilson".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: float
    high: float
    level: float
    method: str


@dataclass(frozen=True)
class Quantity:
    """A scalar that a metric will give, known before any image is made.

    Attributes:
        metric: its name and how it is shown.
        protocol: the fields that its protocol id is the hash of.
    """

    metric: Metric
    protocol: dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """A scalar that a metric gave.

    Attributes:
        quantity: which one.
        value: None where it is undefined; ``flags`` then say why.
        interval: None where there is none.
        num_samples: images that it was made from.
        flags: what a reader of the figure must know, such as "n<=d".
        in_sample: the model was trained on this very reward.
        extra: vectors and further figures; JSON values, all finite.
        rows: (n,) value of each image in prompt order, where there is one.
    """

    quantity: Quantity
    value: float | None
    interval: Interval | None
    num_samples: int
    flags: tuple[str, ...] = ()
    in_sample: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    rows: np.ndarray | None = None


class Accumulator(Protocol):
    """A metric: sees every image once, in any order, then gives its scalars.

    Construct it with a :class:`Context`; loading weights belongs into the constructor,
    and so do complaints (UsageError) about prompts that do not fit.

    A metric that says in its class what it gathers (see :mod:`rgbench.metrics.base`) can be
    shared by several processes, and goes on after a stop.

    Attributes:
        quantities: what :meth:`finish` will give, in that order.
    """

    quantities: tuple[Quantity, ...]

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        """Take in a batch.

        Args:
            images: (B, 3, H, W) float32 in [0, 1], multiples of 1/255, on the context's device.
            prompts: B prompts.
            positions: (B,) int64, their positions in the prompt set.
        """
        ...

    def finish(self) -> list[Measurement]:
        """The scalars, once all images were seen."""
        ...


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
