"""Held-out judges: rewards that no student here was trained on, as metrics.

A student that learned to please one reward model should please the others too, if its images got better.

    clip_score  100 · cosine of CLIP ViT-H-14 (arXiv 2104.08718, without its factor 2.5)
    pickscore   exp(logit scale) · cosine (arXiv 2305.01569), about 20
    aesthetic   LAION's improved predictor, a rating from 1 to 10; it reads no prompt

Weights are those given with ``--judge NAME=PATH``, else the published ones in the local caches.

Every other reward is a judge too, under a name of one's own: ``--judge NAME=FILE.yaml`` with a recipe's reward section
in the file, and ``--metric NAME``. Three of them have a label here, since they are published, and need an environment
of their own (:mod:`rgbench.rewards.remote`):

    imagereward  arXiv 2304.05977, normalised, about 0
    hpsv3        arXiv 2508.03789, μ, about 0 to 15
    vqascore     arXiv 2404.01291, a probability

Reward of the HPS form, 100 · cosine, with antialiasing on and off side by side; lossless, or through JPEG.

Antialiasing on and off are two protocols; their gap is itself a probe, because what only the aliased
resize lets through cannot be seen at the size the reward model looks at.

    hps         of the images as they are
    hps_jpeg75  of the images through JPEG at quality 75, as the published HPSv2 figures were made

What every reward gives as a metric: the mean over images, an interval over prompts, each image's score.

What JPEG does to images: the published HPSv2 figures were measured through it, and fragility asks what it costs.

The world's reward model as probes use it: loaded once per command, a batch scored once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.core.config import load_yaml, validate
from rgbench.core.errors import RgbenchError, UsageError, suggest
from rgbench.core.io import open_image
from rgbench.core.registry import TABLES, resolve
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import Measurement, Metric, Quantity
from rgbench.metrics.context import Context
from rgbench.metrics.reference import to_uint8
from rgbench.metrics.statistics import bootstrap_interval
from rgbench.rewards.aesthetic import AestheticReward
from rgbench.rewards.clip import CLIPScoreReward, HPSReward, PickScoreReward
from rgbench.rewards.config import HPS_V21_FILE, OneReward, find_published
from rgbench.rewards.load import load_reward


def score_measurement(context: Context, quantity: Quantity, rows: np.ndarray, reward: Any) -> Measurement:
    """The figure of one reward.

    Args:
        context: of the evaluation.
        quantity: its name and protocol.
        rows: (n,) scores in prompt order.
        reward: whose weights say whether the model was trained on it.
    """
    trained = [_identity(entry["fingerprint"]) for entry in context.trained_rewards]
    return Measurement(
        quantity=quantity,
        value=float(rows.mean()),
        interval=bootstrap_interval(context.over_prompts(rows)),
        num_samples=len(rows),
        in_sample=_identity(reward.fingerprint()) in trained,
        extra={"groups": context.by_group(rows)},
        rows=rows,
    )


def _identity(fingerprint: Mapping[str, Any]) -> tuple[Any, ...]:
    """A reward's weights; of one without, its name and code."""
    weights = fingerprint.get("weights_sha256")
    return (weights, *(fingerprint.get(key) for key in ("name", "code_sha256") if weights in (None, "none")))


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


JPEG_QUALITY = 75  # Pillow's default, with which HPSv2's benchmark images were saved


def through_jpeg(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] through JPEG at quality 75, 4:2:0, and back."""
    decoded = []
    for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
        decoded.append(np.asarray(open_image(file.getvalue())))
    return (torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255).to(images.device)


SCALE = 100  # scores are shown as 100 · cosine


class SharedReward:
    """100 · cosine of images and their prompts, with the last batch's scores kept.

    Args:
        reward: the model.
    """

    def __init__(self, reward: HPSReward) -> None:
        self.reward = reward
        self._last: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float64 scores; asked again for the same tensor, the same scores.

        Raises:
            RgbenchError: a score that is not finite; names the prompt.
        """
        if self._last is None or self._last[0] is not images:
            scores = SCALE * self.reward(images, [prompt.text for prompt in prompts]).double()
            if not scores.isfinite().all():
                first = prompts[int(scores.isfinite().int().argmin())]
                raise RgbenchError(f"the reward of {first.id!r} is not finite")
            self._last = images, scores
        return self._last[1]


def shared_reward(context: Context, antialias: bool) -> SharedReward:
    """The world's reward model under one antialias setting, the same object for all that ask in one command;
    both settings share one network.

    Raises:
        UsageError: its folder is incomplete; or HPSv2.1's published file is not here, with the command that gets it.
    """
    folder = context.reward_folder
    if folder == Path(HPS_V21_FILE) and not folder.exists():
        find_published("hps 2.1", "--hps")

    name = f"reward {folder} {context.device}"

    def load() -> HPSReward:
        return HPSReward.load(folder, antialias=True, device=context.device)

    def share() -> SharedReward:
        return SharedReward(context.reference.remember(name, load).with_antialias(antialias))

    return context.reference.remember(f"{name} {antialias}", share)


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
