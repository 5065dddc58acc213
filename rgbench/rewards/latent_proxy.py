"""The latent proxy R^L: a CLIP that reads VAE latents instead of pixels (RG-LCD, arXiv 2403.11027, section 4.2).

It is an open_clip ``CLIP`` whose patch embedding takes the latent's channels; ``image_size`` and ``patch_size`` count
latent pixels. At full size: ViT on 4×64×64, patch 4, 12 layers of width 512, projected to 1024; text tower of ViT-H-14.

It learns from its expert by pairs. Three images of one prompt form the pairs (prediction, target), (prediction, ground
truth) and (target, ground truth); a sample's loss is the sum over its pairs. Before that, it is pre-trained by the
contrastive loss of CLIP (arXiv 2103.00020, figure 3).

| symbol | name | meaning, shape |
|---|---|---|
| – | ``expert_logits`` | the expert's score × its logit scale; rows prediction, target, ground truth; (3, B) |
| – | ``proxy_logits`` | the proxy's cosine × its own learnable logit scale, same rows, (3, B) |
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.core.io import (
    check_sums,
    check_tensors,
    load_safetensors,
    save_safetensors_atomic,
    write_json_atomic,
    write_sums,
)
from rgbench.models.folder import explained, read_config, read_number
from rgbench.rewards.clip import FeatureCache, check_text_cfg, clip_config, folder_tokenizer, read_clip, unit

CONFIG, WEIGHTS, CLIP_CONFIG = "config.json", "model.safetensors", "open_clip_config.json"
MAX_LOG_SCALE = math.log(100)  # CLIP, arXiv 2103.00020, section 2.5
PairLoss = Literal["kl", "smooth", "cross_entropy"]
PAIRS = ((0, 1), (0, 2), (1, 2))  # of prediction, target and ground truth


class LatentCLIP(nn.Module):
    """Cosine of latents and prompt.

    Args:
        config: ``embed_dim``, ``vision_cfg`` and ``text_cfg`` as open_clip has them, ``latent_channels``, and
            ``latent_scale``, the VAE's scaling factor.
        tokenizer_folder: an open_clip folder or one saved by :meth:`save`, for its tokenizer; None for CLIP's own
            byte-pair encoding.
    """

    def __init__(self, config: dict[str, Any], tokenizer_folder: Path | None) -> None:
        super().__init__()
        self.config, self.tokenizer_folder = config, tokenizer_folder
        if tokenizer_folder is None:
            self.tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        else:
            self.tokenizer = folder_tokenizer(tokenizer_folder)
        self._frozen_texts: FeatureCache | None = None  # where the text tower does not learn
        self.clip = open_clip.CLIP(
            config["embed_dim"],
            dict(config["vision_cfg"]),
            dict(config["text_cfg"]),
            quick_gelu=config.get("quick_gelu", False),
        )
        pixels = self.clip.visual.conv1
        self.clip.visual.conv1 = nn.Conv2d(
            config["latent_channels"], pixels.out_channels, pixels.kernel_size, pixels.stride, bias=False
        )

    @classmethod
    def from_clip(
        cls, clip: str | Path, vision_cfg: dict[str, Any], *, latent_channels: int, latent_scale: float
    ) -> LatentCLIP:
        """A proxy with the text tower and logit scale of a CLIP, and a fresh image tower.

        The fresh weights come from torch's global generator: seed it first.

        Args:
            clip: an open_clip folder, or a file of ViT-H-14 weights such as an HPS checkpoint.
            vision_cfg: open_clip's, in latent pixels: ``image_size`` (a side, or height and width), ``patch_size``,
                ``layers``, ``width``, ``head_width``.
            latent_channels: C.
            latent_scale: the VAE's scaling factor.

        Raises:
            UsageError: no CLIP there, a text tower that does not fit its configuration, or patches that do not divide
                the latents.
        """
        path = Path(clip)
        model_cfg, weights = read_clip(path)
        proxy = cls._of_clip(model_cfg, path if path.is_dir() else None, vision_cfg, latent_channels, latent_scale)
        own = proxy.clip.state_dict()
        text, wanted = ({k: v for k, v in s.items() if not k.startswith("visual.")} for s in (weights, own))
        check_tensors(path, text, wanted, "the text tower that its configuration describes")
        proxy.clip.load_state_dict(own | text)
        return proxy

    @classmethod
    def of_shapes(
        cls, clip: Path | None, vision_cfg: dict[str, Any], *, latent_channels: int, latent_scale: float
    ) -> LatentCLIP:
        """As :meth:`from_clip`, with weights of any value: none are read; ``clip`` None for ViT-H-14."""
        folder = clip if clip is not None and clip.is_dir() else None
        return cls._of_clip(clip_config(folder), folder, vision_cfg, latent_channels, latent_scale)

    @classmethod
    def _of_clip(
        cls, model_cfg: dict[str, Any], folder: Path | None, vision_cfg: dict[str, Any], channels: int, scale: float
    ) -> LatentCLIP:
        """A fresh proxy with the text tower of a CLIP's configuration.

        Raises:
            UsageError: patches that do not divide the latents.
        """
        size, patch = vision_cfg["image_size"], vision_cfg["patch_size"]
        if any(side % patch for side in (size if isinstance(size, (list, tuple)) else [size])):
            raise UsageError(f"latents of {size} are not divided by patches of {patch}: choose another patch_size")
        config = {
            "embed_dim": model_cfg["embed_dim"],
            "vision_cfg": vision_cfg,
            "text_cfg": model_cfg["text_cfg"],
            "latent_channels": channels,
            "latent_scale": scale,
        }
        if model_cfg.get("quick_gelu"):
            config["quick_gelu"] = True
        return cls(config, folder)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32) -> LatentCLIP:
        """Load a folder written by :meth:`save`, frozen.

        Raises:
            UsageError: a file is missing, damaged, or does not fit its configuration.
        """
        folder = Path(folder)
        for file in (CONFIG, WEIGHTS, CLIP_CONFIG):
            if not (folder / file).is_file():
                raise UsageError(f"{folder / file}: missing; a latent CLIP folder is needed")
        check_sums(folder)
        config = read_config(folder / CONFIG)
        check_text_cfg(config.get("text_cfg"), folder / CONFIG)
        if read_number(config, "latent_scale", None, folder / CONFIG) is None:
            raise UsageError(f"{folder / CONFIG}: lacks latent_scale; fetch or write the folder again")
        with explained(folder / CONFIG):
            proxy = cls(config, folder)
        weights = load_safetensors(folder / WEIGHTS)
        check_tensors(folder / WEIGHTS, weights, proxy.clip.state_dict(), CONFIG)
        proxy.clip.load_state_dict(weights)
        return proxy.requires_grad_(False).eval().to(device, dtype)

    def save(self, folder: str | Path) -> None:
        """Write configuration, weights, tokenizer files and their ``rgbench.sha256`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / CONFIG, self.config)
        state = {name: value.detach().cpu().contiguous() for name, value in self.clip.state_dict().items()}
        save_safetensors_atomic(state, folder / WEIGHTS)
        if self.tokenizer_folder is None:
            write_json_atomic(folder / CLIP_CONFIG, {"model_cfg": {"text_cfg": self.config["text_cfg"]}})
        elif folder != self.tokenizer_folder:
            for file in self.tokenizer_folder.iterdir():
                if file.suffix in (".json", ".txt") and file.name != CONFIG:
                    shutil.copyfile(file, folder / file.name)
        write_sums(folder)

    def check_fits(self, latent_shape: tuple[int, int, int], scaling_factor: float, source: str | Path) -> None:
        """Refuse a proxy that does not read the latents of a model.

        Args:
            latent_shape: (C, h, w).
            scaling_factor: of the model's VAE.
            source: of the proxy, for the message.

        Raises:
            UsageError: other channels, another size, or another scale.
        """
        own = (self.config["latent_channels"], *self.clip.visual.image_size)
        if own != tuple(latent_shape):
            raise UsageError(f"{source}: reads latents of shape {own}, the model's are {tuple(latent_shape)}")
        if not math.isclose(self.config["latent_scale"], scaling_factor, rel_tol=1e-6):
            scale = self.config["latent_scale"]
            raise UsageError(f"{source}: made for latents × {scale}, the model's scaling factor is {scaling_factor}")

    def encode_latents(self, latents: Tensor) -> Tensor:
        """Unit features (B, D) of unscaled latents (B, C, h, w), which are scaled to unit variance first."""
        return unit(self.clip.encode_image(latents * self.config["latent_scale"]))

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features (B, D) of prompts; each distinct prompt is encoded once.

        Where :meth:`unfreeze` left the text tower frozen, those of the last call are kept.
        """
        if self._frozen_texts is not None:
            return self._frozen_texts(prompts)
        unique = list(dict.fromkeys(prompts))
        rows = {prompt: i for i, prompt in enumerate(unique)}
        return self._encode_texts(unique)[[rows[prompt] for prompt in prompts]]

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts).to(self.clip.logit_scale.device)
        return unit(self.clip.encode_text(tokens))

    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw cosines (B,), float32 at least, of unscaled latents (B, C, h, w) and prompts."""
        return (self.encode_latents(latents) * self.encode_texts(prompts)).sum(-1)

    def logit_scale(self) -> Tensor:
        """Factor from cosine to logit; a scalar with gradient."""
        return self.clip.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Hold the logit scale at 100 or below, in place; called after each update."""
        self.clip.logit_scale.clamp_(max=MAX_LOG_SCALE)

    def unfreeze(self, image_layers: int | str, text_layers: int | str) -> list[nn.Parameter]:
        """Make part of the proxy trainable, freeze the rest.

        Args:
            image_layers: the last n image blocks with the final norm and the projection; 0 for none of the tower,
                ``all`` for the whole tower with its embeddings.
            text_layers: the same of the text tower.

        Returns:
            The trainable parameters, the logit scale among them.
        """
        image = _prefixes(image_layers, "visual.", len(self.clip.visual.transformer.resblocks))
        text = _prefixes(text_layers, "", len(self.clip.transformer.resblocks))
        chosen = []
        for name, parameter in self.clip.named_parameters():
            prefixes = image if name.startswith("visual.") else text
            parameter.requires_grad_(name == "logit_scale" or name.startswith(prefixes))
            chosen += [parameter] if parameter.requires_grad else []
        self._frozen_texts = None if text_layers else FeatureCache(self._encode_texts)
        return chosen


def _prefixes(count: int | str, tower: str, depth: int) -> tuple[str, ...]:
    """Name prefixes of a tower's trainable parameters; an empty tuple matches none."""
    if count == "all":
        return (tower,)
    blocks = range(max(depth - int(count), 0), depth)
    head = ("visual.ln_post.", "visual.proj") if tower else ("ln_final.", "text_projection")
    return (*(f"{tower}transformer.resblocks.{i}." for i in blocks), *(head if blocks else ()))


def contrastive_losses(images: Tensor, texts: Tensor, scale: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """InfoNCE in both directions.

    Args:
        images: unit vectors (B, D).
        texts: unit vectors (B, D), row by row those of ``captions``.
        scale: factor from cosine to logit, a scalar.
        captions: B texts.

    Returns:
        ½ · (cross-entropy of image i over the texts + of text i over the images), (B,); and whether image i finds a
        text of its own caption first, (B,) of the images' dtype, without gradient.
    """
    rows = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    key = torch.tensor([rows[caption] for caption in captions], device=images.device)
    same = (key[:, None] == key[None]).to(images.dtype)
    label = same / same.sum(1, keepdim=True)
    with torch.autocast(images.device.type, enabled=False):  # it would round the cosines to bfloat16
        logits = scale * images @ texts.T
    to_text, to_image = (-(label * x.log_softmax(1)).sum(1) for x in (logits, logits.T))
    found = key[logits.detach().argmax(1)] == key
    return 0.5 * (to_text + to_image), found.to(images.dtype)


def pair_losses(expert_logits: Tensor, proxy_logits: Tensor, kind: PairLoss) -> tuple[Tensor, Tensor]:
    """Loss and agreement of each sample.

    Args:
        expert_logits: (n, B), without gradient; the last row is the ground truth's.
        proxy_logits: (n, B).
        kind: ``kl``: KL(softmax(expert pair) ‖ softmax(proxy pair)); ``smooth``: the same, but the label is (½, ½)
            where the expert prefers a generated image over the ground truth; ``cross_entropy``: hard labels, the
            expert's choice, and the ground truth in each of its pairs.

    Returns:
        The loss summed over the pairs, (B,), and the share of pairs that expert and proxy order alike, (B,).

    Raises:
        ValueError: another ``kind``.
    """
    losses, agreements = [], []
    for first, second in combinations(range(len(expert_logits)), 2):
        expert = torch.stack([expert_logits[first], expert_logits[second]], dim=1)  # (B, 2)
        proxy = torch.stack([proxy_logits[first], proxy_logits[second]], dim=1)
        losses.append(_pair_loss(expert, proxy, kind, has_truth=second == len(expert_logits) - 1))
        agreements.append((expert.argmax(1) == proxy.argmax(1)).to(proxy.dtype))
    return torch.stack(losses).sum(0), torch.stack(agreements).mean(0)


def _pair_loss(expert: Tensor, proxy: Tensor, kind: PairLoss, *, has_truth: bool) -> Tensor:
    """Loss (B,) of one pair of logits (B, 2); where ``has_truth``, column 1 is the ground truth."""
    if kind == "cross_entropy":
        label = torch.ones_like(expert[:, 0], dtype=torch.int64) if has_truth else expert.argmax(1)
        return F.cross_entropy(proxy, label, reduction="none")
    if kind not in ("kl", "smooth"):
        raise ValueError(f"pair loss {kind!r}: use kl, smooth or cross_entropy")
    log_label = expert.log_softmax(1)
    if kind == "smooth" and has_truth:
        prefers_generated = (expert[:, :1] > expert[:, 1:]).expand_as(log_label)
        log_label = torch.where(prefers_generated, math.log(0.5), log_label)
    return (log_label.exp() * (log_label - proxy.log_softmax(1))).sum(1)
