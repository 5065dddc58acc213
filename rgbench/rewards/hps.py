"""HPSv2-style reward: the cosine between a CLIP's image and text features (HPSv2, arXiv 2306.09341).

Weights are either an open_clip folder (the benchtop's reward, or any CLIP saved that way) or an HPS checkpoint file
for ViT-H-14.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.files import load_pickled_state_dict, load_safetensors, sha256_file
from rgbench.rewards.preprocess import CLIP_MEAN, CLIP_STD, hps_preprocess

HPS_ARCHITECTURE = "ViT-H-14"  # HPSv2 and HPSv2.1
FOLDER_WEIGHTS = "open_clip_model.safetensors"


class HPSReward:
    """Raw cosine of image and prompt, (B,), about 0.2 to 0.35 for HPSv2.1.

    Args:
        model: an open_clip ``CLIP``; frozen here.
        tokenizer: open_clip's tokenizer of that model: texts → (B, L) int64.
        antialias: of the image resize.
        weights_sha256: of the weight file.
        mean: image normalisation, per channel.
        std: image normalisation, per channel.
    """

    name = "hps"
    differentiable = True

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
        self._texts: tuple[tuple[str, ...], Tensor] | None = None

    @classmethod
    def load(
        cls, path: str | Path, *, antialias: bool, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> HPSReward:
        """Load a reward.

        Args:
            path: an open_clip folder (open_clip_config.json, open_clip_model.safetensors, tokenizer files), or an
                HPS checkpoint file (.pt, .pth, .bin: tensors only; or .safetensors) for ViT-H-14.
            antialias: of the image resize; part of the fingerprint.
            device: where to put the weights.
            dtype: floating type of weights and arithmetic.

        Raises:
            UsageError: nothing there, files missing, or a checkpoint of another architecture.
        """
        path = Path(path)
        if path.is_dir():
            return cls._load_folder(path, antialias, device, dtype)
        if not path.is_file():
            raise UsageError(f"{path}: no such reward; give an open_clip folder or an HPS checkpoint file")
        model = open_clip.create_model(HPS_ARCHITECTURE, pretrained=None, device="cpu")
        state = load_safetensors(path) if path.suffix == ".safetensors" else load_pickled_state_dict(path)
        wrong = set(model.state_dict()) ^ set(state)
        if wrong:
            raise UsageError(
                f"{path}: {len(wrong)} tensors differ from {HPS_ARCHITECTURE}'s, first {min(wrong)!r}; "
                "give HPS_v2_compressed.pt or HPS_v2.1_compressed.pt"
            )
        model.load_state_dict(state)
        return cls(
            model.to(device, dtype),
            open_clip.get_tokenizer(HPS_ARCHITECTURE),
            antialias=antialias,
            weights_sha256=sha256_file(path),
        )

    @classmethod
    def _load_folder(cls, path: Path, antialias: bool, device: str | torch.device, dtype: torch.dtype) -> HPSReward:
        for file in ("open_clip_config.json", FOLDER_WEIGHTS):
            if not (path / file).is_file():
                raise UsageError(f"{path / file}: missing; an open_clip folder with safetensors weights is needed")
        model = open_clip.create_model(f"local-dir:{path}", device="cpu")
        preprocess = open_clip.get_model_preprocess_cfg(model)
        return cls(
            model.to(device, dtype),
            open_clip.get_tokenizer(f"local-dir:{path}"),
            antialias=antialias,
            weights_sha256=sha256_file(path / FOLDER_WEIGHTS),
            mean=preprocess["mean"],
            std=preprocess["std"],
        )

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
            "resize": "longest side, on the tensor",
            "kernel": "bicubic",
            "antialias": self.antialias,
            "pad": "zero, centred, before normalisation",
            "dtype": str(self.dtype).removeprefix("torch."),
            "token_limit": int(self.model.context_length),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of images (B, 3, H, W) in [0, 1]; gradient reaches the images alone."""
        pixels = hps_preprocess(images.to(self.dtype), self.size, self.antialias, self.mean, self.std)
        image_features = F.normalize(self.model.encode_image(pixels), dim=-1)
        return (image_features * self.text_features(prompts)).sum(-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Normalised text features (B, D), without gradient.

        Each distinct prompt is encoded once, and those of the last call are kept: the images of one step share their
        prompts. The cache is keyed by the whole list, since a feature's last bits depend on its batch, and a resumed
        run must repeat them.
        """
        unique = tuple(dict.fromkeys(prompts))
        if self._texts is None or self._texts[0] != unique:
            tokens = self.tokenizer(list(unique)).to(self.model.logit_scale.device)
            self._texts = unique, F.normalize(self.model.encode_text(tokens), dim=-1)
        rows = {prompt: i for i, prompt in enumerate(unique)}
        return self._texts[1][[rows[prompt] for prompt in prompts]]
