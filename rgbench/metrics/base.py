"""Contract of a metric: it sees every image once, in any order, then gives its values.

A metric declares which of its attributes hold what it accumulates, so that an evaluation can resume after a stop and
be shared by several processes. Each is an array, a tensor, or a dict of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rgbench.benchtop.scenes import IMAGE_SIZE
from rgbench.core.errors import UsageError
from rgbench.data.prompts import Prompt
from rgbench.metrics.context import Context
from rgbench.metrics.reference import ReferenceScenes
from rgbench.metrics.statistics import bootstrap_interval
from rgbench.metrics.values import Interval, MetricInfo, MetricValue, Protocol


class Metric(ABC):
    """One metric of one evaluation.

    Args:
        context: of the evaluation. The constructor loads weights.

    Raises:
        UsageError: the metric does not fit the prompts, the model or the files at hand.

    Attributes:
        name: in the registry and on the command line.
        infos: every value that it may report, whatever the network or reference.
        default: whether it is measured where the user names no metric, if its constructor does not refuse.
        needs: names under which ``--judge`` takes its weights.
        per_image_state: attributes with one entry per position of the prompts, along the last axis.
        summed_state: attributes that add up over images.
        parts: attributes that are sequences of metrics inside this one.
        planned: metric value name and protocol of each value that :meth:`compute` will give, in its order.
    """

    name: ClassVar[str]
    infos: tuple[MetricInfo, ...]
    default: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()
    per_image_state: ClassVar[tuple[str, ...]] = ()
    summed_state: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    planned: tuple[tuple[str, Protocol], ...]

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        """Take in a batch.

        Args:
            images: (B, 3, H, W) float32 in [0, 1], multiples of 1/255, on the context's device.
            prompts: B prompts.
            positions: (B,) int64, their positions in the prompt set.
        """

    @abstractmethod
    def compute(self) -> list[MetricValue]:
        """The values, once every image was seen."""

    def mean_value(
        self, planned: tuple[str, Protocol], rows: np.ndarray, interval: Interval | None = None
    ) -> MetricValue:
        """The mean over images, with the means of the prompts' groups.

        Args:
            planned: name and protocol.
            rows: (n,) in prompt order.
            interval: of the mean; by bootstrap over prompts by default.
        """
        return MetricValue(
            *planned,
            value=float(rows.mean()),
            interval=interval or bootstrap_interval(self.context.over_prompts(rows)),
            num_images=len(rows),
            extra={"groups": self.context.by_group(rows)},
            rows=rows,
        )

    def rewards(self) -> list[Any]:
        """Reward models that read the prompts, to count prompts that they cut."""
        return [reward for part in self._parts().values() for reward in part.rewards()]

    @property
    def mergeable(self) -> bool:
        """Whether it, and every part, declares its state; else it can only be measured in one uninterrupted pass."""
        return bool(self.per_image_state or self.summed_state or self.parts) and all(
            part.mergeable for part in self._parts().values()
        )

    def state_dict(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """What was accumulated from the images at ``positions``, which must be all that it saw."""
        own = {key: value[..., positions] for key, value in self._tensors(self.per_image_state)}
        own |= {key: value.clone() for key, value in self._tensors(self.summed_state)}
        state = {key: value.detach().cpu().numpy() for key, value in own.items()}
        for prefix, part in self._parts().items():
            state |= {f"{prefix}/{key}": value for key, value in part.state_dict(positions).items()}
        return state

    def merge_state(self, positions: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
        """Add what another of the same prompts and protocols accumulated from other images.

        Args:
            positions: of those images.
            state: from :meth:`state_dict`.
        """
        for key, value in self._tensors(self.per_image_state):
            value[..., positions] = torch.from_numpy(state[key]).to(value.device)
        for key, value in self._tensors(self.summed_state):
            value += torch.from_numpy(state[key]).to(value.device)
        for prefix, part in self._parts().items():
            own = {
                key.removeprefix(f"{prefix}/"): value for key, value in state.items() if key.startswith(f"{prefix}/")
            }
            part.merge_state(positions, own)

    def _tensors(self, attributes: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor, which shares the attribute's memory."""
        for attribute in attributes:
            value: Any = getattr(self, attribute)
            for key, each in value.items() if isinstance(value, dict) else [("", value)]:
                yield f"{attribute}.{key}" if key else attribute, torch.as_tensor(each)

    def _parts(self) -> dict[str, Metric]:
        return {f"{name}.{i}": part for name in self.parts for i, part in enumerate(getattr(self, name))}


class SetMetric(Metric):
    """A metric of the features of all images, which all set metrics of an evaluation share.

    Args:
        context: with a reference that suits the prompts.

    Raises:
        UsageError: scenes as reference and prompts without scenes or images of another size, or too few images.

    Attributes:
        min_images: that each side needs.
    """

    min_images: ClassVar[int]

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        reference, side = context.features.reference, context.resolution
        if isinstance(reference, ReferenceScenes) and side != IMAGE_SIZE:
            raise UsageError(
                f"metric {self.name}: the real scenes are {IMAGE_SIZE} px, these images {side} px; give real images "
                "with --reference"
            )
        reference.require(self.name, self.min_images)
        context.require_images(self.name, self.min_images)

    @property
    def mergeable(self) -> bool:
        """Always: its features lie in the context, which the evaluation stores once for all."""
        return True

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.context.see(images, positions)
