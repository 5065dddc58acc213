"""Contrastive loss of latents and captions (CLIP, arXiv 2103.00020, figure 3), one value per sample.

Equal captions in a batch are no negatives of each other: their rows share the label.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    logits = scale * images @ texts.T
    to_text, to_image = (-(label * x.log_softmax(1)).sum(1) for x in (logits, logits.T))
    found = key[logits.detach().argmax(1)] == key
    return 0.5 * (to_text + to_image), found.to(images.dtype)
