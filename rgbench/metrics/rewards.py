"""Rewards as metrics: the mean score over images, its interval over prompts, and each image's score.

    hps         100 · cosine of the world's own reward model, with antialiasing in its resize and without
    hps_jpeg75  the same of images through JPEG at quality 75, as the published HPSv2 values were made

Held-out rewards are those that no student here was trained on: a student whose images got better pleases them too.

    clip_score  100 · cosine of CLIP ViT-H-14 (arXiv 2104.08718, without its factor 2.5)
    pickscore   exp(logit scale) · cosine (arXiv 2305.01569), about 20
    aesthetic   LAION's improved predictor, a rating from 1 to 10; it reads no prompt

Their weights come from ``--judge NAME=PATH``, or from the local caches. Any other reward is measured under a name of
the user's own with ``--judge NAME=FILE.yaml``, a recipe's reward section, and ``--metric NAME``. Three published ones
need a Python environment of their own (:mod:`rgbench.rewards.remote`):

    imagereward  arXiv 2304.05977, normalised, about 0
    hpsv3        arXiv 2508.03789, μ, about 0 to 15
    vqascore     arXiv 2404.01291, a probability
"""

from __future__ import annotations

import io
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.core.config import load_yaml, validate
from rgbench.core.errors import RgbenchError, UsageError, suggest
from rgbench.core.io import open_image
from rgbench.core.registry import TABLES, names, resolve
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import Metric
from rgbench.metrics.context import Context
from rgbench.metrics.reference import to_uint8
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol
from rgbench.rewards.aesthetic import AestheticReward
from rgbench.rewards.clip import CLIPScoreReward, HPSReward, PickScoreReward
from rgbench.rewards.config import HPS_V21_FILE, OneReward, find_published
from rgbench.rewards.load import load_reward

JPEG_QUALITY = 75  # Pillow's default, with which HPSv2's benchmark images were saved
SCALE = 100  # the HPS form is shown as 100 · cosine
OWN, HELD_OUT = (Direction.HIGHER, Family.REWARD), (Direction.HIGHER, Family.HELD_OUT)
OWN_NAME = re.compile(r"[a-z][a-z0-9_]*")


def through_jpeg(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] through JPEG at quality 75, 4:2:0, and back."""
    decoded = []
    for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
        decoded.append(np.asarray(open_image(file.getvalue())))
    return (torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255).to(images.device)


class SharedReward:
    """100 · cosine of images and their prompts; it keeps the last batch's scores.

    Args:
        reward: the model.
    """

    def __init__(self, reward: HPSReward) -> None:
        self.reward = reward
        self._last: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float64 scores; computed once for one tensor.

        Raises:
            RgbenchError: a score is not finite; names the prompt.
        """
        if self._last is None or self._last[0] is not images:
            scores = SCALE * self.reward(images, [prompt.text for prompt in prompts]).double()
            _check_finite("the reward", scores, prompts)
            self._last = images, scores
        return self._last[1]


def shared_reward(context: Context, antialias: bool) -> SharedReward:
    """The world's reward model under one antialias setting: one object for all metrics and probes of a command.

    Both settings share one network.

    Raises:
        UsageError: its folder is incomplete, or HPSv2.1's published file is missing; gives the command that gets it.
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


class RewardMetric(Metric):
    """Mean score of one or several rewards."""

    per_image_state = ("scores",)
    scores: np.ndarray

    def mean_score(self, planned: tuple[str, Protocol], rows: np.ndarray, reward: Any) -> MetricValue:
        """The value of (n,) scores in prompt order; the reward's weights say whether the model was trained on it."""
        trained = [_identity(entry["fingerprint"]) for entry in self.context.trained_rewards]
        return replace(self.mean_value(planned, rows), in_sample=_identity(reward.fingerprint()) in trained)


class HPSScore(RewardMetric):
    """Mean score of the world's own reward model, with antialiasing in its resize and without: two protocols.

    Args:
        context: any prompts.

    Raises:
        UsageError: the reward model's folder is incomplete.
    """

    name = "hps"
    infos = (
        MetricInfo.of("hps", "HPS", "score of the world's reward model", *OWN),
        MetricInfo.of("hps_no_antialias", "HPS, no antialias", "HPS with a resize that aliases", *OWN),
    )

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.shared = [shared_reward(context, antialias) for antialias in (True, False)]
        self.planned = tuple(
            (info.name, Protocol.of(info.name, self.fields(shared.reward)))
            for info, shared in zip(self.infos, self.shared, strict=True)
        )
        self.scores = np.full((2, len(context.prompts)), np.nan)

    def fields(self, reward: HPSReward) -> dict[str, Any]:
        """Protocol fields."""
        return self.context.protocol(reward=reward.fingerprint(), scale=SCALE)

    def rewards(self) -> list[Any]:
        return [self.shared[0].reward]

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        for scores, shared in zip(self.scores, self.shared, strict=True):
            scores[positions] = shared(images, prompts).cpu().numpy()

    def compute(self) -> list[MetricValue]:
        return [
            self.mean_score(planned, rows, shared.reward)
            for planned, rows, shared in zip(self.planned, self.scores, self.shared, strict=True)
        ]


class HPSThroughJPEG(HPSScore):
    """HPS of images through JPEG at quality 75; raises as :class:`HPSScore`."""

    name = "hps_jpeg75"
    infos = (
        MetricInfo.of("hps_jpeg75", "HPS, JPEG 75", "HPS of images through JPEG at quality 75", *OWN),
        MetricInfo.of(
            "hps_jpeg75_no_antialias", "HPS, JPEG 75, no antialias", "HPS as published HPSv2 values are", *OWN
        ),
    )
    default = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.shared = [SharedReward(each.reward) for each in self.shared]  # the probes' last scores stay cached

    def fields(self, reward: HPSReward) -> dict[str, Any]:
        """Protocol fields."""
        fields, through = super().fields(reward), f"quality {JPEG_QUALITY}, 4:2:0"
        given = fields["jpeg"]
        return {**fields, "jpeg": f"{given}, then {through}" if given else through}

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        super().update(through_jpeg(images), prompts, positions)


class HeldOutReward(RewardMetric):
    """Mean score of a reward that students were not trained on.

    Args:
        context: any prompts.

    Raises:
        UsageError: its weights are missing; says what they are, their size and how to get them.
    """

    default = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.reward, self.scale = self.load()
        fields = context.protocol(reward=self.reward.fingerprint(), scale=self.scale)
        self.planned = ((self.name, Protocol.of(self.name, fields)),)
        self.scores = np.full(len(context.prompts), np.nan)

    @abstractmethod
    def load(self) -> tuple[Any, float]:
        """The reward, and the factor by which its scores are shown."""

    def rewards(self) -> list[Any]:
        return [self.reward]

    @torch.inference_mode()
    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        values = self.scale * self.reward(images, [prompt.text for prompt in prompts]).double()
        _check_finite(self.infos[0].label, values, prompts)
        self.scores[positions] = values.cpu().numpy()

    def compute(self) -> list[MetricValue]:
        return [self.mean_score(self.planned[0], self.scores, self.reward)]

    def weights(self, name: str, published: str) -> Path:
        """The file given with ``--judge``, else the published one in the local caches."""
        return self.context.judges.get(name) or find_published(published, f"--judge {name}=PATH")


class CLIPScore(HeldOutReward):
    """CLIPScore of CLIP ViT-H-14; raises as :class:`HeldOutReward`."""

    name = "clip_score"
    infos = (MetricInfo.of(name, "CLIPScore", "100 · cosine of CLIP ViT-H-14", *HELD_OUT),)
    needs = ("clip_score",)

    def load(self) -> tuple[Any, float]:
        path = self.weights("clip_score", "clip_score")
        return CLIPScoreReward.load(path, antialias=True, device=self.context.device), 100.0


class PickScore(HeldOutReward):
    """PickScore; raises as :class:`HeldOutReward`."""

    name = "pickscore"
    infos = (MetricInfo.of(name, "PickScore", "human preference, about 20", *HELD_OUT),)
    needs = ("pickscore",)

    def load(self) -> tuple[Any, float]:
        path = self.weights("pickscore", "pickscore")
        reward = PickScoreReward.load(path, antialias=True, device=self.context.device)
        return reward, reward.logit_scale


class Aesthetic(HeldOutReward):
    """LAION's aesthetic predictor; raises as :class:`HeldOutReward`."""

    name = "aesthetic"
    infos = (MetricInfo.of(name, "Aesthetic", "LAION's rating from 1 to 10; it reads no prompt", *HELD_OUT),)
    needs = ("aesthetic", "aesthetic_head")

    def load(self) -> tuple[Any, float]:
        path, head = self.weights("aesthetic", "aesthetic"), self.weights("aesthetic_head", "aesthetic mlp head")
        return AestheticReward.load(path, head="mlp", head_path=head, antialias=True, device=self.context.device), 1.0


class FileReward(HeldOutReward):
    """The reward that a file of ``--judge NAME=FILE.yaml`` describes, under that name.

    Args:
        context: any prompts.

    Raises:
        UsageError: no file, or its reward cannot be loaded.
        ConfigError: its contents are not one reward's section.
    """

    def load(self) -> tuple[Any, float]:
        if self.name not in self.context.judges:
            raise UsageError(
                f"metric {self.name} needs a Python environment of its own: --judge {self.name}=FILE.yaml, with "
                f"kind: process, python: that environment's interpreter, and worker: {self.name}"
            )
        path = self.context.judges[self.name]
        values, lines = load_yaml(path)
        section: Any = validate(OneReward, values, lines, path)
        return load_reward(section, device=self.context.device, key=f"{path}: reward"), 1.0


class HPSv3(FileReward):
    """HPSv3; raises as :class:`FileReward`."""

    name = "hpsv3"
    infos = (MetricInfo.of(name, "HPSv3", "human preference, about 0 to 15", *HELD_OUT),)
    needs = (name,)


class ImageReward(FileReward):
    """ImageReward; raises as :class:`FileReward`."""

    name = "imagereward"
    infos = (MetricInfo.of(name, "ImageReward", "human preference, normalised, about 0", *HELD_OUT, decimals=3),)
    needs = (name,)


class VQAScore(FileReward):
    """VQAScore; raises as :class:`FileReward`."""

    name = "vqascore"
    infos = (MetricInfo.of(name, "VQAScore", "probability that the image shows the prompt", *HELD_OUT, decimals=4),)
    needs = (name,)


def find_metric(name: str, judges: Mapping[str, Path]) -> type[Metric]:
    """The metric of a name: rgbench's, a plug-in's, or one made for the reward of a user's file.

    Args:
        name: on the command line.
        judges: files by name, from :func:`parse_judges`.

    Raises:
        UsageError: there is none.
    """
    if name in judges and name not in TABLES["metric"] and name not in _judge_names():
        info = MetricInfo.of(name, name, "a reward of the user's own", *HELD_OUT, decimals=4)
        return type("OwnReward", (FileReward,), {"name": name, "infos": (info,), "needs": (name,)})
    kind: type[Metric] = resolve("metric", name)
    return kind


def parse_judges(given: Sequence[str]) -> dict[str, Path]:
    """Weights, or files with a reward's section, by name.

    Args:
        given: ``NAME=PATH`` each.

    Raises:
        UsageError: not of this form, or the name of another metric.
    """
    found, known = {}, _judge_names()
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
    """Refuse the file of a reward that no metric measures; other weights may serve several metrics.

    Raises:
        UsageError: names it.
    """
    known = _judge_names()
    for name, path in judges.items():
        if issubclass(known.get(name, FileReward), FileReward) and name not in metrics:
            raise UsageError(f"--judge {name}={path}: is not asked for; add {name} to --metric")


def _judge_names() -> dict[str, type[Metric]]:
    """Names under which ``--judge`` takes files, and the metric that needs each."""
    kinds: list[type[Metric]] = [resolve("metric", name) for name in names("metric")]
    return {need: kind for kind in kinds for need in kind.needs}


def _check_finite(label: str, scores: Tensor, prompts: Sequence[Prompt]) -> None:
    finite = scores.isfinite()
    if not finite.all():
        raise RgbenchError(f"{label} of {prompts[int(finite.int().argmin())].id!r} is not finite")


def _identity(fingerprint: Mapping[str, Any]) -> tuple[Any, ...]:
    """A reward's weights; of one without, its name and code."""
    weights = fingerprint.get("weights_sha256")
    return (weights, *(fingerprint.get(key) for key in ("name", "code_sha256") if weights in (None, "none")))
