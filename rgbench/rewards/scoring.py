"""Any function that scores images as a reward: a labeller for a latent proxy, without gradient."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgbench.errors import RgbenchError

Score = Callable[[Tensor, list[str]], Any]


class CallableReward:
    """A scoring function behind the reward contract; it need not be differentiable, nor written in torch.

    Args:
        score: (images (B, 3, H, W) in [0, 1], B prompts) → B numbers, as a tensor, an array or a list.
        name: short, for logs and tables.
        fingerprint: what changes its scores; by default the code's name and the sha256 of the file it stands in.
        logit_scale: factor from score to the logit of a preference, or None where the recipe says it.
    """

    differentiable = False

    def __init__(
        self,
        score: Score,
        name: str,
        *,
        fingerprint: dict[str, Any] | None = None,
        logit_scale: float | None = None,
    ) -> None:
        self.score, self.name, self.logit_scale = score, name, logit_scale
        self._fingerprint = {"name": name, **(_code(score) if fingerprint is None else fingerprint)}

    def fingerprint(self) -> dict[str, Any]:
        """What changes the scores, as far as it is known."""
        return self._fingerprint

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) on the images' device, without gradient.

        Raises:
            RgbenchError: not one number per image.
        """
        given = self.score(images.detach(), list(prompts))
        scores = torch.as_tensor(given, dtype=images.dtype, device=images.device)
        if scores.shape != (len(prompts),):
            shape = tuple(scores.shape)
            raise RgbenchError(f"reward {self.name}: gave scores of shape {shape} for {len(prompts)} images; give (B,)")
        return scores.detach()


def _code(score: Score) -> dict[str, Any]:
    """Where a function stands and the sha256 of that file: what tells one version of it from another."""
    owner = score if inspect.isroutine(score) or inspect.isclass(score) else type(score)
    file = inspect.getsourcefile(owner)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else "unknown"
    return {"weights_sha256": "none", "antialias": None, "code": f"{owner.__module__}:{owner.__qualname__}",
            "code_sha256": digest}  # fmt: skip
