"""Pair losses by which the latent proxy learns its expert (RG-LCD, arXiv 2403.11027, section 4.2).

Three images of one prompt form three pairs: (prediction, target), (prediction, ground truth), (target, ground truth).
The loss of a sample is the sum over its pairs.

| symbol | name | meaning, shape |
|---|---|---|
| – | ``expert_logits`` | cosine × the expert's logit scale; rows prediction, target, ground truth; (3, B) |
| – | ``proxy_logits`` | the proxy's cosine × its own learnable logit scale, same rows, (3, B) |
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Literal["kl", "smooth", "cross_entropy"]
PAIRS = ((0, 1), (0, 2), (1, 2))
GROUND_TRUTH = 2


def pair_losses(expert_logits: Tensor, proxy_logits: Tensor, kind: PairLoss) -> tuple[Tensor, Tensor]:
    """Loss and agreement of each sample.

    Args:
        expert_logits: (3, B), without gradient.
        proxy_logits: (3, B).
        kind: ``kl``: KL(softmax(expert pair) ‖ softmax(proxy pair)); ``smooth``: the same, but the label is (½, ½)
            where the expert prefers a generated image over the ground truth; ``cross_entropy``: hard labels, the
            expert's choice, and the ground truth in each of its pairs.

    Returns:
        The loss summed over the three pairs, (B,), and the share of pairs that expert and proxy order alike, (B,).

    Raises:
        ValueError: another ``kind``.
    """
    losses, agreements = [], []
    for first, second in PAIRS:
        expert = torch.stack([expert_logits[first], expert_logits[second]], dim=1)  # (B, 2)
        proxy = torch.stack([proxy_logits[first], proxy_logits[second]], dim=1)
        losses.append(_pair_loss(expert, proxy, kind, has_truth=second == GROUND_TRUTH))
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
