"""PickScore: a CLIP-H fine-tuned on Pick-a-Pic preferences (arXiv 2305.01569), in transformers' layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from rgbench.files import sha256_file
from rgbench.rewards.preprocess import CLIP_GEOMETRY, CLIP_MEAN, CLIP_STD, clip_preprocess
from rgbench.rewards.texts import FeatureCache
from rgbench.rewards.transformers_clip import WEIGHTS, ClipTokenizer, image_features, load_clip, text_features


class PickScoreReward:
    """Raw cosine of image and prompt, (B,), about 0.2; × ``logit_scale`` (100) it is the published score.

    Args:
        model: a transformers ``CLIPModel``, frozen.
        tokenizer: texts → ids (B, L).
        antialias: of the image resize.
        weights_sha256: of the weight file.
    """

    name = "pickscore"
    differentiable = True

    def __init__(self, model: CLIPModel, tokenizer: ClipTokenizer, *, antialias: bool, weights_sha256: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.antialias, self.weights_sha256 = antialias, weights_sha256
        self.size = int(model.config.vision_config.image_size)
        self.logit_scale = float(model.logit_scale.exp())
        self._texts = FeatureCache(lambda texts: text_features(model, tokenizer(texts).to(model.device)))

    @classmethod
    def load(
        cls, path: str | Path, *, antialias: bool, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> PickScoreReward:
        """Load a reward.

        Args:
            path: a folder with config.json and model.safetensors; its tokenizer where it has one.
            antialias: of the image resize; the published preprocessing, PIL's, filters.
            device: where to put the weights.
            dtype: floating type of weights and arithmetic.

        Raises:
            UsageError: a file is missing, or the weights are not those of the configuration.
        """
        folder = Path(path)
        model = load_clip(folder, device, dtype)
        tokenizer = ClipTokenizer(folder, model.config.text_config.max_position_embeddings)
        return cls(model, tokenizer, antialias=antialias, weights_sha256=sha256_file(folder / WEIGHTS))

    def fingerprint(self) -> dict[str, Any]:
        """What changes the scores."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "size": self.size,
            **CLIP_GEOMETRY,
            "kernel": "bicubic",
            "antialias": self.antialias,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "token_limit": self.tokenizer.context_length,
            "tokenizer": self.tokenizer.source,
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
        }

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of images (B, 3, H, W) in [0, 1]; gradient reaches the images alone."""
        pixels = clip_preprocess(images.to(self.model.dtype), self.size, self.antialias)
        return (image_features(self.model, pixels) * self._texts(prompts)).sum(-1)
