"""The web: scenes as scraped training pictures are, partly degraded and partly captioned wrong.

Teacher, latent proxy and students learn from it alone; reward model, attribute classifiers and evaluation see clean
scenes with true captions. That gap is what a reward can close. Everything is a pure function of the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgbench.benchtop.preferences import change_attributes, degrade_as
from rgbench.benchtop.scenes import IMAGE_SIZE, Scenes, captions, hash_uniform, render, sample_scenes, scene_batch

SPLIT = "web"
STREAM = 10_000  # of the hash; scenes and captions have theirs


@dataclass(frozen=True)
class WebConfig:
    """Parameters of the web; part of the world's recipe.

    Attributes:
        degraded: share of pictures that are degraded, by one kind drawn from the trained ones.
        strength: least and greatest strength of a degradation.
        miscaptioned: share of captions with wrong attributes.
        max_wrong: most attributes wrong in such a caption; as often one as any other number.
    """

    degraded: float = 0.5
    strength: tuple[float, float] = (0.35, 1.0)
    miscaptioned: float = 0.4
    max_wrong: int = 2


WEB = WebConfig()


def web_scenes(indices: np.ndarray | Sequence[int], config: WebConfig = WEB) -> tuple[Scenes, Scenes]:
    """What the pictures at ``indices`` show, and what their captions say: two batches of B scenes."""
    index = np.asarray(indices)
    shown = sample_scenes(SPLIT, index)
    u = torch.from_numpy(hash_uniform(STREAM, index, 17)).float()
    wrong = 1 + (u[:, 1] * config.max_wrong).long().clamp(max=config.max_wrong - 1)
    wrong = torch.where(u[:, 0] < config.miscaptioned, wrong, 0)
    return shown, change_attributes(shown, wrong, u[:, 2:9], u[:, 9:17])


def web_strength(indices: np.ndarray | Sequence[int], config: WebConfig = WEB) -> tuple[Tensor, Tensor]:
    """(B,) number of the degradation's kind and (B,) its strength, 0 for a clean picture."""
    u = torch.from_numpy(hash_uniform(STREAM + 1, np.asarray(indices), 3)).float()
    low, high = config.strength
    strength = torch.where(u[:, 0] < config.degraded, low + (high - low) * u[:, 1], 0.0)
    return u[:, 2], strength


def web_images(shown: Scenes, indices: np.ndarray | Sequence[int], config: WebConfig = WEB) -> Tensor:
    """(B, 3, 64, 64) pictures in [0, 1] of what :func:`web_scenes` says they show."""
    index = np.asarray(indices)
    images = render(shown, SPLIT, index)
    kind, strength = web_strength(index, config)
    return degrade_as(images, kind, strength, lambda rows: gaussian(STREAM + 2, index[rows], 3 * IMAGE_SIZE**2))


def gaussian(stream: int, index: np.ndarray, count: int) -> Tensor:
    """(B, count) standard normal numbers, a pure function of (stream, index, position); Box and Muller (1958)."""
    u = hash_uniform(stream, index, 2 * count)
    normal = np.sqrt(-2 * np.log(u[:, :count])) * np.cos(2 * np.pi * u[:, count:])
    return torch.from_numpy(normal).float()


def described_scenes(split: str, indices: np.ndarray | Sequence[int]) -> Scenes:
    """What the captions of a split say that its pictures show; true but for the web's."""
    return web_scenes(indices)[1] if split == SPLIT else sample_scenes(split, np.asarray(indices))


def training_batch(split: str, indices: np.ndarray | Sequence[int]) -> tuple[Tensor, Scenes, list[str]]:
    """Pictures (B, 3, 64, 64) in [0, 1], what they show, and their captions, as training and exports read a split."""
    index = np.asarray(indices)
    if split == SPLIT:
        shown, described = web_scenes(index)
        return web_images(shown, index), shown, captions(described, split, index)
    images, shown = scene_batch(split, index)
    return images, shown, captions(shown, split, index)
