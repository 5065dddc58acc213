"""RG-LCD with a latent proxy reward model (LRM): arXiv 2403.11027, section 4.2; docs/method.md, "RG-LCD + LRM".

    student:  loss = L_LCD − β · R^L(f_θ / scaling_factor, prompt), the proxy held fixed
    proxy:    loss = Σ over pairs of KL(softmax(expert pair) ‖ softmax(proxy pair))

| symbol | name | meaning, shape |
|---|---|---|
| R^L | ``proxy`` | latent reward, raw cosine, (B,); reads unscaled latents |
| R^e | ``expert`` | pixel-space reward, without gradient here |
| β | ``reward.scale`` | weight of the proxy's reward |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgbench.data.contract import Batch
from rgbench.models import DiffusionModels, decode_images
from rgbench.rewards.contract import LatentReward, ScaledReward
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.rewards.pairs import pair_losses
from rgbench.trainers.contract import Learner, Stateful, StepResult
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.lcd import distil
from rgbench.trainers.recipe import LCDRecipe, LRMRecipe
from rgbench.trainers.rg_lcd import RGLCD, load_expert


@dataclass(frozen=True)
class Candidates:
    """Latents of three images per prompt and the prompts they belong to: one record, so that no permutation or
    selection can part them.

    Attributes:
        latents: unscaled, (3·B, C, h, w): predictions, EMA targets, ground truths, each in the batch's order.
        prompts: 3·B texts, row by row those of ``latents``.
    """

    latents: Tensor
    prompts: list[str]


@contextmanager
def held_fixed(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Graphs built inside take no gradient to ``parameters``; the same list is trainable again on leaving."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class LRM(RGLCD):
    """The RG-LCD + LRM trainer.

    Args:
        recipe: validated.
        models: the teacher's parts, frozen.
        expert: R^e.
        proxy: R^L, with a learnable logit scale.
    """

    recipe: LRMRecipe
    expert: ScaledReward

    def __init__(self, recipe: LRMRecipe, models: DiffusionModels, expert: ScaledReward, proxy: LatentReward) -> None:
        super().__init__(recipe, models, expert)
        trainable = recipe.proxy.trainable
        self.proxy = proxy
        self.proxy_parameters = proxy.unfreeze(trainable.image_layers, trainable.text_layers)

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> LRM:
        """The trainer of a recipe, with the recipe's reward and proxy or the preset's.

        Raises:
            UsageError: a part is missing, or the proxy reads latents of another shape or scale.
        """
        assert isinstance(recipe, LRMRecipe)
        path = recipe.proxy.path or recipe.model.find("proxy.path").latent_proxy_folder()
        proxy = LatentCLIP.load(path, models.device, models.dtype)
        proxy.check_fits(models.latent_shape, models.scaling_factor, path)
        return cls(recipe, models, load_expert(recipe, models), proxy)

    def learners(self) -> dict[str, Learner]:
        """All of the student; of the proxy what the recipe lets learn."""
        return {**super().learners(), "proxy": Learner(self.proxy_parameters, self.recipe.proxy.lr)}

    def modules(self) -> dict[str, Stateful]:
        """Student, target and proxy."""
        return {**super().modules(), "proxy": self.proxy}

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Lines 1–8 of LCD, the proxy's reward, and the proxy's own loss on predictions made before any update."""
        # 1–8. as LCD
        inputs = self.prepare(batch, rng)
        distilled = distil(self.networks, self.recipe.lcd, inputs)
        scaling_factor = self.models.scaling_factor

        # 9. L_LCD − β · R^L(f / scaling_factor, prompt), the proxy held fixed
        with held_fixed(self.proxy_parameters):
            rewards = self.proxy(distilled.prediction / scaling_factor, batch.prompts)
        student = {"lcd": distilled.losses, "reward": -self.recipe.reward.scale * rewards}

        # 10. prediction (detached), EMA target and ground truth, with their prompts
        latents = torch.cat([distilled.prediction.detach(), distilled.target, inputs.latents]) / scaling_factor
        candidates = Candidates(latents, batch.prompts * 3)

        # 11. Σ over pairs of KL(softmax(expert pair) ‖ softmax(proxy pair))
        scores, expert_logits = self.expert_logits(candidates)
        proxy_logits = self.proxy(candidates.latents, candidates.prompts) * self.proxy.logit_scale()
        pairs, agreement = pair_losses(expert_logits, proxy_logits.view(3, -1), self.recipe.proxy.loss)

        stats = {"reward": scores[0], "proxy_reward": rewards.detach(), "pair_accuracy": agreement}
        return StepResult({"student": student, "proxy": {"pairs": pairs}}, stats, reward_calls=scores.numel())

    def after_update(self) -> None:
        """Line 9 of LCD, and the bound on the proxy's logit scale."""
        super().after_update()
        self.proxy.clamp_logit_scale()

    @torch.no_grad()
    def expert_logits(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """The expert's raw scores of the decoded candidates and the same × its logit scale, (3, B) each."""
        images = decode_images(self.models.vae, candidates.latents)
        scores = self.expert(images, candidates.prompts).view(3, -1)
        return scores, scores * self.expert.logit_scale
