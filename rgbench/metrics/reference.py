"""Real scenes for a list of prompts: the same attributes, drawn anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rgbench.data.prompts import PromptSet
from rgbench.worlds.scenes import Scenes, render, sample_scenes

SPLIT = "test"  # its nuisance stream (jitter, rotation, texture) is never trained on
CHUNK = 256

T = TypeVar("T")


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] → 0 … 255, rounded: what a lossless 8-bit file holds."""
    return (images * 255).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """0 … 255 → float32 in [0, 1]."""
    return images.float() / 255


class ReferenceScenes:
    """One real scene per prompt, with the prompt's attributes.

    Scene i takes its jitter, rotation and texture from position i of the test split's
    stream, so neither side of a comparison was ever trained on, and held-out
    combinations are as frequent on both.

    Args:
        prompts: what the models are asked for; those without attributes have no reference.
        cache: folder for figures that can be computed again.
    """

    def __init__(self, prompts: PromptSet, cache: Path) -> None:
        self.attributes = [prompt.scene for prompt in prompts.prompts if prompt.scene]
        self.cache = cache
        self._remembered: dict[str, Any] = {}

    def fields(self) -> dict[str, Any]:
        """Protocol fields: what was rendered, from which stream, by which renderer."""
        return self.remember("fields", self._fields)

    def _fields(self) -> dict[str, Any]:
        canonical = json.dumps(self.attributes, sort_keys=True)
        return {
            "kind": "real scenes with the prompts' attributes",
            "scenes_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "num": len(self.attributes),
            "nuisance": f"{SPLIT} split, index = position in the prompt list",
            "renderer": renderer_digest(),
        }

    @cached_property
    def images(self) -> Tensor:
        """(n, 3, 64, 64) uint8, in prompt order."""
        scenes = Scenes.from_dicts(self.attributes)
        spans = [range(i, min(i + CHUNK, len(scenes))) for i in range(0, len(scenes), CHUNK)]
        return torch.cat([to_uint8(render(scenes[span.start : span.stop], SPLIT, span)) for span in spans])

    def remember(self, key: str, make: Callable[[], T]) -> T:
        """``make()``, once per process and key: statistics that every evaluated model is compared with."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]


def renderer_digest() -> str:
    """8 hex digits that change with the renderer, and not with a processor's last bits.

    They hash mean, deviation and mean horizontal step of eight scenes, to three digits.
    """
    images = render(sample_scenes(SPLIT, range(8)), SPLIT, range(8))
    steps = images.diff(dim=-1).abs().mean((1, 2, 3))
    numbers = torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), steps]).flatten().tolist()
    return hashlib.sha256(" ".join(f"{x:.3f}" for x in numbers).encode()).hexdigest()[:8]
