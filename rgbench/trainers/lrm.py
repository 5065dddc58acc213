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
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rgbench.data import open_source
from rgbench.data.contract import Batch
from rgbench.errors import UsageError
from rgbench.models import DiffusionModels, decode_images
from rgbench.rewards.contract import LatentReward, ScaledReward, score
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.rewards.pairs import pair_losses
from rgbench.trainers.contract import Learner, Stateful, StepResult
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.fidelity import Candidate, Fidelity, gradient_cosine
from rgbench.trainers.lcd import distil
from rgbench.trainers.proxy_folder import find_proxy
from rgbench.trainers.recipe import LCDRecipe, LRMRecipe
from rgbench.trainers.rg_lcd import RGLCD, load_expert, places
from rgbench.trainers.schedule import schedule


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
        if expert.logit_scale is None:
            raise UsageError(
                f"reward.logit_scale: {expert.name} does not say what a difference of its scores is worth; give the "
                "factor from score to the logit of a preference"
            )
        self.logit_scale = expert.logit_scale
        trainable = recipe.proxy.trainable
        self.proxy = proxy
        section = recipe.proxy.fidelity
        self.fidelity: Fidelity | None = None
        if section.every:
            data = open_source(section.data or recipe.data).load(list(range(section.prompts)))
            grid = recipe.lcd.num_ddim_timesteps
            self.fidelity = Fidelity(section, data, seed=recipe.seed, num_ddim_timesteps=grid, judge=self.judge)
        self.proxy_parameters = proxy.unfreeze(trainable.image_layers, trainable.text_layers)

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> LRM:
        """The trainer of a recipe, with the recipe's reward and proxy or the preset's.

        Raises:
            UsageError: a part is missing, or the proxy reads latents of another shape or scale.
        """
        assert isinstance(recipe, LRMRecipe)
        path = find_proxy(recipe)
        proxy = LatentCLIP.load(path, models.device, models.dtype)
        proxy.check_fits(models.latent_shape, models.scaling_factor, path)
        return cls(recipe, models, load_expert(recipe, models), proxy)

    def learners(self) -> dict[str, Learner]:
        """All of the student; of the proxy what the recipe lets learn."""
        own = self.recipe.proxy.optimiser
        proxy = Learner(
            self.proxy_parameters,
            self.recipe.proxy.lr,
            betas=own.betas,
            weight_decay=own.weight_decay,
            max_grad_norm=own.max_grad_norm,
            factor=schedule(own, self.recipe.train.steps),
        )
        return {**super().learners(), "proxy": proxy}

    def modules(self) -> dict[str, Stateful]:
        """Student, target and proxy; with a gate, the measurement that holds it."""
        modules = {**super().modules(), "proxy": self.proxy}
        if self.fidelity is not None and self.recipe.proxy.fidelity.gate is not None:
            modules["fidelity"] = self.fidelity
        return modules

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Lines 1–8 of LCD, the proxy's reward, and the proxy's own loss on predictions made before any update."""
        measured = self._measure(rng.step, len(batch.prompts))

        # 1–8. as LCD
        inputs = self.prepare(batch, rng)
        distilled = distil(self.networks, self.recipe.lcd, inputs)
        scaling_factor = self.models.scaling_factor

        # 9. L_LCD − β · R^L(f / scaling_factor, prompt), the proxy held fixed
        with held_fixed(self.proxy_parameters):
            held = self.fidelity is not None and not self.fidelity.is_open
            guided = self.guidance(
                distilled, lambda f: self.proxy(f / scaling_factor, batch.prompts), rng.step, held=held
            )

        # 10. prediction (detached), EMA target and ground truth, with their prompts
        latents = torch.cat([distilled.prediction.detach(), distilled.target, inputs.latents]) / scaling_factor
        candidates = Candidates(latents, batch.prompts * 3)

        # 11. Σ over pairs of KL(softmax(expert pair) ‖ softmax(proxy pair))
        scores, expert_logits = self.expert_logits(candidates, places(self.expert, rng))
        proxy_logits = self.proxy(candidates.latents, candidates.prompts) * self.proxy.logit_scale()
        pairs, agreement = pair_losses(expert_logits, proxy_logits.view(3, -1), self.recipe.proxy.loss)

        stats = {"reward": scores[0], "proxy_reward": guided.rewards, "pair_accuracy": agreement}
        stats |= guided.stats | measured
        return StepResult({"student": guided.losses, "proxy": {"pairs": pairs}}, stats, reward_calls=scores.numel())

    def after_update(self) -> None:
        """Line 9 of LCD, and the bound on the proxy's logit scale."""
        super().after_update()
        self.proxy.clamp_logit_scale()

    @torch.no_grad()
    def expert_logits(self, candidates: Candidates, windows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The expert's raw scores of the decoded candidates and the same × its logit scale, (3, B) each.

        Args:
            candidates: 3·B of them.
            windows: places (B, 2) of the expert's random windows, one for the three images of a prompt, which are
                compared with one another.
        """
        images = torch.cat([decode_images(self.models.vae, third) for third in candidates.latents.chunk(3)])
        repeated = None if windows is None else windows.repeat(3, 1)
        scores = score(self.expert, images, candidates.prompts, repeated).view(3, -1)
        return scores, scores * self.logit_scale

    def _measure(self, step: int, num: int) -> dict[str, Tensor]:
        """Fidelity where it is due and the gate where there is one, as statistics of ``num`` samples."""
        if self.fidelity is None:
            return {}
        values = self.fidelity.at(step)
        if self.recipe.proxy.fidelity.gate is not None:
            values = values | {"reward_gate": float(self.fidelity.is_open)}
        return {name: torch.full((num,), value) for name, value in values.items()}

    def judge(self, batch: Batch, draws: StepDraws, index: Tensor, compare: bool) -> Candidate:
        """Expert and proxy on samples of the student, for :class:`Fidelity`.

        Args:
            batch: prompts and ground truths.
            draws: noise and guidance.
            index: into the DDIM grid, (B,).
            compare: whether to compare the gradients of both, where the expert has one.
        """
        scaling_factor, windows = self.models.scaling_factor, places(self.expert, draws)
        with torch.no_grad():
            inputs = replace(self.prepare(batch, draws), index=index.to(self.models.device))
            distilled = distil(self.networks, self.recipe.lcd, inputs)
            latents = torch.cat([distilled.prediction, distilled.target, inputs.latents]) / scaling_factor
            candidates = Candidates(latents, batch.prompts * 3)
            expert = self.expert_logits(candidates, windows)[1]
            proxy = (self.proxy(latents, candidates.prompts) * self.proxy.logit_scale()).view(3, -1)
        if not (compare and self.expert.differentiable):
            return Candidate(expert, proxy, expert.new_zeros(0))
        with torch.enable_grad():
            seen = distilled.prediction[:1].detach().requires_grad_()
            first = self.proxy(seen / scaling_factor, batch.prompts[:1])
            images = decode_images(self.models.vae, seen / scaling_factor)
            second = score(self.expert, images, batch.prompts[:1], None if windows is None else windows[:1])
            gradients = [torch.autograd.grad(value.sum(), seen)[0] for value in (first, second)]
        return Candidate(expert, proxy, gradient_cosine(*gradients))
