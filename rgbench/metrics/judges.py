"""Held-out judges: rewards that no student here was trained on, as metrics.

A student that learned to please one reward model should please the others too, if its images got better.

    clip_score  100 · cosine of CLIP ViT-H-14 (arXiv 2104.08718, without its factor 2.5)
    pickscore   exp(logit scale) · cosine (arXiv 2305.01569), about 20
    aesthetic   LAION's improved predictor, a rating from 1 to 10; it reads no prompt

Weights are those given with ``--judge NAME=PATH``, else the published ones in the local caches.

Every other reward is a judge too, under a name of one's own: ``--judge NAME=FILE.yaml`` with a recipe's reward section
in the file, and ``--metric NAME``. Three of them have a label here, since they are published, and need an environment
of their own (:mod:`rgbench.rewards.process`):

    imagereward  arXiv 2304.05977, normalised, about 0
    hpsv3        arXiv 2508.03789, μ, about 0 to 15
    vqascore     arXiv 2404.01291, a probability
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgbench.config import load_yaml, validate
from rgbench.data.prompts import Prompt
from rgbench.errors import ConfigError, RgbenchError, UsageError, suggest
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.scored import score_measurement
from rgbench.registry import TABLES, resolve
from rgbench.rewards.aesthetic import AestheticReward
from rgbench.rewards.clip_score import CLIPScoreReward
from rgbench.rewards.config import OneReward
from rgbench.rewards.load import load_reward
from rgbench.rewards.pickscore import PickScoreReward
from rgbench.rewards.published import find_published

LABELS = {"hpsv3": ("HPSv3", 2), "imagereward": ("ImageReward", 3), "vqascore": ("VQAScore", 4)}
OWN_NAME = re.compile(r"[a-z][a-z0-9_]*")
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


def hpsv3(context: Context) -> RewardJudge:
    """HPSv3 as a metric; raises as :func:`from_file`."""
    return from_file("hpsv3", context)


def imagereward(context: Context) -> RewardJudge:
    """ImageReward as a metric; raises as :func:`from_file`."""
    return from_file("imagereward", context)


def vqascore(context: Context) -> RewardJudge:
    """VQAScore as a metric; raises as :func:`from_file`."""
    return from_file("vqascore", context)


def from_file(name: str, context: Context) -> RewardJudge:
    """The reward of a file as a metric.

    Args:
        name: of the metric, and under which ``context.judges`` has the file.
        context: of the evaluation.

    Raises:
        UsageError: no file, or its reward cannot be loaded.
        ConfigError: its contents are not one reward's section.
    """
    if name not in context.judges:
        raise UsageError(
            f"metric {name} needs a Python environment of its own: --judge {name}=FILE.yaml, with kind: process, "
            f"python: that environment's interpreter, and worker: {name}"
        )
    label, decimals = LABELS.get(name, (name, 4))
    judge = Judge(label, decimals, partial(_load_file, context.judges[name]), lambda reward: 1.0)
    return RewardJudge(context, name, judge)


def _load_file(path: Path, context: Context) -> Any:
    values, lines = load_yaml(path)
    for unused in ("scale", "window", "logit_scale"):
        if unused in values:
            raise ConfigError("is for training; a judge's scores are shown as they are", path=path, key=unused)
    return load_reward(validate(OneReward, values, lines, path), device=context.device, key=f"{path}: reward")


def parse_judges(given: Sequence[str]) -> dict[str, Path]:
    """Weights, or files with a reward's section, by name.

    Args:
        given: ``NAME=PATH`` each.

    Raises:
        UsageError: no such form, or a name that is another metric's.
    """
    known = (*JUDGES, HEAD, "cmmd", *LABELS)
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        own = path.endswith((".yaml", ".yml")) and OWN_NAME.fullmatch(name)
        if not path or (name not in known and not own):
            raise UsageError(
                f"--judge {text!r}: expected NAME=PATH, or a name of your own and a .yaml file; {suggest(name, known)}"
            )
        if name not in known and any(name in TABLES[table] for table in ("metric", "probe")):
            raise UsageError(f"--judge {text!r}: {name} is a metric of another kind; take another name")
        found[name] = Path(path)
    return found


def check_judges_asked(judges: Mapping[str, Path], metrics: Sequence[str]) -> None:
    """Refuse a judge of one's own that would be left unasked; metrics may share weights, but not such a file.

    Raises:
        UsageError: names it.
    """
    for name in judges:
        if name not in (*JUDGES, HEAD, "cmmd", *metrics):
            raise UsageError(f"--judge {name}={judges[name]}: is not asked for; add {name} to --metric")


def find_metric(name: str, judges: Mapping[str, Path]) -> Callable[[Context], Any]:
    """The metric of a name: rgbench's, a plug-in's, or the judge that a file was given for.

    Raises:
        UsageError: none.
    """
    if name in judges and name != HEAD and name not in TABLES["metric"]:
        return partial(from_file, name)
    return resolve("metric", name)
