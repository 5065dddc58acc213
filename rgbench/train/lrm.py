"""RG-LCD with a latent proxy reward model (LRM): arXiv 2403.11027, section 4.2; docs/method.md, "RG-LCD + LRM".

    student:  loss = L_LCD − β · R^L(f_θ / scaling_factor, prompt), the proxy held fixed
    proxy:    loss = Σ over pairs of KL(softmax(expert pair) ‖ softmax(proxy pair))

| symbol | name | meaning, shape |
|---|---|---|
| R^L | ``proxy`` | latent reward, raw cosine, (B,); reads unscaled latents |
| R^e | ``expert`` | pixel-space reward, without gradient here |
| β | ``reward.scale`` | weight of the proxy's reward |

How well the latent proxy stands for its expert, on samples of the student that it does not learn from.

For each prompt and timestep bin the student predicts from fresh noise; expert and proxy score the predictions, beside
the EMA target's and the ground truth. All draws are functions of the recipe's seed alone, so that the measurements of
a run differ by the networks and nothing else.

| log | meaning |
|---|---|
| ``fidelity/pair_accuracy`` | share of the pairs (prediction, target, ground truth) that both order alike |
| ``fidelity/kendall_tau`` | τ-b over the predictions of one prompt and bin, mean over prompts (and bins) |
| ``fidelity/calibration_error`` | of the proxy's preference probabilities against the expert's, mean over ten bins |
| ``fidelity/gradient_cosine`` | between ∂R^L/∂f and ∂R^e/∂f, mean over prompts (and bins); where the expert has one |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.data.batches import Batch
from rgbench.data.sources import open_source
from rgbench.models.pipeline import DiffusionModels, decode_images
from rgbench.rewards.base import LatentReward, ScaledReward, score
from rgbench.rewards.latent_proxy import PAIRS, LatentCLIP, pair_losses
from rgbench.train.base import Learner, Stateful, StepDraws, StepResult, schedule
from rgbench.train.lcd import distil
from rgbench.train.recipe import FidelitySection, LCDRecipe, LRMRecipe, find_proxy
from rgbench.train.rg_lcd import RGLCD, TINY, load_expert, places, timestep_bins

CHUNK = 8  # samples at once
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Candidate:
    """Scores of a chunk of samples.

    Attributes:
        expert: logits of prediction, target and ground truth, (3, n).
        proxy: the same of the proxy.
        cosine: between both gradients at the predictions, (n,); empty where not asked for.
    """

    expert: Tensor
    proxy: Tensor
    cosine: Tensor


Judge = Callable[[Batch, StepDraws, Tensor, bool], Candidate]


class Fidelity:
    """Measures every N steps, and remembers τ for the gate.

    Args:
        section: of the recipe.
        held_out: the first ``section.prompts`` samples, with their prompts.
        seed: of the recipe.
        num_ddim_timesteps: N of the solver's grid.
        judge: scores a chunk: (batch, draws, grid indices (n,), whether to compare gradients).
    """

    def __init__(
        self, section: FidelitySection, held_out: Batch, *, seed: int, num_ddim_timesteps: int, judge: Judge
    ) -> None:
        self.section, self.held_out, self.seed, self.judge = section, held_out, seed, judge
        self.bins = _grid_bins(section.bins, num_ddim_timesteps)
        self.tau = float("nan")
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def state_dict(self) -> dict[str, Tensor]:
        """The last τ, which holds the gate."""
        return {"tau": torch.tensor([self.tau], dtype=torch.float64)}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take it back."""
        self.tau = float(state_dict["tau"][0])

    @property
    def is_open(self) -> bool:
        """Whether the reward may guide the student."""
        return self.section.gate is None or self.tau >= self.section.gate

    def at(self, step: int) -> dict[str, float]:
        """What is due before the update of an optimiser step, from 0: measurements, or nothing.

        The last update before a logged step is measured, so that the log has it; with a gate, the first as well.
        """
        due = (step + 1) % self.section.every == 0 or (self.section.gate is not None and self.tau != self.tau)
        if due and self._last[0] != step:  # once per optimiser step, whatever its micro-batches
            self._last = step, self.measure()
            self.tau = self._last[1]["fidelity/kendall_tau"]
        return self._last[1] if self._last[0] == step else {}

    def measure(self) -> dict[str, float]:
        """All figures, with the networks as they are."""
        found = {name: self._of_bin(where, indices) for where, (name, indices) in enumerate(self.bins.items())}
        taus = {name: _tau(scores, self.section.samples) for name, scores in found.items()}
        expert, proxy = (torch.cat([getattr(c, part) for c in found.values()], 1) for part in ("expert", "proxy"))
        agreement = pair_losses(expert, proxy, "kl")[1]
        values = {"kendall_tau": _mean(taus), "pair_accuracy": float(agreement.mean())}
        values["calibration_error"] = calibration_error(expert, proxy)
        values |= {f"kendall_tau/{name}": tau for name, tau in taus.items()}
        if found[next(iter(found))].cosine.numel():
            cosines = {name: float(scores.cosine.mean()) for name, scores in found.items()}
            values |= {"gradient_cosine": _mean(cosines)}
            values |= {f"gradient_cosine/{name}": cosine for name, cosine in cosines.items()}
        return {f"fidelity/{name}": value for name, value in values.items()}

    def _of_bin(self, where: int, indices: Tensor) -> Candidate:
        """Scores of all prompts × samples of one timestep bin, prompt by prompt; gradients of each prompt's first."""
        num, parts = self.section.samples, []
        for prompt in range(len(self.held_out.prompts)):
            first = (where * len(self.held_out.prompts) + prompt) * num
            for start in range(0, num, CHUNK):
                size = min(CHUNK, num - start)
                rows = [prompt] * size
                images = self.held_out.images_BCHW
                assert images is not None  # of a source, not of a cache
                batch = Batch(images[rows], [self.held_out.prompts[prompt]] * size, [self.held_out.ids[prompt]] * size)
                draws = FidelityDraws(self.seed, 0, size, first=first + start)
                picked = indices[(draws.uniform("index", 0.0, 1.0) * len(indices)).long()]
                parts.append(self.judge(batch, draws, picked, start == 0))
        return Candidate(*(torch.cat([getattr(p, name) for p in parts], -1) for name in ("expert", "proxy", "cosine")))


class FidelityDraws(StepDraws):
    """Draws from streams of their own, so that no sample looked at here is one that the proxy learns from."""

    def _generators(self, stream: str) -> list[torch.Generator]:
        return super()._generators(f"fidelity_{stream}")


def gradient_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of two gradients (n, C, h, w) of the same samples, (n,)."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=TINY)


def calibration_error(expert: Tensor, proxy: Tensor) -> float:
    """Expected calibration error of the proxy's preferences (Guo et al. 2017, eq. 3, against soft labels).

    Args:
        expert: logits (3, n).
        proxy: logits (3, n).

    Returns:
        Σ over ten equal bins of the proxy's P(first wins) of (share of pairs in the bin) · |its mean there − the
        expert's|, in [0, 1].
    """
    p, q = (torch.cat([(x[a] - x[b]).double().sigmoid() for a, b in PAIRS]) for x in (proxy, expert))
    bins = (p * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=p.device).index_add_(0, bins, p - q)
    return float(gaps.abs().sum() / len(p))


def _tau(scores: Candidate, num: int) -> float:
    """Mean over prompts of τ-b over the predictions of one prompt; 0 where one of the two scores all alike."""
    rows = zip(scores.expert[0].view(-1, num).cpu(), scores.proxy[0].view(-1, num).cpu(), strict=True)
    taus = [float(kendalltau(a.numpy(), b.numpy()).statistic) for a, b in rows]
    return sum(tau if tau == tau else 0.0 for tau in taus) / len(taus)


def _grid_bins(num: int, num_ddim_timesteps: int) -> dict[str, Tensor]:
    """Indices into the DDIM grid by timestep bin; bins without a grid point are left out."""
    k = 1000 // num_ddim_timesteps
    timesteps = k * torch.arange(1, num_ddim_timesteps + 1) - 1
    found = {}
    for name, (low, high) in timestep_bins(num).items():
        indices = ((timesteps >= low) & (timesteps <= high)).nonzero().flatten()
        if len(indices):
            found[name] = indices
    return found


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


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
