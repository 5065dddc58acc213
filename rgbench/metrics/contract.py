"""What every metric offers to the one pass over the images, whatever it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.metrics.tracking import Track, untracked

if TYPE_CHECKING:
    from rgbench.data.prompts import Prompt, PromptSet
    from rgbench.metrics.features import FeatureRows, FeatureSet
    from rgbench.metrics.reference import ReferenceScenes


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


SEED_RULE = "one CPU generator per image, seeded with sha256(prompt id, seed)"


@dataclass(frozen=True)
class Context:
    """What a metric may know of the evaluation that it is part of.

    Attributes:
        prompts: the prompts, one image each.
        reference: real scenes for the same prompts.
        features: of the set metrics' reference and of each batch, shared by them.
        rows: features of the evaluated images by position, filled as they are seen; shared likewise.
        reward_folder: the world's reward model.
        judges_folder: the world's judges.
        trained_rewards: ``rewards`` of the run's run.json; empty for a model that met none.
        resolution: side of the evaluated images in pixels.
        device: where networks run.
        jpeg: what JPEG or another lossy format did to the images; None for nothing.
        named: the protocol of the set metrics, such as "coco14-30k"; None for the world's own.
        judges: weights of held-out judges by name; the published ones where there are none.
        departures: in what this evaluation is not what the named protocol asks for.
        track: shows how far a long computation is.
    """

    prompts: PromptSet
    resolution: int
    reference: ReferenceScenes
    features: FeatureSet
    rows: FeatureRows
    reward_folder: Path
    judges_folder: Path
    trained_rewards: tuple[Mapping[str, Any], ...]
    device: torch.device
    jpeg: str | None = None
    named: str | None = None
    departures: tuple[str, ...] = ()
    judges: Mapping[str, Path] = field(default_factory=dict)
    track: Track = untracked

    def protocol(self, **fields: Any) -> dict[str, Any]:
        """Protocol fields that every metric shares, and its own.

        The evaluated image is the 8-bit one that a lossless file would hold.
        """
        prompts = {"name": self.prompts.name, "sha256": self.prompts.sha256, "num": self.prompts.num_distinct}
        shared = {"prompts": prompts, "seeds": self.prompts.seeds, "seed_rule": SEED_RULE, "image": "uint8 RGB"}
        return {**shared, "jpeg": self.jpeg, **fields}

    def see(self, images: Tensor, positions: np.ndarray) -> None:
        """Have the features of a batch in ``rows``; they are computed once, whichever set metric asks first."""
        self.rows.put(positions, self.features(images))

    def set_protocol(self, **fields: Any) -> dict[str, Any]:
        """Protocol fields of a set metric: shared ones, its reference and network, and its own."""
        named: dict[str, Any] = {"protocol": self.named, "departures": list(self.departures)} if self.named else {}
        if self.features.network.smallest is not None:  # a crop at native size sees another part at another resolution
            named["generated_resolution"] = self.resolution
        return self.protocol(**named, **self.features.fields(), **fields)

    def by_group(self, rows: np.ndarray) -> dict[str, float]:
        """Mean of per-image rows over each group of prompts, such as "test" and "heldout"."""
        groups = np.array([prompt.group for prompt in self.prompts.prompts])
        return {str(name): float(rows[groups == name].mean()) for name in np.unique(groups) if name}

    def clusters(self, num: int) -> np.ndarray:
        """(num,) number of each of the first images' prompt: images of one prompt are no independent draws."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(prompt.id, len(numbers)) for prompt in self.prompts.prompts[:num]])

    def over_prompts(self, rows: np.ndarray) -> np.ndarray:
        """(P,) mean over the seeds of each prompt, of (n,) rows of the first n images."""
        clusters = self.clusters(len(rows))
        return np.bincount(clusters, rows) / np.bincount(clusters)

    def require_images(self, metric: str, num: int) -> None:
        """Check that there are enough images.

        Raises:
            UsageError: there are fewer.
        """
        if len(self.prompts) < num:
            raise UsageError(f"metric {metric} needs at least {num} images, not {len(self.prompts)}; raise --num")

    def require(self, metric: str, num: int, resolution: int | None = None) -> None:
        """Check that the evaluation suits a metric that knows what each image should show.

        Args:
            metric: its name on the command line.
            num: images that it needs.
            resolution: side that it needs, in pixels; None for any.

        Raises:
            UsageError: a prompt without a possible scene, fewer prompts, or images of another size.
        """
        self.reference.require(metric, num)
        if resolution not in (None, self.resolution):
            raise UsageError(f"metric {metric} reads {resolution} px images; this model makes {self.resolution} px")


class Accumulator(Protocol):
    """A metric: sees every image once, in any order, then gives its scalars.

    Construct it with a :class:`Context`; loading weights belongs into the constructor,
    and so do complaints (UsageError) about prompts that do not fit.

    A metric that says in its class what it gathers (see :mod:`rgbench.metrics.carrying`) can be
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
