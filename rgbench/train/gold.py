"""Gold beside the trained reward while a student trains: over-optimisation is seen while it happens.

At every look the student makes images of the same prompts from the same noise, so looks differ by the student alone.

| log | meaning, mean over the images |
|---|---|
| ``gold/utility`` | share of the caption that is right, less the weighted degradation, as the annotators see it |
| ``gold/right`` | share of images that show everything the caption says, in [0, 1] |
| ``gold/degradation`` | strength of the images' degradation, in [0, 1] |
| ``gold/reward`` | the trained reward, raw score of the same images; where there is one |
"""

from __future__ import annotations

from typing import Any

import torch

from rgbench.benchtop.gold import Gold
from rgbench.benchtop.oracle import load_oracle
from rgbench.benchtop.preferences import PreferenceConfig, utility
from rgbench.benchtop.scenes import IMAGE_SIZE, Scenes
from rgbench.core.errors import UsageError
from rgbench.core.run import stream_generator
from rgbench.data.prompts import benchtop_prompts
from rgbench.models.presets import CLASSIFIERS_FOLDER, REGRESSORS_FOLDER
from rgbench.rewards.base import score
from rgbench.train.base import StudentTrainer, autocast
from rgbench.train.log import REWARD, RIGHT, UTILITY

NUM_IMAGES = 64


class GoldMonitor:
    """Measures gold and the trained reward on images of a student.

    Args:
        trainer: of the student; its attribute ``expert``, if any, is the trained reward.

    Raises:
        UsageError: its world has no oracle.
    """

    def __init__(self, trainer: StudentTrainer) -> None:
        models = trainer.models
        if models.resolution != IMAGE_SIZE:
            raise UsageError(
                f"monitor.oracle_every: the oracle reads the benchtop's images of {IMAGE_SIZE} px, this model makes "
                f"{models.resolution} px; set it to 0"
            )
        self.trainer, self.annotators = trainer, PreferenceConfig()
        self.oracle = load_oracle(CLASSIFIERS_FOLDER, models.device)
        self.regressors = Gold(REGRESSORS_FOLDER, models.device)
        prompts = benchtop_prompts(NUM_IMAGES).prompts
        self.prompts = [prompt.text for prompt in prompts]
        self.scenes = Scenes.from_dicts([prompt.scene for prompt in prompts if prompt.scene])

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Values for the log, of the student as it is."""
        recipe, models = self.trainer.recipe, self.trainer.models
        generators = [stream_generator(recipe.seed, "gold", 0, i) for i in range(len(self.prompts))]
        with autocast(recipe.train.dtype, models.device.type):
            images = self.trainer.sample(self.prompts, generators).float()
        found = self.oracle.score(images, self.scenes)
        degradation = self.regressors.degradation(images).cpu()
        values = {RIGHT: found["all"], "gold/degradation": degradation}
        values[UTILITY] = utility(found["share"], degradation, self.annotators)
        expert: Any = getattr(self.trainer, "expert", None)
        if expert is not None:
            values[REWARD] = score(expert, images.to(models.device), self.prompts)
        return {name: float(value.double().mean()) for name, value in values.items()}
