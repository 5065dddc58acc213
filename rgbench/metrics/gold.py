"""Gold: the simulated annotators' utility of an image, read back from its pixels.

    utility = share of the caption's attributes that are right − λ · degradation

The share is the oracle's vote; the degradation is the median of three regressors; λ is the annotators' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rgbench.benchtop.gold import Gold
from rgbench.benchtop.oracle import CLASSIFIERS
from rgbench.benchtop.preferences import PreferenceConfig, utility
from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_tree
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import Metric
from rgbench.metrics.context import Context
from rgbench.metrics.oracle import find_oracle
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol


class GoldReader:
    """Reads utility and degradation of images as the simulated annotators see them.

    Args:
        context: needs prompts with scenes.
        metric: that reads images with it, for the messages.

    Raises:
        UsageError: prompts without scenes, missing classifiers or regressors, or images of another size.

    Attributes:
        fields: of the protocol.
    """

    def __init__(self, context: Context, metric: str) -> None:
        self.context, self.annotators = context, PreferenceConfig()
        self.oracle, fields = find_oracle(context, metric)
        folder = context.regressors_folder
        for name in CLASSIFIERS:
            if not (folder / name / "model.safetensors").is_file():
                raise UsageError(
                    f"{folder / name}: the regressor of degradation is missing; make it with: "
                    "python -m tools.benchtop build"
                )
        self.gold = context.reference.remember(f"gold {folder} {context.device}", lambda: Gold(folder, context.device))
        weight = self.annotators.degradation_weight
        self.fields: dict[str, Any] = {
            "scenes_sha256": context.reference.sha256,
            **fields,
            "regressors_sha256": sha256_tree(folder),
            "degradation": "median of the regressors",
            "degradation_weight": weight,
        }

    def read(self, images: Tensor, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Utility and degradation, (B,) float64 each.

        Args:
            images: (B, 3, 64, 64) in [0, 1].
            positions: (B,) of their prompts.
        """
        share = self.oracle.score(images, self.context.reference.scenes[positions.tolist()])["share"].double()
        degradation = self.gold.degradation(images).double().cpu()
        return utility(share, degradation, self.annotators).numpy(), degradation.numpy()


class GoldUtility(Metric):
    """The simulated annotators' utility, and the degradation in it.

    Args:
        context: needs prompts with scenes.

    Raises:
        UsageError: as :class:`GoldReader`.
    """

    name = "gold_utility"
    infos = (
        MetricInfo.of(
            "gold_utility",
            "Gold utility",
            "share of the caption that is right, less the weighted degradation, as the annotators see it",
            Direction.HIGHER,
            Family.ORACLE,
            decimals=3,
        ),
        MetricInfo.of(
            "degradation",
            "Degradation",
            "strength of blur, noise, fading and the like in images, from 0 to 1, by three regressors",
            Direction.LOWER,
            Family.ORACLE,
            decimals=3,
        ),
    )
    per_image_state = ("rows",)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.reader = GoldReader(context, self.name)
        protocol = context.protocol(**self.reader.fields)
        self.planned = tuple((info.name, Protocol.of(info.name, protocol)) for info in self.infos)
        self.rows = np.full((len(self.infos), len(context.prompts)), np.nan)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.rows[:, positions] = self.reader.read(images, positions)

    def compute(self) -> list[MetricValue]:
        return [self.mean_value(planned, rows) for planned, rows in zip(self.planned, self.rows, strict=True)]
