"""Reward guided LCD (RG-LCD): arXiv 2403.11027, section 4.1; docs/method.md, "RG-LCD".

    loss = L_LCD − β · R^e(decode(f_θ / scaling_factor), prompt)

β is a number, or set per sample so that the reward has a share s of the gradient at the student's prediction f:
β = s/(1 − s) · ‖g_L‖ / ‖∂R/∂f‖. The gradients at f are measured in the one backward pass that trains the student: the
distillation loss is elementwise in f, which gives g_L, and g_R passes f on its way to the student.

| symbol | name | meaning, shape |
|---|---|---|
| R^e | ``expert`` | pixel-space reward, raw score (HPS: the cosine), (B,) |
| β, s | ``guidance.scale``, ``guidance.share`` | weight of the reward, its share of the gradient |
| f, f_θ | ``prediction`` | single-step prediction at every drawn t, scaled latents, (B, C, h, w) |
| ‖g_L‖, ‖g_R‖ | ``gradient/lcd``, ``gradient/reward`` | L2 norms of ∂L_LCD/∂f and β · ∂R/∂f of each sample, (B,) |
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
from rgbench.rewards.config import Sum
from rgbench.rewards.load import load_reward
from rgbench.train.base import CaptionTokenizer, Stateful, StepDraws, StepResult
from rgbench.train.lcd import LCD, Distillation
from rgbench.train.recipe import GradientsSection, GuidanceSection, LCDRecipe, LRMPretrainRecipe, RGLCDRecipe

TINY = 1e-30  # below any norm of a gradient that is not zero


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
        student = LCD.optimiser_groups(self)["student"].parameters
        self.guidance = Guidance(recipe.guidance, recipe.gradients, student)

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> RGLCD:
        """The trainer of a recipe, with the recipe's reward or the preset's.

        Raises:
            UsageError: the reward is missing, or gives no gradient.
        """
        assert isinstance(recipe, RGLCDRecipe)
        expert = load_expert(recipe, models)
        if not expert.differentiable:
            raise UsageError(
                f"reward.kind {recipe.reward.kind}: gives no gradient, and rg_lcd needs it; use kind: lrm, which needs "
                "its scores alone"
            )
        return cls(recipe, models, expert)

    def modules(self) -> dict[str, Stateful]:
        """Student, target, and a sum's mean and standard deviation."""
        return {**super().modules(), **expert_modules(self.expert)}

    def reward_fingerprints(self) -> list[dict[str, Any]]:
        """The expert's; of a sum, each term's."""
        return expert_fingerprints(self.expert)

    def tokenizers(self) -> dict[str, CaptionTokenizer]:
        """The text encoder's and the expert's; of a sum, each term's."""
        return super().tokenizers() | expert_tokenizers(self.expert)

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Lines 1–8 of LCD, then the reward."""
        # 1–8. as LCD
        distilled = self.distil(self.prepare(batch, rng))

        # 9. decode the single-step prediction, (decode(f / scaling_factor)/2 + ½).clamp(0, 1); score it
        def reward(prediction: Tensor) -> Tensor:
            images = decode_images(self.models.vae, prediction / self.models.scaling_factor)
            return score(self.expert, images, batch.prompts, crop_offsets(self.expert, rng))

        # 10. L_LCD − β · R^e(image, prompt)
        guided = self.guidance(distilled, reward, rng.step)
        stats = {"reward": guided.rewards, **guided.stats}
        return StepResult({"student": guided.losses}, stats, reward_calls=len(guided.rewards))


def expert_modules(expert: Reward) -> dict[str, Stateful]:
    """What a checkpoint keeps of an expert: the mean and standard deviation of a sum."""
    return {"reward": expert} if isinstance(expert, WeightedReward) else {}


def expert_fingerprints(expert: Reward) -> list[dict[str, Any]]:
    """The expert's; of a sum, each term's."""
    return expert.fingerprints() if isinstance(expert, WeightedReward) else [expert.fingerprint()]


def expert_tokenizers(expert: Reward) -> dict[str, CaptionTokenizer]:
    """The expert's; of a sum, each term's. A reward of the image alone has none."""
    tokenizers = {}
    for reward in expert.terms if isinstance(expert, WeightedReward) else [expert]:
        tokenizer, limit = getattr(reward, "tokenizer", None), reward.fingerprint().get("token_limit")
        if tokenizer is not None and limit is not None:
            tokenizers[reward.name] = CaptionTokenizer(tokenizer, limit)
    return tokenizers


def load_expert(recipe: RGLCDRecipe | LRMPretrainRecipe, models: DiffusionModels) -> Any:
    """The reward of a recipe, on the models' device and of their dtype; a sum is calibrated on the data.

    Raises:
        UsageError: unknown or missing.
    """
    settings = recipe.reward
    assert settings is not None  # a pre-training that does not align has none, and loads none
    preset = recipe.model.find("reward.path") if recipe.model.preset else None
    preset_path = preset.reward_folder() if preset and preset.root else None  # a preset on the hub brings none
    expert = load_reward(settings, device=models.device, dtype=models.dtype, preset_path=preset_path)
    if isinstance(settings, Sum) and settings.standardise == "calibrated":
        batch = open_source(recipe.data).load(list(range(settings.calibration_images)))
        assert batch.images_BCHW is not None  # of a source, not of a cache
        # through the autoencoder and back, as the reward will see images
        latents = [models.encode_images(part)[0] * models.scaling_factor for part in batch.images_BCHW.split(8)]
        expert.calibrate(torch.cat([models.decode(part) for part in latents]), batch.prompts)
    return expert


def crop_offsets(expert: Reward, rng: StepDraws) -> Tensor | None:
    """Offsets of the expert's random crops, (B, 2) in [0, 1); None where it sees whole images."""
    if not getattr(expert, "random_crop", None):
        return None
    return torch.stack([rng.uniform(f"reward_{side}", 0.0, 1.0) for side in ("row", "column")], dim=1)


@dataclass(frozen=True)
class Guided:
    """The student's loss terms and their statistics.

    Attributes:
        losses: ``lcd`` and ``reward``, (B,) each.
        rewards: R, (B,), detached.
        stats: name → (B,); those under ``gradient/`` are zero until the backward pass fills them.
    """

    losses: dict[str, Tensor]
    rewards: Tensor
    stats: dict[str, Tensor]


class Guidance:
    """L_LCD − β · R, with the timestep window and the gradient accounting; measuring changes no number of the training.

    Args:
        settings: the recipe's guidance section.
        gradients: its gradients section.
        parameters: of the student.
    """

    def __init__(self, settings: GuidanceSection, gradients: GradientsSection, parameters: list[nn.Parameter]) -> None:
        self.settings, self.gradients, self.parameters = settings, gradients, parameters

    def __call__(
        self, distilled: Distillation, reward: Callable[[Tensor], Tensor], step: int, *, gated: bool = False
    ) -> Guided:
        """The student's losses.

        Args:
            distilled: lines 2–8 of the LCD step.
            reward: scores (B,) of scaled latents f (B, C, h, w), differentiable.
            step: optimiser step, from 0.
            gated: switch the reward off.
        """
        settings, f = self.settings, distilled.prediction
        measured = self.gradients.at_prediction or settings.share is not None
        if measured:
            f = f.view_as(f)  # whose gradient is the reward's alone
        rewards = reward(f)
        ramp = settings.ramp(step)
        counted = rewards if settings.ceiling is None else rewards.clamp(max=settings.ceiling)
        term = -(1.0 if settings.scale is None else settings.scale * ramp) * counted
        if settings.window:
            term = term * inside(distilled.start_timesteps, settings.window).to(term.dtype)
        if gated:
            term = term * 0.0
        losses = {"lcd": distilled.losses, "reward": term}
        stats = self._at_prediction(distilled, f, term, ramp) if measured else {}
        if self.gradients.every and (step + 1) % self.gradients.every == 0:
            stats |= self._in_parameters(losses)
        return Guided(losses, rewards.detach(), stats)

    def _at_prediction(self, distilled: Distillation, f: Tensor, term: Tensor, ramp: float) -> dict[str, Tensor]:
        """Statistics at f, which the backward pass fills; with a share, it also scales the reward's gradient there.

        Args:
            distilled: for ∂L_LCD/∂f.
            f: as the reward reads it.
            term: the reward's loss term (B,).
            ramp: factor of the strength under a share; a scale already has it.
        """
        (lcd,) = torch.autograd.grad(distilled.losses.sum(), distilled.prediction, retain_graph=True)
        lcd = lcd.float().flatten(1)
        share = self.settings.share
        names = ["lcd", "reward", "cosine", "share", *(["scale"] if share else [])]
        # float64, as the loop averages in it, so that it holds these tensors, which are filled when it looks
        stats = {f"gradient/{name}": lcd.new_zeros(len(lcd), dtype=torch.float64) for name in names}
        bins = timestep_bins(self.gradients.bins)
        masks = {name: inside(distilled.start_timesteps, ends).float() for name, ends in bins.items()}
        binned = {f"{key}@{name}": torch.zeros_like(value) for key, value in stats.items() for name in masks}
        upstream: list[Tensor] = []

        def note(gradient: Tensor) -> None:
            upstream[:] = [gradient.float()]

        def measure(gradient: Tensor) -> Tensor:
            # the factor that the loop gave the term (1/B, a loss scale) is no property of the reward
            reward = gradient.float().flatten(1) / upstream[0][:, None]
            values = gradient_balance(lcd, reward, share, self.settings.max_scale, ramp)
            for key in stats:
                value = values[key.removeprefix("gradient/")]
                stats[key].copy_(value)
                for name, mask in masks.items():
                    binned[f"{key}@{name}"].copy_(value * mask)
            return gradient * values["scale"][:, None, None, None].to(gradient.dtype) if share else gradient

        term.register_hook(note)
        f.register_hook(measure)
        return {**stats, **binned, **{f"weight@{name}": mask for name, mask in masks.items()}}

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


def gradient_balance(
    lcd: Tensor, reward: Tensor, share: float | None, max_scale: float, ramp: float = 1.0
) -> dict[str, Tensor]:
    """Norms, cosine and share of both gradients at f, and the factor that brings the reward's to ``share``, (B,) each.

    Args:
        lcd: ∂L_LCD/∂f, (B, n).
        reward: gradient of the reward's loss term, (B, n).
        share: s, or None for a factor of 1.
        max_scale: upper bound of the factor.
        ramp: of the guidance's warm-up, in [0, 1]; multiplies the factor.
    """
    lcd_norm, reward_norm = lcd.norm(dim=1), reward.norm(dim=1)
    cosine = (lcd * reward).sum(1) / (lcd_norm * reward_norm).clamp(min=TINY)
    scale = torch.ones_like(reward_norm)
    if share:
        scale = (share / (1 - share) * lcd_norm / reward_norm.clamp(min=TINY)).clamp(max=max_scale) * ramp
    scaled = scale * reward_norm
    found_share = scaled / (lcd_norm + scaled).clamp(min=TINY)
    return {"lcd": lcd_norm, "reward": scaled, "cosine": cosine, "share": found_share, "scale": scale}


def inside(timesteps: Tensor, window: tuple[int, int]) -> Tensor:
    """Whether timesteps (B,) lie in [first, last]."""
    return (timesteps >= window[0]) & (timesteps <= window[1])


def timestep_bins(num: int) -> dict[str, tuple[int, int]]:
    """``num`` ranges of the 1,000 timesteps: name → first and last timestep."""
    edges = [1000 * i // num for i in range(num + 1)]
    return {f"t{low:03d}-{high - 1:03d}": (low, high - 1) for low, high in pairwise(edges)}
