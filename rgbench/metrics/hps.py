"""Reward of the HPS form, 100 · cosine, with antialiasing on and off side by side.

The two are two protocols; their gap is itself a probe, because what only the aliased
resize lets through cannot be seen at the size the reward model looks at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.overopt.rewards import SCALE, shared_reward
from rgbench.metrics.scored import score_measurement


def _metric(antialias: bool) -> Metric:
    name = f"aa{int(antialias)}"
    return Metric(name=f"hps_{name}", label=f"HPS {name}", direction="higher", unit="", family="reward", decimals=2)


class HPSScore:
    """Mean score of the world's reward model, per image and per group.

    Args:
        context: any prompts.

    Raises:
        UsageError: the reward model's folder is incomplete.
    """

    gathers_per_image = ("scores",)

    def __init__(self, context: Context) -> None:
        self.context = context
        num = len(context.prompts)
        self.shared = [shared_reward(context, antialias=aa) for aa in (True, False)]
        self.rewards = [shared.reward for shared in self.shared]
        self.scores = np.full((2, num), np.nan)
        self.quantities = tuple(
            Quantity(_metric(reward.antialias), context.protocol(reward=reward.fingerprint(), scale=SCALE))
            for reward in self.rewards
        )

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        for scores, reward in zip(self.scores, self.shared, strict=True):
            scores[positions] = reward(images, prompts).cpu().numpy()

    def finish(self) -> list[Measurement]:
        return [
            score_measurement(self.context, quantity, rows, reward)
            for quantity, reward, rows in zip(self.quantities, self.rewards, self.scores, strict=True)
        ]
