"""Text features of prompts, encoded once per distinct prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
