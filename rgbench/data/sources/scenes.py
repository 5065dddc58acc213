"""Benchtop scenes as training data: rendered when asked for, without end or in epochs."""

from __future__ import annotations

import hashlib
from typing import Any

from rgbench.data.config import ScenesData
from rgbench.data.contract import Batch
from rgbench.worlds.captions import captions
from rgbench.worlds.scenes import sample_scenes, scene_batch


class ScenesSource:
    """Scenes of one split, by index.

    Args:
        section: ``data:`` of the recipe; its ``num`` gives the length.
    """

    name = "scenes"

    def __init__(self, section: ScenesData):
        self._split = section.split
        self.length: int | None = section.num

    def fingerprint(self) -> dict[str, Any]:
        """Split, length, and a hash over the first captions, which changes when the world does."""
        first = range(64)
        texts = captions(sample_scenes(self._split, first), self._split, first)
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        return {"kind": "scenes", "split": self._split, "num": self.length, "sha256": digest}

    def load(self, indices: list[int]) -> Batch:
        """Render the scenes at ``indices``; (B, 3, 64, 64)."""
        images, scenes = scene_batch(self._split, indices)
        ids = [f"{self._split}/{index}" for index in indices]
        return Batch(images, captions(scenes, self._split, indices), ids)
