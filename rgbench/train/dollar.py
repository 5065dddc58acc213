"""DOLLAR (arXiv 2412.15689) for images: VSD, consistency, and a latent reward learned by regression.

    student:  loss = β_CD · L_LCD + β_VSD · L_VSD − β · R^l(f_θ / scaling_factor, prompt), the proxy frozen
    fake:     as :mod:`rgbench.train.vsd`
    proxy:    loss = Σ over prediction and ground truth of ½ (R^l − standardised expert score)²

docs/method.md, "DOLLAR, one step". The proxy needs the expert's scores alone; it and the fake score learn at every
step, the student at every ``vsd.ratio``-th.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.train.base import StepDraws, StepResult
from rgbench.train.lcd import Distillation, Inputs, Start
from rgbench.train.lrm import LRM, Candidates, load_proxy
from rgbench.train.recipe import DollarRecipe, LCDRecipe
from rgbench.train.rg_lcd import load_expert
from rgbench.train.vsd import VSD, load_origin


class Dollar(VSD, LRM):
    """The DOLLAR trainer."""

    recipe: DollarRecipe  # type: ignore[assignment]  # of both

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> Dollar:
        """The trainer of a recipe, with the recipe's reward or the preset's.

        Raises:
            UsageError: a part is missing or does not fit the teacher.
        """
        assert isinstance(recipe, DollarRecipe)
        parts = load_expert(recipe, models), load_proxy(recipe, models)
        return cls(recipe, models, *parts, origin=load_origin(recipe, models))

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """The steps of fake score and proxy and, at the last of a cycle, the student's; all of the same predictions."""
        measured = self._measure_fidelity(rng.step, len(batch.prompts))
        inputs, losses, stats = self.prepare(batch, rng), {}, dict[str, Tensor]()
        begin: Start | Distillation
        if self.moves(rng.step):
            # 1–10. LCD and VSD
            begin = distilled = self.distil(inputs)
            prediction = distilled.prediction
            student = self.match(inputs, distilled, rng)
            # 11. − β · R^l(f / scaling_factor, prompt), balanced against both
            both = replace(distilled, losses=student["lcd"] + student["vsd"])
            guided = self.guide(both, batch.prompts, rng.step)
            losses["student"], stats = {**student, "reward": guided.losses["reward"]}, guided.stats
        else:
            begin, prediction = self.predict(inputs)
        # 12. the fake score
        losses["fake"] = self.denoise(inputs, begin, prediction, rng)
        # 13. the proxy, on prediction and ground truth
        candidates = self.pair(inputs, prediction, batch.prompts)
        losses["proxy"], scored = self.label(candidates, batch, rng)
        return StepResult(losses, scored | stats | measured, reward_calls=len(candidates.prompts))

    def pair(self, inputs: Inputs, prediction: Tensor, prompts: list[str]) -> Candidates:
        """What the proxy learns from: predictions, detached, and ground truths."""
        latents = torch.cat([prediction.detach(), inputs.latents])
        return Candidates(latents / self.models.scaling_factor, prompts * 2, 2)
