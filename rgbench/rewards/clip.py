"""Rewards that are an open_clip CLIP: the cosine between image and text features.

HPS and CLIPScore are this model with other weights and other preprocessing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Self

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.files import load_pickled_state_dict, load_safetensors, read_json, sha256_file
from rgbench.rewards.preprocess import CLIP_MEAN, CLIP_STD
from rgbench.rewards.texts import FeatureCache

ARCHITECTURE = "ViT-H-14"  # of HPSv2, HPSv2.1 and CLIPScore's laion2b weights, where a file does not say
FOLDER_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG = "open_clip_config.json"


class OpenCLIPReward:
    """Raw cosine of image and prompt, (B,); subclasses say what they are called and how they take images.

    Args:
        model: an open_clip ``CLIP``; frozen here.
        tokenizer: open_clip's tokenizer of that model: texts → (B, L) int64.
        antialias: of the image resize.
        weights_sha256: of the weight file.
        mean: image normalisation, per channel.
        std: image normalisation, per channel.
    """

    name: str
    differentiable = True
    geometry: ClassVar[dict[str, str]]  # what the fingerprint says of resize and padding or crop

    def __init__(
        self,
        model: open_clip.CLIP,
        tokenizer: Any,
        *,
        antialias: bool,
        weights_sha256: str,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.antialias, self.weights_sha256 = tokenizer, antialias, weights_sha256
        self.mean, self.std = tuple(mean), tuple(std)
        size = model.visual.image_size
        self.size = int(size[0] if isinstance(size, tuple) else size)
        self.logit_scale = float(model.logit_scale.exp())
        self._texts = FeatureCache(self._encode_texts)

    @classmethod
    def load(
        cls, path: str | Path, *, antialias: bool, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a reward.

        Args:
            path: an open_clip folder (open_clip_config.json with open_clip_model.safetensors or
                open_clip_pytorch_model.bin, tokenizer files where it names a tokenizer), or a file of ViT-H-14
                weights as HPSv2 and open_clip publish them (.pt, .pth, .bin: tensors only; or .safetensors).
            antialias: of the image resize; part of the fingerprint.
            device: where to put the weights.
            dtype: floating type of weights and arithmetic.

        Raises:
            UsageError: nothing there, files missing, or weights of another architecture.
        """
        path = Path(path)
        if not path.exists():
            raise UsageError(f"{path}: no such reward; give an open_clip folder or an HPS checkpoint file")
        model, tokenizer, weights, preprocess = _load_folder(path) if path.is_dir() else _load_file(path)
        return cls(
            model.to(device, dtype), tokenizer, antialias=antialias, weights_sha256=sha256_file(weights), **preprocess
        )

    def with_antialias(self, antialias: bool) -> Self:
        """The same network and its cached texts under another resize."""
        other = copy(self)
        other.antialias = antialias
        return other

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.model.logit_scale.dtype

    def fingerprint(self) -> dict[str, Any]:
        """What changes the scores."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "size": self.size,
            **self.geometry,
            "kernel": "bicubic",
            "antialias": self.antialias,
            "dtype": str(self.dtype).removeprefix("torch."),
            "token_limit": int(self.model.context_length),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalised pixels (B, 3, size, size) of images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of images (B, 3, H, W) in [0, 1]; gradient reaches the images alone."""
        pixels = self.preprocess(images.to(self.dtype))
        image_features = F.normalize(self.model.encode_image(pixels), dim=-1)
        return (image_features * self.text_features(prompts)).sum(-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Normalised text features (B, D), without gradient."""
        return self._texts(prompts)

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts).to(self.model.logit_scale.device)
        return F.normalize(self.model.encode_text(tokens), dim=-1)


Loaded = tuple[open_clip.CLIP, Any, Path, dict[str, Any]]


def _without_weights(name: str, **settings: Any) -> open_clip.CLIP:
    """A model whose weights are taken from a file next; open_clip's warning that it has none would mislead."""

    def is_other(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        return open_clip.create_model(name, device="cpu", **settings)
    finally:
        root.removeFilter(is_other)


def _load_folder(path: Path) -> Loaded:
    """Model, tokenizer, weight file and normalisation of an open_clip folder."""
    weights = next((path / file for file in FOLDER_WEIGHTS if (path / file).is_file()), path / FOLDER_WEIGHTS[0])
    for file in (path / CONFIG, weights):
        if not file.is_file():
            raise UsageError(f"{file}: missing; an open_clip folder with its weights is needed")
    model = _without_weights(f"local-dir:{path}", load_weights=False)
    _take(model, weights, f"{path / CONFIG} describes")
    preprocess = open_clip.get_model_preprocess_cfg(model)
    return model, open_clip.get_tokenizer(f"local-dir:{path}"), weights, {k: preprocess[k] for k in ("mean", "std")}


def _load_file(path: Path) -> Loaded:
    """The same of a file of ViT-H-14 weights."""
    model = _without_weights(ARCHITECTURE, pretrained=None)
    _take(model, path, f"{ARCHITECTURE} has; give HPS_v2_compressed.pt, HPS_v2.1_compressed.pt, or an open_clip folder")
    return model, open_clip.get_tokenizer(ARCHITECTURE), path, {}


def read_clip(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration (``model_cfg`` of open_clip) and weights of a CLIP.

    Args:
        path: an open_clip folder, or a file of ViT-H-14 weights.

    Raises:
        UsageError: nothing there, or files missing.
    """
    if path.is_dir():
        weights = next((path / file for file in FOLDER_WEIGHTS if (path / file).is_file()), path / FOLDER_WEIGHTS[0])
        config = read_json(path / CONFIG).get("model_cfg")
        if not isinstance(config, dict):
            raise UsageError(f"{path / CONFIG}: lacks model_cfg; not an open_clip folder")
        return config, _read_weights(weights)
    if not path.is_file():
        raise UsageError(f"{path}: no such CLIP; give an open_clip folder or a file of {ARCHITECTURE} weights")
    return open_clip.get_model_config(ARCHITECTURE), _read_weights(path)


def _read_weights(path: Path) -> dict[str, Tensor]:
    return load_safetensors(path) if path.suffix == ".safetensors" else load_pickled_state_dict(path)


def _take(model: open_clip.CLIP, path: Path, owner: str) -> None:
    """Load weights that must be the model's, name by name and shape by shape."""
    state = _read_weights(path)
    own = model.state_dict()
    wrong = sorted(n for n in own | state if n not in own or n not in state or own[n].shape != state[n].shape)
    if wrong:
        raise UsageError(f"{path}: {len(wrong)} tensors are not those that {owner}; first {wrong[0]!r}")
    model.load_state_dict(state)
