"""HPSv2 and HPSv2.1: a CLIP fine-tuned on human preferences (arXiv 2306.09341).

The benchtop's reward is the same at 1/8 scale.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rgbench.rewards.clip import OpenCLIPReward
from rgbench.rewards.preprocess import hps_preprocess


class HPSReward(OpenCLIPReward):
    """Raw cosine of image and prompt, (B,), about 0.2 to 0.35 for HPSv2.1; see :class:`OpenCLIPReward`."""

    name = "hps"
    geometry: ClassVar[dict[str, str]] = {
        "resize": "longest side, on the tensor",
        "pad": "zero, centred, before normalisation",
    }

    def preprocess(self, images: Tensor) -> Tensor:
        """The whole image, padded to a square."""
        return hps_preprocess(images, self.size, self.antialias, self.mean, self.std)
