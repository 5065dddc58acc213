"""Reward of the HPS form, 100 · cosine, with antialiasing on and off side by side; lossless, or through JPEG.

Antialiasing on and off are two protocols; their gap is itself a probe, because what only the aliased
resize lets through cannot be seen at the size the reward model looks at.

    hps         of the images as they are
    hps_jpeg75  of the images through JPEG at quality 75, as the published HPSv2 figures were made
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.lossy import JPEG_QUALITY, through_jpeg
from rgbench.metrics.overopt.rewards import SCALE, SharedReward, shared_reward
from rgbench.metrics.scored import score_measurement

THROUGH = f"quality {JPEG_QUALITY}, 4:2:0"


class HPSScore:
    """Mean score of the world's reward model, per image and per group.

    Args:
        context: any prompts.
        jpeg: whether images go through JPEG before they are scored.

    Raises:
        UsageError: the reward model's folder is incomplete.
    """

    gathers_per_image = ("scores",)

    def __init__(self, context: Context, jpeg: bool = False) -> None:
        self.context, self.jpeg = context, jpeg
        num = len(context.prompts)
        shared = [shared_reward(context, antialias=aa) for aa in (True, False)]
        # Of images that nobody else looks at, nobody else's scores are to be forgotten.
        self.shared = [SharedReward(each.reward) for each in shared] if jpeg else shared
        self.rewards = [each.reward for each in self.shared]
        self.scores = np.full((2, num), np.nan)
        self.quantities = tuple(
            Quantity(self._metric(reward.antialias), self._protocol(reward.fingerprint())) for reward in self.rewards
        )

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        images = through_jpeg(images) if self.jpeg else images
        for scores, reward in zip(self.scores, self.shared, strict=True):
            scores[positions] = reward(images, prompts).cpu().numpy()

    def finish(self) -> list[Measurement]:
        return [
            score_measurement(self.context, quantity, rows, reward)
            for quantity, reward, rows in zip(self.quantities, self.rewards, self.scores, strict=True)
        ]

    def _metric(self, antialias: bool) -> Metric:
        name, label = f"aa{int(antialias)}", f"HPS aa{int(antialias)}"
        if self.jpeg:
            name, label = f"jpeg{JPEG_QUALITY}_{name}", f"{label} JPEG {JPEG_QUALITY}"
        return Metric(name=f"hps_{name}", label=label, direction="higher", unit="", family="reward", decimals=2)

    def _protocol(self, reward: dict) -> dict:
        fields = self.context.protocol(reward=reward, scale=SCALE)
        if self.jpeg:
            given = fields["jpeg"]
            fields["jpeg"] = f"{given}, then {THROUGH}" if given else THROUGH
        return fields


def hps_jpeg75(context: Context) -> HPSScore:
    """HPS through JPEG as a metric; raises as :class:`HPSScore`."""
    return HPSScore(context, jpeg=True)
