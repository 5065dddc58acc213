"""LAION's aesthetic predictors: a head on the image features of OpenAI's CLIP ViT-L/14; the prompt is not read.

Two heads are published, whose scores are not comparable:

- ``mlp``: "improved aesthetic predictor", ``sac+logos+ava1-l14-linearMSE.pth``, five linear layers without
  activations between them (768 → 1024 → 128 → 64 → 16 → 1), ratings 1 to 10;
- ``linear``: "aesthetic predictor V1", ``sa_0_4_vit_l_14_linear.pth``, one linear layer (768 → 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from rgbench.core.errors import UsageError
from rgbench.core.io import check_tensors, load_tensors, sha256_file
from rgbench.rewards.clip import (
    CLIP_GEOMETRY,
    CLIP_MEAN,
    CLIP_STD,
    WEIGHTS,
    clip_of_shapes,
    clip_preprocess,
    config_sha256,
    image_features,
    load_clip,
)

HeadKind = Literal["mlp", "linear"]


def make_head(kind: HeadKind, width: int) -> nn.Module:
    """A head with the parameter names of its published file; ``width`` features in, 768 in both.

    The dropouts do nothing here; they number the MLP's layers as published.
    """
    if kind == "linear":
        return nn.Linear(width, 1)
    layers = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
    layers += [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.ModuleDict({"layers": nn.Sequential(*layers)})


class AestheticReward:
    """Predicted rating (B,), about 4 to 7 for photographs.

    Args:
        model: a transformers ``CLIPModel``, frozen.
        head: from :func:`make_head`.
        kind: which head.
        antialias: of the image resize.
        weights_sha256: of the CLIP's weight file.
        head_sha256: of the head's file.
        config_sha256: of :func:`rgbench.rewards.clip.config_sha256`.
    """

    name = "aesthetic"
    differentiable = True
    logit_scale: float | None = None  # a rating is no log-odds of a preference: an LRM needs proxy.logit_scale

    def __init__(
        self,
        model: CLIPModel,
        head: nn.Module,
        kind: HeadKind,
        *,
        antialias: bool,
        weights_sha256: str,
        head_sha256: str,
        config_sha256: str | None = None,
    ) -> None:
        self.config_sha256 = config_sha256
        self.model, self.kind = model, kind
        self.head: Any = head.requires_grad_(False).eval()
        self.antialias, self.weights_sha256, self.head_sha256 = antialias, weights_sha256, head_sha256
        self.size = int(model.config.vision_config.image_size)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        head: HeadKind,
        head_path: str | Path,
        antialias: bool,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> AestheticReward:
        """Load a reward.

        Args:
            path: OpenAI's CLIP ViT-L/14 in transformers' layout: config.json and model.safetensors.
            head: which of the published heads ``head_path`` is.
            head_path: its file (.pth: tensors only; or .safetensors).
            antialias: of the image resize; the published preprocessing, PIL's, filters.
            device: where to put the weights.
            dtype: floating type of weights and arithmetic.

        Raises:
            UsageError: a file is missing, or it is not this head.
        """
        folder, file = Path(path), Path(head_path)
        model = load_clip(folder, device, dtype)
        module = make_head(head, model.config.projection_dim)
        if not file.is_file():
            raise UsageError(f"{file}: no such file; give the {head} head of the aesthetic predictor")
        state = load_tensors(file)
        check_tensors(file, state, module.state_dict(), f"the {head} head for {path}", "name another head or model")
        module.load_state_dict(state)
        return cls(
            model,
            module.to(device, dtype),
            head,
            antialias=antialias,
            weights_sha256=sha256_file(folder / WEIGHTS),
            head_sha256=sha256_file(file),
            config_sha256=config_sha256(folder),
        )

    @classmethod
    def of_shapes(cls, path: Path, *, head: HeadKind, antialias: bool) -> AestheticReward:
        """The reward with weights of any value; no weight file is read or needed.

        Args:
            path: a folder with the CLIP's config.json.
            head: which of the published heads.
            antialias: of the image resize.
        """
        model = clip_of_shapes(path)
        module = make_head(head, model.config.projection_dim)
        return cls(model, module, head, antialias=antialias, weights_sha256="", head_sha256="")

    def fingerprint(self) -> dict[str, Any]:
        """What changes the scores."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "head": self.kind,
            "head_sha256": self.head_sha256,
            "size": self.size,
            **CLIP_GEOMETRY,
            "kernel": "bicubic",
            "antialias": self.antialias,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "token_limit": None,
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            **({"config_sha256": self.config_sha256} if self.config_sha256 else {}),
        }

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Ratings (B,) of images (B, 3, H, W) in [0, 1], whatever the prompts; gradient reaches the images alone."""
        pixels = clip_preprocess(images.to(self.model.dtype), self.size, self.antialias)
        features = image_features(self.model, pixels).to(self.model.dtype)
        head = self.head if isinstance(self.head, nn.Linear) else self.head["layers"]
        with torch.autocast(images.device.type, enabled=False):  # it would round ratings of 5 to multiples of 0.03
            return head(features).squeeze(-1)
