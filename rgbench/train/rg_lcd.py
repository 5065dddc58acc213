"""Reward guided LCD (RG-LCD): arXiv 2403.11027, section 4.1; docs/method.md, "RG-LCD".

    loss = L_LCD − β · R^e(decode(f_θ / scaling_factor), prompt)

| symbol | name | meaning, shape |
|---|---|---|
| R^e | ``expert`` | pixel-space reward, raw score (HPS: the cosine), (B,) |
| β | ``reward.scale`` | weight of the reward |
| f_θ | ``prediction`` | single-step prediction at every drawn t, scaled latents, (B, C, h, w) |

Where the reward's gradient meets the distillation's: at the student's prediction f.

    loss = L_LCD − β · R(f),   g_L = ∂L_LCD/∂f,   g_R = β · ∂R/∂f,   each sample's own

Both are measured in the one backward pass that trains the student: g_L comes from the loss alone, which is elementwise
in f; g_R passes f on its way to the student. Neither measurement changes a number of the training.

| symbol | name | meaning, shape |
|---|---|---|
| β | ``reward.scale`` | a number, or from a share s of the gradient: β = s/(1 − s) · ‖g_L‖ / ‖∂R/∂f‖, (B,) |
| ‖g_L‖, ‖g_R‖ | ``gradient/lcd``, ``gradient/reward`` | L2 norms at f, (B,) |
| cos(g_L, −g_R) | ``gradient/cosine`` | above 0: both pull f the same way, (B,) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.data.batches import Batch
from rgbench.data.sources import open_source
from rgbench.models.pipeline import DiffusionModels, decode_images
from rgbench.rewards.base import Reward, WeightedReward, score
from rgbench.rewards.config import GradientShare, RewardFields, Sum
from rgbench.rewards.load import load_reward
from rgbench.train.base import Reader, Stateful, StepDraws, StepResult
from rgbench.train.lcd import LCD, Distillation, distil
from rgbench.train.recipe import GradientsSection, LCDRecipe, RGLCDRecipe

TINY = 1e-30  # below any norm of a gradient that is not zero


@dataclass(frozen=True)
class Guided:
    """The student's loss terms and what is measured of them.

    Attributes:
        losses: ``lcd`` and ``reward``, (B,) each.
        rewards: R, (B,), detached.
        stats: name → (B,); those under ``gradient/`` are zero until the backward pass fills them.
    """

    losses: dict[str, Tensor]
    rewards: Tensor
    stats: dict[str, Tensor]


class Guidance:
    """β, the timestep window and the gradient accounting of one recipe.

    Args:
        reward: the recipe's reward section.
        settings: its gradients section.
        parameters: what the student learns.
    """

    def __init__(self, reward: RewardFields, settings: GradientsSection, parameters: list[nn.Parameter]) -> None:
        self.reward, self.settings, self.parameters = reward, settings, parameters

    def __call__(
        self, distilled: Distillation, reward: Callable[[Tensor], Tensor], step: int, *, held: bool = False
    ) -> Guided:
        """L_LCD − β · R.

        Args:
            distilled: lines 2–8 of the LCD step.
            reward: scores (B,) of scaled latents f (B, C, h, w), differentiable.
            step: optimiser step, from 0.
            held: whether the reward is held back, at whatever scale.
        """
        scale, window = self.reward.scale, self.reward.window
        share = scale if isinstance(scale, GradientShare) else None
        measured = self.settings.at_prediction or share is not None
        prediction = distilled.prediction
        seen = prediction.view_as(prediction) if measured else prediction
        rewards = reward(seen)
        term = -(1.0 if isinstance(scale, GradientShare) else scale) * rewards
        if window:
            term = term * inside(distilled.start_timesteps, window).to(term.dtype)
        if held:
            term = term * 0.0
        losses = {"lcd": distilled.losses, "reward": term}
        stats = _watch(distilled, seen, term, share, self.settings.bins) if measured else {}
        if self.settings.every and (step + 1) % self.settings.every == 0:
            stats |= self._in_parameters(losses)
        return Guided(losses, rewards.detach(), stats)

    def _in_parameters(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Norms of both gradients and their cosine over all of the student's parameters, of this micro-batch."""
        lcd, reward = (
            torch.autograd.grad(losses[name].mean(), self.parameters, retain_graph=True, materialize_grads=True)
            for name in ("lcd", "reward")
        )
        dot = torch.stack([(a * b).sum() for a, b in zip(lcd, reward, strict=True)]).sum()
        norms = [torch.nn.utils.get_total_norm(gradients) for gradients in (lcd, reward)]
        values = {"lcd": norms[0], "reward": norms[1], "cosine": dot / (norms[0] * norms[1]).clamp(min=TINY)}
        num = len(losses["lcd"])
        return {f"gradient/parameters/{name}": value.detach().expand(num) for name, value in values.items()}


def inside(timesteps: Tensor, window: tuple[int, int]) -> Tensor:
    """Whether timesteps (B,) lie in [first, last]."""
    return (timesteps >= window[0]) & (timesteps <= window[1])


def timestep_bins(num: int) -> dict[str, tuple[int, int]]:
    """``num`` ranges of timesteps by their names, first and last timestep of each; 1,000 timesteps in all."""
    edges = [1000 * i // num for i in range(num + 1)]
    return {f"t{low:03d}-{high - 1:03d}": (low, high - 1) for low, high in pairwise(edges)}


def _watch(
    distilled: Distillation, seen: Tensor, term: Tensor, share: GradientShare | None, num_bins: int
) -> dict[str, Tensor]:
    """Statistics that the backward pass will fill; with a share, the gradient that passes ``seen`` is scaled to it.

    Args:
        distilled: for ∂L_LCD/∂f.
        seen: f as the reward reads it.
        term: the reward's loss term (B,).
        share: target share, or None for the weights that ``term`` has.
        num_bins: of timesteps.
    """
    (own,) = torch.autograd.grad(distilled.losses.sum(), distilled.prediction, retain_graph=True)
    own = own.float().flatten(1)
    names = ["lcd", "reward", "cosine", "share", *(["scale"] if share else [])]
    # float64, as the loop averages in it, so that what it holds are these tensors, filled when it looks
    stats = {f"gradient/{name}": own.new_zeros(len(own), dtype=torch.float64) for name in names}
    masks = {name: inside(distilled.start_timesteps, ends).float() for name, ends in timestep_bins(num_bins).items()}
    binned = {f"{key}@{name}": torch.zeros_like(value) for key, value in stats.items() for name in masks}
    upstream: list[Tensor] = []

    def note(gradient: Tensor) -> None:
        upstream[:] = [gradient.float()]

    def measure(gradient: Tensor) -> Tensor:
        # what the loop multiplied the term by (1/B, a loss scale) is no property of the reward
        pull = gradient.float().flatten(1) / upstream[0][:, None]
        lcd, reward = own.norm(dim=1), pull.norm(dim=1)
        cosine = (own * pull).sum(1) / (lcd * reward).clamp(min=TINY)
        factor = torch.ones_like(reward)
        if share:
            factor = (share.share / (1 - share.share) * lcd / reward.clamp(min=TINY)).clamp(max=share.max_scale)
        found = {"lcd": lcd, "reward": factor * reward, "cosine": cosine, "scale": factor}
        found["share"] = found["reward"] / (lcd + found["reward"]).clamp(min=TINY)
        for key in stats:
            value = found[key.removeprefix("gradient/")]
            stats[key].copy_(value)
            for name, mask in masks.items():
                binned[f"{key}@{name}"].copy_(value * mask)
        if not share:
            return gradient
        return gradient * factor[:, None, None, None].to(gradient.dtype)

    term.register_hook(note)
    seen.register_hook(measure)
    weights = {f"weight@{name}": mask for name, mask in masks.items()}
    return {**stats, **binned, **weights}


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
