"""CLIPScore (arXiv 2104.08718) with any open_clip CLIP; at full size ViT-H-14 trained on laion2b.

The score here is the cosine itself. The paper's is 2.5 · max(cosine, 0), whose gradient would vanish below zero.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rgbench.rewards.clip import OpenCLIPReward
from rgbench.rewards.preprocess import CLIP_GEOMETRY, clip_preprocess


class CLIPScoreReward(OpenCLIPReward):
    """Raw cosine of image and prompt, (B,); see :class:`OpenCLIPReward`."""

    name = "clip_score"
    geometry: ClassVar[dict[str, str]] = CLIP_GEOMETRY

    def preprocess(self, images: Tensor) -> Tensor:
        """The centre square."""
        return clip_preprocess(images, self.size, self.antialias, self.mean, self.std)
