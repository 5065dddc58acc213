"""Real scenes for a list of prompts: the same attributes, drawn anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rgbench.data.prompts import PromptSet
from rgbench.errors import UsageError
from rgbench.metrics.kept import keep_array
from rgbench.metrics.tracking import Track, untracked
from rgbench.worlds.scenes import Scenes, render, sample_scenes

if TYPE_CHECKING:
    from rgbench.metrics.features import FeatureNetwork, InputBatch

SPLIT = "test"  # its nuisance stream (jitter, rotation, texture) is never trained on
CHUNK = 256
BATCH = 64

T = TypeVar("T")


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] → 0 … 255, rounded: what a lossless 8-bit file holds."""
    return (images * 255).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """0 … 255 → float32 in [0, 1]."""
    return images.float() / 255


class ReferenceScenes:
    """One real scene per prompt, with the prompt's attributes.

    Scene i takes its jitter, rotation and texture from position ``start`` + i of the test split's
    stream, so neither side of a comparison was ever trained on, and held-out
    combinations are as frequent on both.

    Args:
        prompts: what the models are asked for.
        cache: folder for figures that can be computed again.
        track: gives batches back one by one while it shows what is being done.
        start: position of the stream that belongs to the first prompt.
    """

    def __init__(self, prompts: PromptSet, cache: Path, track: Track = untracked, start: int = 0) -> None:
        self.prompts, self.cache, self.track, self.start = prompts, cache, track, start
        self._remembered: dict[str, Any] = {}

    @cached_property
    def scenes(self) -> Scenes:
        """The attributes.

        Raises:
            UsageError: a prompt without a scene, or with one that cannot be; it is named.
        """
        for prompt in self.prompts.prompts:
            if not prompt.scene:
                raise UsageError(
                    f"{self.prompts.name}: prompt {prompt.id!r} has no scene to compare its image with; use the "
                    "benchtop's prompts (no --prompts), a .jsonl with 'scene' in every row, --metric hps, or, for set "
                    "metrics, real images of your own: --reference FOLDER"
                )
        try:
            scenes = Scenes.from_dicts([prompt.scene for prompt in self.prompts.prompts if prompt.scene])
        except ValueError as error:
            raise UsageError(f"{self.prompts.name}: {error}") from error
        two = scenes.count == 2
        for slots in (scenes.shape, scenes.colour, scenes.size):
            wrong = (slots[:, 0] < 0) | ((slots[:, 1] >= 0) != two)
            if wrong.any():
                prompt = self.prompts.prompts[int(wrong.nonzero()[0])]
                raise UsageError(
                    f"{self.prompts.name}: the scene of {prompt.id!r} needs shape, colour and size of one object, "
                    "or of two where its layout is a relation"
                )
        return scenes

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def content(self) -> str:
        """sha256 of the pixels."""
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def require(self, metric: str, num: int) -> None:
        """Check that there is a scene for each of at least ``num`` prompts.

        Raises:
            UsageError: a prompt without a possible scene, or fewer prompts.
        """
        try:
            num_scenes = len(self.scenes)
        except UsageError as error:
            raise UsageError(f"metric {metric}: {error}") from error
        if num_scenes < num:
            raise UsageError(f"metric {metric} needs at least {num} images, not {num_scenes}; raise --num")

    def inputs(self, network: FeatureNetwork) -> Iterator[InputBatch]:
        """Batches of a network's inputs, in prompt order."""
        from rgbench.metrics.features import InputBatch

        small = network.smallest is not None and network.smallest > self.images.shape[-1]
        for batch in self.track(self.images.split(BATCH), f"real scenes: {network.name} features"):
            yield InputBatch(network.prepare(from_uint8(batch)), small * len(batch))

    def fields(self) -> dict[str, Any]:
        """Protocol fields: what was rendered, from which stream, by which renderer."""
        first = f"{self.start} + " if self.start else ""
        return {
            "kind": "real scenes with the prompts' attributes",
            "scenes_sha256": self.sha256,
            "num": len(self.prompts),
            "nuisance": f"{SPLIT} split, index = {first}position in the prompt list",
            "renderer": self.remember("renderer", renderer_digest),
        }

    @cached_property
    def sha256(self) -> str:
        """Hash over the attributes in order."""
        rows = json.dumps([prompt.scene for prompt in self.prompts.prompts], sort_keys=True)
        return hashlib.sha256(rows.encode()).hexdigest()

    @cached_property
    def images(self) -> Tensor:
        """(n, 3, 64, 64) uint8, in prompt order."""
        spans = torch.arange(len(self.scenes)).split(CHUNK)
        tracked = self.track(spans, "real scenes: rendering")
        return torch.cat([to_uint8(render(self.scenes[at], SPLIT, self.start + at.numpy())) for at in tracked])

    def keep(self, owner: object, fields: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """``make()``, once per pixels, fields and code: what ``owner`` reads in these images, in the cache folder."""
        return keep_array(self.cache, owner, {"images": self.content, **fields}, make)

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
