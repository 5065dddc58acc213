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

import torch
from torch import Tensor

from rgbench.data import open_source
from rgbench.data.contract import Batch
from rgbench.errors import UsageError
from rgbench.models import DiffusionModels, decode_images
from rgbench.rewards.config import Sum
from rgbench.rewards.contract import Reward, score
from rgbench.rewards.load import load_reward
from rgbench.rewards.weighted import WeightedReward
from rgbench.trainers.contract import Reader, Stateful, StepResult
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.guidance import Guidance
from rgbench.trainers.lcd import LCD, distil
from rgbench.trainers.recipe import LCDRecipe, RGLCDRecipe


def load_expert(recipe: RGLCDRecipe, models: DiffusionModels) -> Any:
    """The reward that a recipe names, on the models' device and of their dtype; a sum is calibrated on the data.

    Raises:
        UsageError: unknown or missing.
    """
    settings = recipe.reward
    preset = recipe.model.find("reward.path") if recipe.model.preset else None
    preset_path = preset.reward_folder() if preset and preset.root else None  # one on the hub brings none
    expert = load_reward(settings, device=models.device, dtype=models.dtype, preset_path=preset_path)
    if isinstance(settings, Sum) and settings.standardise == "calibrated":
        batch = open_source(recipe.data).load(list(range(settings.calibration_images)))
        assert batch.images_BCHW is not None  # of a source, not of a cache
        expert.calibrate(reconstruct(models, batch.images_BCHW), batch.prompts)
    return expert


def reconstruct(models: DiffusionModels, images: Tensor) -> Tensor:
    """Images through the autoencoder and back, so that they are of the kind that the reward will see."""
    parts = [models.encode_images(part)[0] * models.scaling_factor for part in images.split(8)]
    return torch.cat([models.decode(latents) for latents in parts])


def places(expert: Any, rng: StepDraws) -> Tensor | None:
    """Where the expert's random windows lie, (B, 2) in [0, 1); None where it looks at whole images."""
    if not getattr(expert, "random_crop", None):
        return None
    return torch.stack([rng.uniform(f"reward_{side}", 0.0, 1.0) for side in ("row", "column")], dim=1)


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
        self.guidance = Guidance(recipe.reward, recipe.gradients, LCD.learners(self)["student"].parameters)

    def modules(self) -> dict[str, Stateful]:
        """Student, target, and the reward where it has a state: a sum's mean and standard deviation."""
        state = {"reward": self.expert} if isinstance(self.expert, WeightedReward) else {}
        return {**super().modules(), **state}

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> RGLCD:
        """The trainer of a recipe, with the recipe's reward or the preset's."""
        assert isinstance(recipe, RGLCDRecipe)
        expert = load_expert(recipe, models)
        if not expert.differentiable:
            raise UsageError(
                f"reward.kind {recipe.reward.kind}: gives no gradient, and rg_lcd needs it; kind: lrm learns from its "
                "scores alone"
            )
        return cls(recipe, models, expert)

    def reward_fingerprints(self) -> list[dict[str, Any]]:
        """The expert's; of a sum, each term's."""
        return self.expert.fingerprints() if isinstance(self.expert, WeightedReward) else [self.expert.fingerprint()]

    def readers(self) -> dict[str, Reader]:
        """The teacher's text encoder and the expert; of a sum, each term."""
        found = super().readers()
        for reward in self.expert.terms if isinstance(self.expert, WeightedReward) else [self.expert]:
            # a reward of the image alone has neither
            tokenizer, limit = getattr(reward, "tokenizer", None), reward.fingerprint().get("token_limit")
            if tokenizer is not None and limit is not None:
                found[reward.name] = Reader(tokenizer, limit)
        return found

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Lines 1–8 of LCD, then the reward."""
        # 1–8. as LCD
        distilled = distil(self.networks, self.recipe.lcd, self.prepare(batch, rng))

        # 9. decode the single-step prediction, (decode(f / scaling_factor)/2 + ½).clamp(0, 1); score it
        def reward(prediction: Tensor) -> Tensor:
            images = decode_images(self.models.vae, prediction / self.models.scaling_factor)
            return score(self.expert, images, batch.prompts, places(self.expert, rng))

        # 10. L_LCD − β · R^e(image, prompt)
        guided = self.guidance(distilled, reward, rng.step)
        stats = {"reward": guided.rewards, **guided.stats}
        return StepResult({"student": guided.losses}, stats, reward_calls=len(guided.rewards))
