"""Benchtop oracle: the share of a caption that its image shows, by a vote of attribute classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rgbench.benchtop.oracle import Oracle, load_oracle
from rgbench.benchtop.scenes import IMAGE_SIZE
from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_tree
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import Metric
from rgbench.metrics.context import Context
from rgbench.metrics.statistics import wilson_interval
from rgbench.metrics.values import Direction, Family, Interval, MetricInfo, MetricValue, Protocol

INFOS = {
    "all": ("Oracle, all right", "images that show everything the caption says"),
    "mean": ("Oracle, mean", "attributes of the caption that images show"),
    "shape": ("Oracle, shape", "shapes that are right"),
    "colour": ("Oracle, colour", "colours that are right"),
    "size": ("Oracle, size", "sizes that are right"),
    "layout": ("Oracle, layout", "layouts that are right"),
}  # label, about
PERCENT = 100
NUM_MATCHED = 64  # images, the first, that render-and-match reads: .05 s each


class OracleAccuracy(Metric):
    """Share of attributes that are right, in per cent: their mean, each of the four, and images with all right.

    Beside the first stands, in per cent of the caption's attributes, on how many the classifiers are unanimous, and on
    how many render-and-match reads what they voted, in the first images alone.

    Args:
        context: needs prompts with scenes.

    Raises:
        UsageError: prompts without scenes, missing classifiers, or images of another size.
    """

    name = "oracle"
    infos = tuple(
        MetricInfo.of(f"oracle_{name}", label, about, Direction.HIGHER, Family.ORACLE, "%", 1)
        for name, (label, about) in INFOS.items()
    )
    per_image_state = ("shares", "matched")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.oracle, fields = find_oracle(context, self.name)
        protocol = context.protocol(scenes_sha256=context.reference.sha256, **fields)
        self.planned = tuple((info.name, Protocol.of(info.name, protocol)) for info in self.infos)
        self.shares = {name: np.zeros(len(context.prompts)) for name in (*INFOS, "agreement")}
        self.matched = np.zeros(len(context.prompts))

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        scenes = self.context.reference.scenes
        scores = self.oracle.score(images, scenes[positions.tolist()])
        for name, shares in self.shares.items():
            shares[positions] = scores[name].double().cpu().numpy()
        if (few := positions < NUM_MATCHED).any():
            at = positions[few]
            matched = self.oracle.score(images[torch.from_numpy(few)], scenes[at.tolist()], match=True)
            self.matched[at] = matched["match_agreement"].double().numpy()

    def compute(self) -> list[MetricValue]:
        agreement = self.shares["agreement"]
        agree = {"mean": PERCENT * float(agreement.mean()), "groups": self.context.by_group(PERCENT * agreement)}
        matched = PERCENT * float(self.matched[:NUM_MATCHED].mean())
        found = [self._value(planned, name) for planned, name in zip(self.planned, INFOS, strict=True)]
        extra = {**found[0].extra, "classifiers_agree": agree, "render_and_match_agrees": matched}
        found[0] = replace(found[0], extra=extra)
        return found

    def _value(self, planned: tuple[str, Protocol], name: str) -> MetricValue:
        rows = PERCENT * self.shares[name]
        independent = len(self.context.over_prompts(rows)) == len(rows)  # no prompt has two seeds
        exact = name == "all" and independent
        return self.mean_value(planned, rows, _wilson(self.shares[name]) if exact else None)


def find_oracle(context: Context, metric: str) -> tuple[Oracle, dict[str, str]]:
    """The oracle, one object for all metrics of a command, and its protocol fields.

    Args:
        context: needs prompts with scenes.
        metric: that reads images with it, for the messages.

    Raises:
        UsageError: prompts without scenes, missing classifiers, or images of another size.
    """
    context.reference.require(metric, 1)
    if context.resolution != IMAGE_SIZE:
        raise UsageError(f"metric {metric} reads {IMAGE_SIZE} px images; this model makes {context.resolution} px")
    folder = context.classifiers_folder
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: the oracle's classifiers are missing; make them with: python -m tools.benchtop build"
        )
    name = f"oracle {folder} {context.device}"
    oracle = context.reference.remember(name, lambda: load_oracle(folder, context.device))
    return oracle, {"classifiers_sha256": sha256_tree(folder), "vote": "majority of the attribute classifiers"}


def _wilson(right: np.ndarray) -> Interval:
    found = wilson_interval(float(right.sum()), len(right))
    return found.model_copy(update={"low": PERCENT * found.low, "high": PERCENT * found.high})
