"""A weighted sum of rewards, standardised and balanced.

    R = Σ_k w_k · (R_k − μ_k) / s_k

Scores of different rewards have different units: the cosines of HPS vary in the second decimal, aesthetic ratings in
the first digit. μ and s make them comparable as scores; ``balance`` makes them comparable as forces on the image.

| symbol | name | meaning, shape |
|---|---|---|
| R_k, w_k | ``terms``, ``weights`` | rewards and their weights |
| μ_k, s_k | ``mean``, ``std`` | of each term's scores over the calibration images, (K,) float64 |
| g_k | ``gradients`` | ∂(R_k)/∂image, (B, 3, H, W) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.rewards.contract import Reward, score

CHUNK = 16  # images scored at once while calibrating
ALIKE = 16 * torch.finfo(torch.float32).eps  # one image scored twice in a batch differs by a few roundings of its score


class WeightedReward:
    """R, (B,).

    Args:
        terms: rewards.
        weights: as many, not negative.
        standardise: whether μ and s are used; :meth:`calibrate` sets them.
        balance: whether each term's gradient at the image is brought to one length per weight, so that none drowns
            the others.
        logit_scale: factor from R to the logit of a preference, or None.
    """

    name = "sum"

    def __init__(
        self,
        terms: Sequence[Reward],
        weights: Sequence[float],
        *,
        standardise: bool,
        balance: bool,
        logit_scale: float | None = None,
    ) -> None:
        self.terms, self.weights = list(terms), [float(w) for w in weights]
        self.standardise, self.balance, self.logit_scale = standardise, balance, logit_scale
        self.mean = torch.zeros(len(self.terms), dtype=torch.float64)
        self.std = torch.ones(len(self.terms), dtype=torch.float64)
        self.differentiable = all(term.differentiable for term in self.terms)
        self.random_crop = any(getattr(term, "random_crop", None) for term in self.terms)

    def fingerprints(self) -> list[dict[str, Any]]:
        """One per term, since a student is in-sample for each."""
        how = {"standardise": self.standardise, "balance": self.balance}
        pairs = zip(self.terms, self.weights, strict=True)
        return [term.fingerprint() | {"weight": weight, **how} for term, weight in pairs]

    def fingerprint(self) -> dict[str, Any]:
        """The terms' and how they are added; μ and s are state, not identity."""
        return {"name": self.name, "terms": self.fingerprints()}

    @torch.no_grad()
    def calibrate(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Set μ and s from images (N, 3, H, W) in [0, 1] and their N prompts.

        Raises:
            UsageError: a term gives all images the same score, or one that is not finite.
        """
        for k, term in enumerate(self.terms):
            parts = [term(images[i : i + CHUNK], prompts[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
            scores = torch.cat(parts).double()
            std = float(scores.std())
            if not std > ALIKE * float(scores.abs().max()) or not scores.isfinite().all():
                raise UsageError(
                    f"reward.terms.{k}: {term.name} scores all {len(images)} calibration images alike or not at all; "
                    "it cannot be standardised"
                )
            self.mean[k], self.std[k] = float(scores.mean()), std

    def state_dict(self) -> dict[str, Tensor]:
        """μ and s, for a checkpoint."""
        return {"mean": self.mean.clone(), "std": self.std.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], /) -> None:
        """Take them back."""
        self.mean, self.std = state_dict["mean"].clone(), state_dict["std"].clone()

    def __call__(self, images: Tensor, prompts: Sequence[str], places: Tensor | None = None) -> Tensor:
        """R (B,) of images (B, 3, H, W) in [0, 1]; ``places`` of the terms' windows as in ``ViewedReward``."""
        if not (self.balance and torch.is_grad_enabled() and images.requires_grad):
            return torch.stack(self._weighted(images, prompts, places)).sum(0)
        leaf = images.detach().requires_grad_()
        values = self._weighted(leaf, prompts, places)
        gradients = torch.stack([torch.autograd.grad(value.sum(), leaf)[0] for value in values])
        total = torch.stack([value.detach() for value in values]).sum(0)
        return _GivenGradient.apply(images, total, self._balanced(gradients))

    def _weighted(self, images: Tensor, prompts: Sequence[str], places: Tensor | None) -> list[Tensor]:
        """w_k · (R_k − μ_k) / s_k, each (B,)."""
        values = []
        for k, (term, weight) in enumerate(zip(self.terms, self.weights, strict=True)):
            scores = score(term, images, prompts, places)
            if self.standardise:
                scores = (scores - float(self.mean[k])) / float(self.std[k])
            values.append(weight * scores)
        return values

    def _balanced(self, gradients: Tensor) -> Tensor:
        """Sum of g_k · w_k · n̄ / ‖g_k‖, with n̄ = Σ ‖g_k‖ / Σ w_k of each image, so that the sum keeps its size.

        Args:
            gradients: of the weighted terms, (K, B, 3, H, W).
        """
        norms = gradients.flatten(2).norm(dim=2)  # (K, B)
        weights = torch.tensor(self.weights, dtype=norms.dtype, device=norms.device)[:, None]
        wanted = weights * norms.sum(0) / weights.sum()
        factors = torch.where(norms > 0, wanted / norms, torch.zeros_like(norms))
        return (factors[:, :, None, None, None] * gradients).sum(0)


class _GivenGradient(torch.autograd.Function):
    """Scores (B,) whose gradient to the images was worked out before."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outputs[0][:, None, None, None] * gradient, None, None
