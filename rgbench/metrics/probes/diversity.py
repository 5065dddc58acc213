"""Diversity: how different the images of one prompt are, over the noise they start from.

    d(prompt) = mean over pairs of its images of 1 − cos(φ(x), φ(y)),   φ: ImageNet features

The value is the mean of d over prompts. Vendi score, recall and coverage see the variety of the whole set; this sees a
collapse that a varied prompt list hides: a model with one image per prompt has a varied set and no diversity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.data.prompts import Prompt
from rgbench.metrics.context import Context
from rgbench.metrics.probes.base import Probe
from rgbench.metrics.statistics import NUM_GROUPS, jackknife_groups, jackknife_interval, jackknife_means
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol

MIN_IMAGES = 8  # of one prompt
PERCENT = 100


def mean_pairwise_distance(features: np.ndarray) -> float:
    """Mean of 1 − cosine over the pairs of (n, d) features, n ≥ 2; a zero vector is at distance 1 from all."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
    num = len(unit)
    total = unit.sum(0)
    cosines = float(total @ total) - float((unit * unit).sum())  # Σ over ordered pairs
    return 1 - cosines / (num * (num - 1))


class Diversity(Probe):
    """Mean pairwise feature distance between images of one prompt, in per cent.

    Args:
        context: prompts whose texts occur at least 8 times each, under ids of their own.

    Raises:
        UsageError: fewer images of a prompt.
    """

    name = "diversity"
    infos = (
        MetricInfo.of(
            "diversity",
            "Diversity",
            "mean feature distance between images of one prompt",
            Direction.HIGHER,
            Family.DIVERSITY,
            "%",
        ),
    )

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.scenes, self.flags = self.compared(reads_prompt=True)
        found: dict[str, list[int]] = {}
        for position, prompt in enumerate(context.prompts.prompts):
            found.setdefault(prompt.text, []).append(position)
        self.members = [np.array(positions) for positions in found.values() if len(positions) > 1]
        fewest = min(map(len, self.members), default=1)
        if fewest < MIN_IMAGES:
            raise UsageError(
                f"metric diversity needs at least {MIN_IMAGES} images of each prompt, not {fewest}; "
                f"give --seeds 0-{MIN_IMAGES - 1}, or --prompts a list in which each text stands {MIN_IMAGES} times"
            )
        fields = self.fields(
            self.scenes,
            **context.features.network.fields(),
            distance="1 − cosine, mean over the pairs of a prompt's images",
            images_per_prompt=fewest,
            jackknife=f"{NUM_GROUPS} groups of prompts, left out on both sides",
        )
        self.planned = ((self.name, Protocol.of(self.name, fields)),)

    @property
    def mergeable(self) -> bool:
        """Always: its features lie in the context, which the evaluation stores once for all."""
        return True

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.context.see(images, positions)

    def compute(self) -> list[MetricValue]:
        distances = self._distances(self.context.rows.take)
        extra = {"level": float(distances.mean()), "num_prompts": len(distances)}
        if self.scenes:
            real = self._distances(lambda at: self.context.features.reference_rows()[at].astype(np.float64))
            extra["real"], distances = float(real.mean()), distances - real
        groups = jackknife_groups(len(distances))
        left = jackknife_means(distances, groups)
        value = float(distances.mean())
        return [
            MetricValue(
                *self.planned[0],
                value=value,
                interval=jackknife_interval(value, left),
                num_images=sum(map(len, self.members)),
                reference="real" if self.scenes else None,
                flags=self.flags,
                extra={**extra, "jackknife": left},
            )
        ]

    def _distances(self, take: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.array([PERCENT * mean_pairwise_distance(take(members)) for members in self.members])
