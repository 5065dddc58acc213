"""Reward guided LCD (RG-LCD): arXiv 2403.11027, section 4.1; docs/method.md, "RG-LCD".

    loss = L_LCD − β · R^e(decode(f_θ / scaling_factor), prompt)

| symbol | name | meaning, shape |
|---|---|---|
| R^e | ``expert`` | pixel-space reward, raw score (HPS: the cosine), (B,) |
| β | ``reward.scale`` | weight of the reward |
| f_θ | ``prediction`` | single-step prediction at every drawn t, scaled latents, (B, C, h, w) |
"""

from __future__ import annotations

from typing import Any

from rgbench.data.contract import Batch
from rgbench.errors import UsageError
from rgbench.models import DiffusionModels, decode_images
from rgbench.registry import resolve
from rgbench.rewards.contract import Reward
from rgbench.trainers.contract import StepResult
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.lcd import LCD, distil
from rgbench.trainers.recipe import LCDRecipe, RGLCDRecipe


def load_expert(recipe: RGLCDRecipe, models: DiffusionModels) -> Any:
    """The reward that a recipe names, on the models' device and of their dtype.

    Raises:
        UsageError: unknown, missing, or not differentiable; or no path beside a model that is no preset.
    """
    reward = resolve("reward", recipe.reward.kind)
    if not reward.differentiable:
        raise UsageError(f"reward.kind {recipe.reward.kind} is not differentiable and cannot guide a student")
    path = recipe.reward.path or recipe.model.find("reward.path").reward_folder()
    return reward.load(path, antialias=recipe.reward.antialias, device=models.device, dtype=models.dtype)


class RGLCD(LCD):
    """The RG-LCD trainer.

    Args:
        recipe: validated.
        models: the teacher's parts, frozen.
        expert: R^e, differentiable, frozen.
    """

    recipe: RGLCDRecipe

    def __init__(self, recipe: RGLCDRecipe, models: DiffusionModels, expert: Reward) -> None:
        super().__init__(recipe, models)
        self.expert = expert

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> RGLCD:
        """The trainer of a recipe, with the recipe's reward or the preset's."""
        assert isinstance(recipe, RGLCDRecipe)
        return cls(recipe, models, load_expert(recipe, models))

    def reward_fingerprints(self) -> list[dict[str, Any]]:
        """The expert's."""
        return [self.expert.fingerprint()]

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Lines 1–8 of LCD, then the reward."""
        # 1–8. as LCD
        distilled = distil(self.networks, self.recipe.lcd, self.prepare(batch, rng))

        # 9. decode the single-step prediction, (decode(f / scaling_factor)/2 + ½).clamp(0, 1)
        images = decode_images(self.models.vae, distilled.prediction / self.models.scaling_factor)

        # 10. L_LCD − β · R^e(image, prompt)
        rewards = self.expert(images, batch.prompts)
        losses = {"lcd": distilled.losses, "reward": -self.recipe.reward.scale * rewards}
        return StepResult({"student": losses}, {"reward": rewards.detach()}, reward_calls=len(rewards))
