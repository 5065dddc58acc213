"""Advantage-weighted consistency training: docs/method.md, "Weighted consistency training".

    loss = ω_i · distance(f_θ(z_{n+k}, t_{n+k}), f_θ⁻(z_n, t_n)),  z_n = α_n x_i + σ_n ε

| symbol | name | meaning, shape |
|---|---|---|
| x_i | ``latents`` | i-th of the teacher's n samples of a prompt, (B, C, h, w) |
| r_i | ``scores`` | their rewards, paid once, without gradient, (B, n) |
| A_i | ``advantages`` | r_i against the mean of its prompt's, (B, n) |
| ω_i | ``sample_weights`` | mean 1 over the prompt's samples, (B, n) |

The target of a teacher's jump is a function of z_{n+k}, so that no weight can move its optimum. Here z_n comes from the
same data and noise as z_{n+k} (consistency training, arXiv 2303.01469), and its optimum is a weighted mean. The weights
are those of RWR in DDPO (arXiv 2305.13301); the idea is AdvDistill's (arXiv 2507.00054), for language models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.data.batches import Batch
from rgbench.data.latents import TeacherSource
from rgbench.diffusion.schedule import add_noise, per_sample
from rgbench.models.pipeline import DiffusionModels
from rgbench.train.base import StepDraws, StepResult
from rgbench.train.lcd import LCD, Distillation, Inputs, Start, distil, solve
from rgbench.train.recipe import LCDRecipe, WeightedRecipe, WeightedSection

TINY = 1e-6  # added to a standard deviation
ALIKE = 1e-8  # standard deviation of a prompt's scores below which they count as equal
TOP = 0.1  # of a batch, whose share of the weight is logged


@dataclass(frozen=True)
class WeightedInputs(Inputs):
    """Those of LCD, and where z_n comes from.

    Attributes:
        fraction: draw in [0, 1) of each sample; below ``share`` its z_n is noised data, (B,).
    """

    fraction: Tensor


class Weighted(LCD):
    """The trainer of weighted consistency training."""

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> Weighted:
        """The trainer of a recipe.

        Raises:
            UsageError: weights of samples that were not scored, or that all score alike.
        """
        assert isinstance(recipe, WeightedRecipe)
        source = TeacherSource(recipe.data)
        if recipe.weighted.weights != "none":
            if source.scores is None:
                raise UsageError(
                    f"data.path {source.folder}: its samples have no scores; make them with: rgbench cache RECIPE "
                    "--from teacher --score hps, or use weighted.weights: none"
                )
            if not (source.scores.std(1, unbiased=False) >= ALIKE).any():
                raise UsageError(
                    f"data.path {source.folder}: the samples of each prompt score alike, and no weight is left; make "
                    "more with --samples, or use weighted.weights: none"
                )
        return cls(recipe, models)

    @property
    def _own(self) -> WeightedSection:
        return cast(WeightedRecipe, self.recipe).weighted

    def prepare(self, batch: Batch, rng: StepDraws) -> WeightedInputs:
        """As LCD, and where z_n comes from."""
        inputs = super().prepare(batch, rng)
        return WeightedInputs(**vars(inputs), fraction=rng.uniform("source", 0.0, 1.0).to(inputs.index.device))

    def distil(self, inputs: Inputs) -> Distillation:
        """Lines 2–8, unweighted."""
        inputs, share = cast(WeightedInputs, inputs), self._own.share

        def previous(begin: Start) -> Tensor:
            # 6. the same data and noise at t_n; or the teacher's jump
            noised = add_noise(inputs.latents, inputs.noise, begin.lower, self.networks.schedule)
            if share == 1:
                return noised
            jumped = solve(self.networks, self.recipe.lcd, inputs, begin)
            return torch.where(per_sample(inputs.fraction < share, noised), noised, jumped)

        return distil(self.networks, self.recipe.lcd, inputs, previous)

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Lines 1–8, and the weights."""
        losses = self.distil(self.prepare(batch, rng)).losses
        if self._own.weights == "none":
            return StepResult({"student": {"lcd": losses}})
        assert batch.scores is not None and batch.rank is not None  # the source was checked
        weights, rank = sample_weights(batch.scores, self._own), batch.rank[:, None]
        stats = {"weight": weights.gather(1, rank)[:, 0], "score": batch.scores.gather(1, rank)[:, 0]}
        stats["weight/samples"] = effective_samples(weights)
        weight = stats["weight"].to(losses)
        return StepResult({"student": {"lcd": losses * weight}}, {k: v.to(losses.device) for k, v in stats.items()})

    def watch(self, step: int, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Effective number of samples in the batch, and the share of its weight in its heaviest tenth."""
        if "weight" not in columns:
            return {}
        weights = columns["weight"].sort(descending=True).values
        heaviest = weights[: max(1, int(TOP * len(weights)))].sum() / weights.sum().clamp(min=TINY)
        return {"weight/batch_samples": float(effective_samples(weights[None])[0]), "weight/top10": float(heaviest)}


def advantages(scores: Tensor, own: WeightedSection) -> Tensor:
    """Scores (B, n) against those of the same prompt, (B, n); 0 where all are alike."""
    std = scores.std(1, keepdim=True, unbiased=False)
    centred = scores - scores.mean(1, keepdim=True)
    found = centred / (std + TINY) if own.advantage == "standardised" else centred
    return torch.where(std < ALIKE, torch.zeros_like(found), found)


def sample_weights(scores: Tensor, own: WeightedSection) -> Tensor:
    """ω of scores (B, n), (B, n), mean 1 over each prompt's samples; exactly 1 where all score alike."""
    found, num = advantages(scores, own), scores.shape[1]
    if own.weights == "none":
        return torch.ones_like(scores)
    if own.weights == "softmax":
        raw = (found / own.temperature).softmax(1)
    elif own.weights == "best":
        raw = (scores == scores.max(1, keepdim=True).values).to(scores)
    else:
        raw = found.clamp(min=0)
    alike = (found == 0).all(1, keepdim=True)
    return torch.where(alike, torch.ones_like(raw), num * raw / raw.sum(1, keepdim=True))


def effective_samples(weights: Tensor) -> Tensor:
    """(Σ ω)²/Σ ω² of each row of (B, n), (B,)."""
    return weights.sum(1) ** 2 / (weights**2).sum(1).clamp(min=TINY)
