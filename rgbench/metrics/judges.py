"""Held-out judges: rewards that no student here was trained on, as metrics.

A student that learned to please one reward model should please the others too, if its images got better.

    clip_score  100 · cosine of CLIP ViT-H-14 (arXiv 2104.08718, without its factor 2.5)
    pickscore   exp(logit scale) · cosine (arXiv 2305.01569), about 20
    aesthetic   LAION's improved predictor, a rating from 1 to 10; it reads no prompt

Weights are those given with ``--judge NAME=PATH``, else the published ones in the local caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.errors import RgbenchError
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.scored import score_measurement
from rgbench.rewards.aesthetic import AestheticReward
from rgbench.rewards.clip_score import CLIPScoreReward
from rgbench.rewards.pickscore import PickScoreReward
from rgbench.rewards.published import find_published

HEAD = "aesthetic_head"  # the name under which ``--judge`` takes the aesthetic predictor's head


@dataclass(frozen=True)
class Judge:
    """How one judge is shown and loaded.

    Attributes:
        label: in tables.
        decimals: digits shown.
        load: from the context to the reward.
        scale: from the reward to the factor by which its scores are shown.
    """

    label: str
    decimals: int
    load: Callable[[Context], Any]
    scale: Callable[[Any], float]


class RewardJudge:
    """Mean score of a reward, per image and per group of prompts.

    Args:
        context: any prompts.
        name: of the metric and of the weights.
        judge: the reward.

    Raises:
        UsageError: its weights are not there; says what they are, their size and how to get them.
    """

    gathers_per_image = ("scores",)

    def __init__(self, context: Context, name: str, judge: Judge) -> None:
        self.context, self.reward = context, judge.load(context)
        self.scale = judge.scale(self.reward)
        metric = Metric(
            name=name, label=judge.label, direction="higher", unit="", family="held-out reward", decimals=judge.decimals
        )
        fields = context.protocol(reward=self.reward.fingerprint(), scale=self.scale)
        self.quantities = (Quantity(metric, fields),)
        self.scores = np.full(len(context.prompts), np.nan)

    @torch.inference_mode()
    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        values = self.scale * self.reward(images, [prompt.text for prompt in prompts]).double().cpu().numpy()
        if not np.isfinite(values).all():
            first = prompts[int(np.argmin(np.isfinite(values)))]
            raise RgbenchError(f"{self.quantities[0].metric.label} of {first.id!r} is not finite")
        self.scores[positions] = values

    def finish(self) -> list[Measurement]:
        return [score_measurement(self.context, self.quantities[0], self.scores, self.reward)]


def _weights(context: Context, name: str, published: str) -> Path:
    return context.judges.get(name) or find_published(published, f"--judge {name}=PATH")


def _clip_score(context: Context) -> CLIPScoreReward:
    path = _weights(context, "clip_score", "clip_score")
    return CLIPScoreReward.load(path, antialias=True, device=context.device)


def _pickscore(context: Context) -> PickScoreReward:
    path = _weights(context, "pickscore", "pickscore")
    return PickScoreReward.load(path, antialias=True, device=context.device)


def _aesthetic(context: Context) -> AestheticReward:
    path, head = _weights(context, "aesthetic", "aesthetic"), _weights(context, HEAD, "aesthetic mlp head")
    return AestheticReward.load(path, head="mlp", head_path=head, antialias=True, device=context.device)


JUDGES = {
    "clip_score": Judge("CLIPScore", 2, _clip_score, lambda reward: 100.0),
    "pickscore": Judge("PickScore", 2, _pickscore, lambda reward: reward.logit_scale),
    "aesthetic": Judge("Aesthetic", 2, _aesthetic, lambda reward: 1.0),
}


def clip_score(context: Context) -> RewardJudge:
    """CLIPScore as a metric; raises as :class:`RewardJudge`."""
    return RewardJudge(context, "clip_score", JUDGES["clip_score"])


def pickscore(context: Context) -> RewardJudge:
    """PickScore as a metric; raises as :class:`RewardJudge`."""
    return RewardJudge(context, "pickscore", JUDGES["pickscore"])


def aesthetic(context: Context) -> RewardJudge:
    """LAION's aesthetic predictor as a metric; raises as :class:`RewardJudge`."""
    return RewardJudge(context, "aesthetic", JUDGES["aesthetic"])
