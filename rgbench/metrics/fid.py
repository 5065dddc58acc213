"""FD-EffLite0: Fréchet distance between generated images and real scenes, on ImageNet features.

Offline there is no Inception file, so the features are EfficientNet-Lite0's and the
figure is never called FID: the two cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.features import EFFLITE0_FEATURES, FeatureRows
from rgbench.metrics.frechet import Gaussian, Moments, split_half_null
from rgbench.metrics.intervals import NUM_GROUPS, jackknife_groups, jackknife_interval

METRIC = Metric(name="fd_efflite0", label="FD-EffLite0", direction="lower", unit="", family="set distance", decimals=2)
MIN_IMAGES = 4  # two in each half of the null


class FrechetEffLite0:
    """Fréchet distance with jackknife interval and split-half null.

    Args:
        context: needs prompts with scenes.

    Raises:
        UsageError: prompts without scenes, or fewer than 4.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        context.require("fid", MIN_IMAGES)
        protocol = context.protocol(
            **context.features.fields(), jackknife=f"{NUM_GROUPS} groups of images, reference fixed"
        )
        self.quantities = (Quantity(METRIC, protocol),)
        self.rows = FeatureRows(len(context.prompts), EFFLITE0_FEATURES)
        self.moments = Moments.zeros(EFFLITE0_FEATURES)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.moments += Moments.of(self.rows.put(positions, self.context.features(images)))

    def finish(self) -> list[Measurement]:
        features, remember = self.context.features, self.context.reference.remember
        reference = remember("fd gaussian", lambda: Gaussian(Moments.of(features.reference_rows())))
        null = remember("fd null", lambda: split_half_null(features.reference_rows()))
        num = self.moments.num
        value = reference.distance(self.moments)
        replicates = reference.replicates(self.rows.take, jackknife_groups(num))
        extra = {"split_half_null": null, "split_half_of": "the reference", "num_features": EFFLITE0_FEATURES}
        return [
            Measurement(
                quantity=self.quantities[0],
                value=value,
                interval=jackknife_interval(value, replicates),
                num_samples=num,
                flags=("n<=d",) if num <= EFFLITE0_FEATURES else (),
                extra=extra,
            )
        ]
