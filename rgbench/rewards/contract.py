"""The reward contract: ``(images, prompts) → scores (B,)``, and what identifies a reward.

A reward owns its preprocessing, takes images in [0, 1] of any size, and says in its fingerprint everything that
changes its scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Reward(Protocol):
    """A frozen model of what an image is worth for a prompt.

    Attributes:
        name: short name for logs and tables.
        differentiable: whether scores carry gradient to the images.
    """

    name: str
    differentiable: bool

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the scores: weights sha256, resize kernel, antialias, padding, dtype, token limit,
        normalisation. JSON-able.
        """
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]; no gradient reaches the reward's own weights."""
        ...


class ScaledReward(Reward, Protocol):
    """A reward whose scores become logits over images: what a latent proxy can learn from.

    Attributes:
        logit_scale: factor from score to logit (HPS: 100); None where the recipe must say it.
    """

    logit_scale: float | None


class LatentReward(Protocol):
    """A reward that reads latents, already divided by the scaling factor, and learns; a ``torch.nn.Module``."""

    def state_dict(self) -> dict[str, Any]:
        """As a module's."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:
        """As a module's."""
        ...

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw cosines (B,) of unscaled latents (B, C, h, w)."""
        ...

    def logit_scale(self) -> Tensor:
        """The learnable factor from cosine to logit; a scalar with gradient."""
        ...

    def clamp_logit_scale(self) -> None:
        """Hold the logit scale at 100 or below, in place; called after each update."""
        ...

    def unfreeze(self, image_layers: int | str, text_layers: int | str) -> list[nn.Parameter]:
        """Make the last layers of each tower trainable and freeze all else; returns what is trainable."""
        ...


def score(reward: Reward, images: Tensor, prompts: Sequence[str], places: Tensor | None = None) -> Tensor:
    """Scores (B,) of images; of random windows of them where the reward looks at such.

    Args:
        reward: with an attribute ``random_crop`` that is not None where it takes ``places``.
        images: (B, 3, H, W) in [0, 1].
        prompts: B texts.
        places: of the windows, (B, 2) in [0, 1); None for the centre.
    """
    if getattr(reward, "random_crop", None):
        return reward(images, prompts, places)  # type: ignore[call-arg]
    return reward(images, prompts)


def fingerprint_id(fingerprint: dict[str, Any]) -> str:
    """8 hex digits of the sha256 of a fingerprint's canonical JSON."""
    canonical = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
