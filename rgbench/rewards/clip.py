"""Rewards that are an open_clip CLIP: the cosine between image and text features.

HPS and CLIPScore are this model with other weights and other preprocessing.

Image preprocessing of reward models, on tensors: resize, pad or crop, normalise.

Both begin with a bicubic resize, with or without antialiasing. Bicubic overshoot is not clamped.

Text features of prompts, encoded once per distinct prompt.

How long texts are for a tokenizer, before anything is cut.

CLIPs in transformers' layout, for rewards that are published that way.

HPSv2 and HPSv2.1: a CLIP fine-tuned on human preferences (arXiv 2306.09341).

The benchtop's reward is the same at 1/8 scale.

CLIPScore (arXiv 2104.08718) with any open_clip CLIP; at full size ViT-H-14 trained on laion2b.

The score here is the cosine itself. The paper's is 2.5 · max(cosine, 0), whose gradient would vanish below zero.

PickScore: a CLIP-H fine-tuned on Pick-a-Pic preferences (arXiv 2305.01569), in transformers' layout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Self

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from rgbench.core.errors import UsageError
from rgbench.core.io import load_tensors, read_json, refuse_code, sha256_file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_GEOMETRY = {"resize": "shortest side, on the tensor", "crop": "centre square"}  # as a fingerprint says it


def hps_preprocess(
    images: Tensor,
    size: int,
    antialias: bool,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Images as HPSv2 takes them (arXiv 2306.09341 and its public code): the whole image, padded to a square.

    The longest side goes to ``size``; zeros pad to a square, centred, the odd pixel right and below; then mean and
    standard deviation. An image whose longest side is ``size`` already is not resized but padded all the same (the
    reference pads only what it resizes, and then fails on a batch of non-square images).

    Args:
        images: (B, 3, H, W) in [0, 1], floating.
        size: side of the square, in pixels.
        antialias: low-pass filter before subsampling. Off, frequencies above the reward model's own Nyquist limit
            alias into its input, and gradient flows back into them.
        mean: per channel, subtracted after the padding.
        std: per channel.

    Returns:
        (B, 3, size, size), differentiable.
    """
    height, width = images.shape[-2:]
    longest = max(height, width)
    if longest != size:
        scale = size / float(longest)
        height, width = round(height * scale), round(width * scale)
        images = _resize(images, (height, width), antialias)
    pad_height, pad_width = size - height, size - width
    left, top = pad_width // 2, pad_height // 2
    images = F.pad(images, (left, pad_width - left, top, pad_height - top))
    return normalise(images, mean, std)


def clip_preprocess(
    images: Tensor,
    size: int,
    antialias: bool,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Images as CLIP takes them (arXiv 2103.00020): the centre square, nothing padded.

    The shortest side goes to ``size``, the longest to the whole number below its share; then a centre crop.

    Args:
        images: (B, 3, H, W) in [0, 1], floating.
        size: side of the square, in pixels.
        antialias: as :func:`hps_preprocess`; the original resizes with PIL, which always filters.
        mean: per channel.
        std: per channel.

    Returns:
        (B, 3, size, size), differentiable.
    """
    height, width = images.shape[-2:]
    shortest = min(height, width)
    if shortest != size:
        height, width = int(size * height / shortest), int(size * width / shortest)
        images = _resize(images, (height, width), antialias)
    top, left = (height - size) // 2, (width - size) // 2
    return normalise(images[..., top : top + size, left : left + size], mean, std)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images − mean) / std per channel, (B, 3, H, W)."""
    shape = (1, -1, 1, 1)
    return (images - torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)) / torch.tensor(
        std, dtype=images.dtype, device=images.device
    ).view(shape)


def nyquist(size: int, longest: int) -> float:
    """The highest frequency of an image that a reward model can see, in cycles per image pixel.

    Args:
        size: side that the model reads, in pixels.
        longest: longest side of the image, which is resized to ``size``.
    """
    return min(0.5, size / longest / 2)


def _resize(images: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=antialias)


class FeatureCache:
    """Features of the last call's prompts.

    Each distinct prompt is encoded once, and those of the last call are kept: the images of one step share their
    prompts. The cache is keyed by the whole list, since a feature's last bits depend on its batch, and a resumed run
    must repeat them.

    Args:
        encode: distinct texts (n) → features (n, D).
    """

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode
        self._kept: tuple[tuple[str, ...], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, D) of B prompts, without gradient."""
        unique = tuple(dict.fromkeys(prompts))
        if self._kept is None or self._kept[0] != unique:
            self._kept = unique, self._encode(list(unique))
        rows = {prompt: i for i, prompt in enumerate(unique)}
        return self._kept[1][[rows[prompt] for prompt in prompts]]


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
    refuse_code(path)
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
        return config, load_tensors(weights)
    if not path.is_file():
        raise UsageError(f"{path}: no such CLIP; give an open_clip folder or a file of {ARCHITECTURE} weights")
    return open_clip.get_model_config(ARCHITECTURE), load_tensors(path)


def _take(model: open_clip.CLIP, path: Path, owner: str) -> None:
    """Load weights that must be the model's, name by name and shape by shape."""
    state = load_tensors(path)
    own = model.state_dict()
    wrong = sorted(n for n in own | state if n not in own or n not in state or own[n].shape != state[n].shape)
    if wrong:
        raise UsageError(f"{path}: {len(wrong)} tensors are not those that {owner}; first {wrong[0]!r}")
    model.load_state_dict(state)


def num_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with its begin and end marks, uncut.

    Args:
        tokenizer: of open_clip, of transformers, or one of ours that has a ``num_tokens`` of its own.
        texts: B of them.
    """
    if hasattr(tokenizer, "num_tokens"):
        return tokenizer.num_tokens(texts)
    if type(tokenizer).__module__.startswith("open_clip"):
        from open_clip.tokenizer import SimpleTokenizer  # seconds to import, and only where it is imported already

        if isinstance(tokenizer, SimpleTokenizer):
            return [len(tokenizer.encode(text)) + 2 for text in texts]
        texts, tokenizer = [tokenizer.clean_fn(text) for text in texts], tokenizer.tokenizer
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False).input_ids]


TRANSFORMERS_CLIP_CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_clip(folder: Path, device: str | torch.device, dtype: torch.dtype) -> CLIPModel:
    """A frozen ``CLIPModel`` from a folder with config.json and model.safetensors.

    Raises:
        UsageError: a file is missing, or the weights are not those of the configuration.
    """
    for file in (TRANSFORMERS_CLIP_CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UsageError(f"{folder / file}: missing; a transformers CLIP folder with safetensors weights is needed")
    refuse_code(folder)
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


class CLIPScoreReward(OpenCLIPReward):
    """Raw cosine of image and prompt, (B,); see :class:`OpenCLIPReward`."""

    name = "clip_score"
    geometry: ClassVar[dict[str, str]] = CLIP_GEOMETRY

    def preprocess(self, images: Tensor) -> Tensor:
        """The centre square."""
        return clip_preprocess(images, self.size, self.antialias, self.mean, self.std)


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
