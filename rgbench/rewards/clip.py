"""Rewards that are the cosine of a CLIP's image and text features: HPS, CLIPScore and PickScore.

- HPSv2 and HPSv2.1 (arXiv 2306.09341), a CLIP tuned on human preferences; the benchtop's reward is one at 1/8 scale.
- CLIPScore (arXiv 2104.08718). The score here is the cosine itself; the paper's 2.5 · max(cosine, 0) has no gradient
  below zero.
- PickScore (arXiv 2305.01569), tuned on Pick-a-Pic preferences, published in transformers' layout.

They differ in their weights and in how they fit an image into a square; both ways begin with a bicubic resize, with
or without antialiasing, whose overshoot is not clamped.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Self

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from rgbench.core.errors import UsageError
from rgbench.core.io import check_tensors, load_tensors, read_json, refuse_code, sha256_file
from rgbench.models.folder import check_loaded, config_hash, explained, read_config
from rgbench.models.presets import WEIGHTS as SHIPPED_WEIGHTS
from rgbench.rewards.base import float32_at_least, num_tokens

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_GEOMETRY = {"resize": "shortest side, on the tensor", "crop": "centre square"}  # in fingerprints
HPS_GEOMETRY = {"resize": "longest side, on the tensor", "pad": "zero, centred, before normalisation"}
ARCHITECTURE = "ViT-H-14"  # of HPSv2, HPSv2.1 and CLIPScore's laion2b weights, where a file does not say
FOLDER_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG = "open_clip_config.json"
TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language"}  # of open_clip's HFTokenizer; none loads code
TRANSFORMERS_CONFIG, WEIGHTS = "config.json", "model.safetensors"
CONFIG_FILES = (
    *(CONFIG, TRANSFORMERS_CONFIG, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt"),
)
PROBE = "a"
SHIPPED = (SHIPPED_WEIGHTS / "reward", SHIPPED_WEIGHTS / "clip")


class CLIPReward:
    """Raw cosine of image and prompt, (B,), by an open_clip CLIP; subclasses set the name and fit images into a square.

    Args:
        model: an open_clip ``CLIP``; frozen here.
        tokenizer: texts → ids (B, L) int64.
        antialias: of the image resize.
        weights_sha256: of the weight file.
        mean: image normalisation, per channel.
        std: image normalisation, per channel.
        config_sha256: of :func:`config_sha256`; None where the weights alone decide.
    """

    name: str
    geometry: ClassVar[dict[str, str]] = CLIP_GEOMETRY
    differentiable = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        antialias: bool,
        weights_sha256: str,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        config_sha256: str | None = None,
    ) -> None:
        self.config_sha256 = config_sha256
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.antialias, self.weights_sha256 = tokenizer, antialias, weights_sha256
        self.mean, self.std = tuple(mean), tuple(std)
        self.size, self.token_limit = self._limits()
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
        model, tokenizer, weights, settings = _load_folder(path) if path.is_dir() else _load_file(path)
        digest = sha256_file(weights)
        return cls(model.to(device, dtype), tokenizer, antialias=antialias, weights_sha256=digest, **settings)

    @classmethod
    def of_shapes(cls, path: Path | None, *, antialias: bool) -> Self:
        """The reward with weights of any value; no weight file is read or needed.

        Args:
            path: as of :meth:`load`; None for ViT-H-14.
            antialias: of the image resize.
        """
        if path is not None and path.is_dir():
            model, tokenizer = _without_weights(f"local-dir:{path}", load_weights=False), folder_tokenizer(path)
        else:
            model, tokenizer = _without_weights(ARCHITECTURE, pretrained=None), open_clip.get_tokenizer(ARCHITECTURE)
        return cls(model, tokenizer, antialias=antialias, weights_sha256="")

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
            "token_limit": self.token_limit,
            "mean": list(self.mean),
            "std": list(self.std),
            **({"config_sha256": self.config_sha256} if self.config_sha256 else {}),
        }

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalised pixels (B, 3, size, size) of images (B, 3, H, W) in [0, 1]."""
        return clip_preprocess(images, self.size, self.antialias, self.mean, self.std)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of images (B, 3, H, W) in [0, 1], float32 at least; gradient reaches the images alone."""
        image_features = self._encode_pixels(self.preprocess(images.to(self.dtype)))
        return (image_features * self.text_features(prompts)).sum(-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit text features (B, D), without gradient."""
        return self._texts(prompts)

    def _encode_texts(self, texts: list[str]) -> Tensor:
        return unit(self.model.encode_text(self.tokenizer(texts).to(self.model.logit_scale.device)))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return unit(self.model.encode_image(pixels))

    def _limits(self) -> tuple[int, int]:
        """Side of the image in pixels, and tokens of a text."""
        size = self.model.visual.image_size
        return int(size[0] if isinstance(size, tuple) else size), int(self.model.context_length)


class HPSReward(CLIPReward):
    """HPSv2's score as the raw cosine, about 0.2 to 0.35 for HPSv2.1."""

    name = "hps"
    geometry = HPS_GEOMETRY

    def preprocess(self, images: Tensor) -> Tensor:
        """The whole image, padded to a square."""
        return hps_preprocess(images, self.size, self.antialias, self.mean, self.std)


class CLIPScoreReward(CLIPReward):
    """CLIPScore as the raw cosine, on the centre square."""

    name = "clip_score"


class PickScoreReward(CLIPReward):
    """PickScore as the raw cosine, about 0.2; × ``logit_scale`` (100) it is the published score.

    Its ``model`` is a transformers ``CLIPModel``, its ``tokenizer`` a :class:`ClipTokenizer`.
    """

    name = "pickscore"

    @classmethod
    def load(
        cls, path: str | Path, *, antialias: bool, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> Self:
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
        with explained(folder), torch.no_grad():
            text_features(model, tokenizer([PROBE]).to(model.device))
        digest, config = sha256_file(folder / WEIGHTS), config_sha256(folder)
        return cls(model, tokenizer, antialias=antialias, weights_sha256=digest, config_sha256=config)

    @classmethod
    def of_shapes(cls, path: Path | None, *, antialias: bool) -> Self:
        """As :meth:`CLIPReward.of_shapes`, of a folder with config.json."""
        assert path is not None
        model = clip_of_shapes(path)
        tokenizer = ClipTokenizer(path, model.config.text_config.max_position_embeddings)
        return cls(model, tokenizer, antialias=antialias, weights_sha256="")

    def fingerprint(self) -> dict[str, Any]:
        """What changes the scores."""
        return super().fingerprint() | {"tokenizer": self.tokenizer.source}

    def _encode_texts(self, texts: list[str]) -> Tensor:
        return text_features(self.model, self.tokenizer(texts).to(self.model.device))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return image_features(self.model, pixels)

    def _limits(self) -> tuple[int, int]:
        return int(self.model.config.vision_config.image_size), self.tokenizer.context_length


def unit(features: Tensor) -> Tensor:
    """Features (B, D) of length 1, float32 at least."""
    return F.normalize(float32_at_least(features), dim=-1)


def hps_preprocess(
    images: Tensor,
    size: int,
    antialias: bool,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Fit images as HPSv2 does (arXiv 2306.09341 and its public code): the whole image, padded to a square.

    The longest side is resized to ``size``; zeros pad to a square, centred, the odd pixel right and below; then mean
    and standard deviation. An image whose longest side is ``size`` already is padded without a resize (the reference
    pads only what it resizes, and then fails on a batch of non-square images).

    Args:
        images: (B, 3, H, W) in [0, 1], floating.
        size: side of the square, in pixels.
        antialias: low-pass filter before subsampling. Without it, frequencies above the reward model's Nyquist limit
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
    """Fit images as CLIP does (arXiv 2103.00020): the centre square, without padding.

    The shortest side is resized to ``size``, the longest in proportion, rounded down; then a centre crop.

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
    centre, spread = (torch.tensor(v, dtype=images.dtype, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return (images - centre) / spread


def nyquist(size: int, longest: int) -> float:
    """The highest frequency that a reward model can see, in cycles per image pixel.

    Args:
        size: side of the model's input, in pixels.
        longest: longest side of the image, which is resized to ``size``.
    """
    return min(0.5, size / longest / 2)


def _resize(images: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=antialias)


class FeatureCache:
    """Text features, each distinct prompt encoded once, those of the last call kept.

    The images of one step share their prompts. The key is the whole list: a feature's last bits depend on its batch,
    and a resumed run must repeat them.

    Args:
        encode: distinct texts (n) → features (n, D).
    """

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode
        self._last: tuple[tuple[str, ...], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, D) of B prompts, without gradient."""
        unique = tuple(dict.fromkeys(prompts))
        if self._last is None or self._last[0] != unique:
            self._last = unique, self._encode(list(unique))
        rows = {prompt: i for i, prompt in enumerate(unique)}
        return self._last[1][[rows[prompt] for prompt in prompts]]


Loaded = tuple[open_clip.CLIP, Any, Path, dict[str, Any]]


def _load_folder(folder: Path) -> Loaded:
    """Model, tokenizer, weight file, normalisation and hash of the configuration of an open_clip folder."""
    weights = _folder_weights(folder)
    for file in (folder / CONFIG, weights):
        if not file.is_file():
            raise UsageError(f"{file}: missing; an open_clip folder with its weights is needed")
    tokenizer = folder_tokenizer(folder)
    with explained(folder / CONFIG):
        model = _without_weights(f"local-dir:{folder}", load_weights=False)
        preprocess = open_clip.get_model_preprocess_cfg(model)
    _take(model, weights, str(folder / CONFIG), "fetch or write the folder again")
    with explained(folder), torch.no_grad():  # a vocabulary that does not fit the text tower shows at once
        model.encode_text(tokenizer([PROBE]))
    settings = {"mean": preprocess["mean"], "std": preprocess["std"], "config_sha256": config_sha256(folder)}
    return model, tokenizer, weights, settings


def _load_file(path: Path) -> Loaded:
    """The same of a file of ViT-H-14 weights."""
    model = _without_weights(ARCHITECTURE, pretrained=None)
    _take(model, path, ARCHITECTURE, "give HPS_v2_compressed.pt, HPS_v2.1_compressed.pt, or an open_clip folder")
    return model, open_clip.get_tokenizer(ARCHITECTURE), path, {}


def _without_weights(name: str, **settings: Any) -> open_clip.CLIP:
    """A model whose weights are loaded next; open_clip's warning that it has none is dropped."""

    def is_other(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        return open_clip.create_model(name, device="cpu", **settings)
    finally:
        root.removeFilter(is_other)


def _folder_weights(folder: Path) -> Path:
    return next((folder / file for file in FOLDER_WEIGHTS if (folder / file).is_file()), folder / FOLDER_WEIGHTS[0])


def folder_tokenizer(folder: Path) -> Any:
    """The tokenizer of an open_clip folder.

    Raises:
        UsageError: the folder names Python code of its own, or a text tower on the hub; neither is loaded.
    """
    refuse_code(folder)
    text = _model_cfg(folder).get("text_cfg", {})
    check_text_cfg(text, folder / CONFIG)
    code = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    with explained(folder):
        return open_clip.get_tokenizer(f"local-dir:{folder}", **code)


def config_sha256(folder: Path) -> str | None:
    """Hash of what else than its weights decides a CLIP's scores: configuration and tokenizer.

    None for those of the shipped CLIPs, whose fingerprints are older than this hash.
    """
    found = _hash_configs(folder)
    return None if found in (_hash_configs(shipped) for shipped in SHIPPED) else found


def _hash_configs(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in CONFIG_FILES:
        if (file := folder / name).is_file():
            content = config_hash(file) if name in (CONFIG, TRANSFORMERS_CONFIG) else sha256_file(file)
            digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def check_text_cfg(text: Any, file: Path) -> None:
    """Refuse a ``text_cfg`` that would load code, or a text tower from the hub.

    Raises:
        UsageError: names the file and the key.
    """
    if not isinstance(text, dict):
        raise UsageError(f"{file}: text_cfg does not describe a text tower; fetch or write the folder again")
    unknown = sorted(set(text.get("tokenizer_kwargs") or ()) - TOKENIZER_OPTIONS)
    if unknown or text.get("hf_model_name"):
        key = f"tokenizer_kwargs.{unknown[0]}" if unknown else "hf_model_name"
        raise UsageError(f"{file}: text_cfg.{key} is refused; give a CLIP with a text tower of its own")


def _model_cfg(folder: Path) -> dict[str, Any]:
    content = read_json(folder / CONFIG)
    config = content.get("model_cfg") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        raise UsageError(f"{folder / CONFIG}: lacks model_cfg; not an open_clip folder")
    return config


def read_clip(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's ``model_cfg`` and the weights of a CLIP.

    Args:
        path: an open_clip folder, or a file of ViT-H-14 weights.

    Raises:
        UsageError: nothing there, or files missing.
    """
    if path.is_dir():
        return clip_config(path), load_tensors(_folder_weights(path))
    if not path.is_file():
        raise UsageError(f"{path}: no such CLIP; give an open_clip folder or a file of {ARCHITECTURE} weights")
    return clip_config(None), load_tensors(path)


def clip_config(folder: Path | None) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a folder; None for ViT-H-14."""
    return open_clip.get_model_config(ARCHITECTURE) if folder is None else _model_cfg(folder)


def _take(model: open_clip.CLIP, path: Path, owner: str, remedy: str) -> None:
    """Load weights that match the model name by name and shape by shape."""
    state = load_tensors(path)
    check_tensors(path, state, model.state_dict(), owner, remedy)
    model.load_state_dict(state)


def load_clip(folder: Path, device: str | torch.device, dtype: torch.dtype) -> CLIPModel:
    """A frozen ``CLIPModel`` from a folder with config.json and model.safetensors.

    Raises:
        UsageError: a file is missing, or the weights are not those of the configuration.
    """
    for file in (TRANSFORMERS_CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UsageError(f"{folder / file}: missing; a transformers CLIP folder with safetensors weights is needed")
    refuse_code(folder)
    kind = read_config(folder / TRANSFORMERS_CONFIG).get("model_type", "clip")
    if kind != "clip":
        raise UsageError(f"{folder / TRANSFORMERS_CONFIG}: describes a model of type {kind!r:.80}; give a CLIP")
    disable_progress_bar()
    with explained(folder):
        model, report = CLIPModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below; transformers would name none
        )
    check_loaded(folder, report)
    return model.requires_grad_(False).eval().to(device, dtype)


def clip_of_shapes(folder: Path) -> CLIPModel:
    """A frozen ``CLIPModel`` of a folder's configuration, with weights of any value."""
    with explained(folder):
        return CLIPModel(CLIPConfig.from_pretrained(folder)).requires_grad_(False).eval()


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit features (B, D) of preprocessed pixels."""
    return unit(_features(model.get_image_features(pixel_values=pixels)))


def text_features(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Unit features (B, D) of token ids (B, L); what follows the end token has no effect."""
    return unit(_features(model.get_text_features(input_ids=tokens)))


def _features(output: Any) -> Tensor:
    """transformers 5 returns an output object whose ``pooler_output`` is the projected feature."""
    return output if isinstance(output, Tensor) else output.pooler_output


class ClipTokenizer:
    """Tokenizer of a CLIP in transformers' layout.

    The folder's own where it has one; else CLIP's byte-pair encoding as open_clip ships it, which gives the same ids
    for plain text (it also cleans up HTML entities and broken Unicode).

    Args:
        folder: of the model.
        context_length: tokens; longer texts are cut, the end token kept.

    Attributes:
        source: ``folder`` or ``clip-bpe``, for fingerprints.
    """

    def __init__(self, folder: Path, context_length: int) -> None:
        self.context_length = context_length
        own = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
        self.source = "folder" if own else "clip-bpe"
        with explained(folder):
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
