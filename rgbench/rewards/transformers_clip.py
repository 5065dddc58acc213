"""CLIPs in transformers' layout, for rewards that are published that way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from rgbench.errors import UsageError
from rgbench.rewards.tokens import num_tokens

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_clip(folder: Path, device: str | torch.device, dtype: torch.dtype) -> CLIPModel:
    """A frozen ``CLIPModel`` from a folder with config.json and model.safetensors.

    Raises:
        UsageError: a file is missing, or the weights are not those of the configuration.
    """
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UsageError(f"{folder / file}: missing; a transformers CLIP folder with safetensors weights is needed")
    disable_progress_bar()
    try:
        model, report = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{folder}: not a CLIP in transformers' layout: {error}") from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise UsageError(f"{folder / WEIGHTS}: lacks {len(absent)} tensors of a CLIP, first {absent[0]!r}")
    return model.requires_grad_(False).eval().to(device, dtype)


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Normalised features (B, D) of preprocessed pixels."""
    return F.normalize(_features(model.get_image_features(pixel_values=pixels)), dim=-1)


def text_features(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Normalised features (B, D) of token ids (B, L); what follows the end token has no effect."""
    return F.normalize(_features(model.get_text_features(input_ids=tokens)), dim=-1)


def _features(output: Any) -> Tensor:
    """transformers 5 returns an output object whose ``pooler_output`` is the projected feature."""
    return output if isinstance(output, Tensor) else output.pooler_output


class ClipTokenizer:
    """Token ids for a CLIP in transformers' layout.

    The folder's own tokenizer where it has one; else CLIP's byte-pair encoding as open_clip ships it, which gives the
    same ids for plain text (it cleans up HTML entities and broken Unicode besides).

    Args:
        folder: of the model.
        context_length: tokens; longer texts are cut, the end token kept.

    Attributes:
        source: which of the two, for fingerprints.
    """

    def __init__(self, folder: Path, context_length: int) -> None:
        self.context_length = context_length
        own = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
        self.source = "folder" if own else "clip-bpe"
        self._tokenizer: Any = (
            CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            if own
            else open_clip.SimpleTokenizer(context_length=context_length)
        )

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, uncut."""
        return num_tokens(self._tokenizer, texts)

    def __call__(self, texts: list[str]) -> Tensor:
        """Ids (B, L) int64 of texts."""
        if self.source == "clip-bpe":
            return self._tokenizer(texts)
        options = {"padding": "max_length", "truncation": True, "max_length": self.context_length}
        return self._tokenizer(texts, return_tensors="pt", **options).input_ids
