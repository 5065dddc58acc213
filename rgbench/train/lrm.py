"""RG-LCD with a latent proxy reward model (LRM): arXiv 2403.11027, section 4.2; docs/method.md, "RG-LCD + LRM".

    student:  loss = L_LCD − β · R^L(f_θ / scaling_factor, prompt), the proxy frozen
    proxy:    loss = Σ over pairs of KL(softmax(expert pair) ‖ softmax(proxy pair))
              or Σ over candidates of ½ (standardised proxy score − standardised expert score)²

| symbol | name | meaning, shape |
|---|---|---|
| R^L | ``proxy`` | latent reward, raw cosine, (B,); reads unscaled latents |
| R^e | ``expert`` | pixel-space reward, without gradient here |
| β | ``guidance.scale`` | weight of the proxy's reward |

The regression standardises both scores by their means and standard deviations over candidates of the teacher, measured
before the first step and kept. A small network (``proxy.small``) gives standardised scores itself.

:class:`Fidelity` measures how well the proxy agrees with its expert, on samples of the student that it does not learn
from. For each prompt and timestep bin the student predicts from fresh noise, and both score the predictions, the EMA
target's and the ground truth. All draws depend on the recipe's seed alone, so that the measurements of a run differ by
the networks and nothing else.

| log | meaning |
|---|---|
| ``fidelity/pair_accuracy`` | share of the pairs (prediction, target, ground truth) that both order alike |
| ``fidelity/kendall_tau`` | τ-b over the predictions of one prompt and bin, mean over prompts (and bins) |
| ``fidelity/calibration_error`` | of the proxy's preference probabilities against the expert's, mean over ten bins |
| ``fidelity/gradient_cosine`` | between ∂R^L/∂f and ∂R^e/∂f, mean over prompts (and bins); where the expert has one |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.run import RunDirectory, stream_seed
from rgbench.data.batches import Batch
from rgbench.data.sources import open_source
from rgbench.diffusion.ddim import ddim_grid
from rgbench.models.pipeline import DiffusionModels, decode_images
from rgbench.rewards.base import Reward, score
from rgbench.rewards.latent_proxy import PAIRS, LatentCLIP, pair_losses
from rgbench.rewards.latent_regressor import LatentRegressor
from rgbench.train.base import OptimiserGroup, Stateful, StepDraws, StepResult, lr_factor
from rgbench.train.lcd import Distillation, Inputs
from rgbench.train.recipe import PROXY_FOLDER, FidelitySection, LCDRecipe, LRMRecipe, SmallSection, find_proxy
from rgbench.train.rg_lcd import RGLCD, TINY, Guided, crop_offsets, inside, load_expert, timestep_bins

CHUNK = 8  # samples at once
CALIBRATION_BINS = 10
CALIBRATED = 64  # samples whose candidates standardise the scores of the regression
WATCHED = 50  # guided steps over which the correlation of proxy and expert is averaged


@dataclass(frozen=True)
class Candidates:
    """Latents of n images per prompt with their prompts: one record, so that no permutation can part them.

    Attributes:
        latents: unscaled, (n·B, C, h, w): predictions, EMA targets, ground truths, each in the batch's order.
        prompts: n·B texts, row by row those of ``latents``.
        num: n.
    """

    latents: Tensor
    prompts: list[str]
    num: int


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Graphs built inside take no gradient to ``parameters``; the same list is trainable again on leaving."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


Proxy = LatentCLIP | LatentRegressor


class LRM(RGLCD):
    """The RG-LCD + LRM trainer.

    Args:
        recipe: validated.
        models: the teacher's parts, frozen.
        expert: R^e.
        proxy: R^L: a latent CLIP with a learnable logit scale, or the small network.

    Raises:
        UsageError: neither the recipe nor the expert has a logit scale.
    """

    recipe: LRMRecipe
    proxy: Any  # of Proxy; torch types a module's methods as tensors

    def __init__(self, recipe: LRMRecipe, models: DiffusionModels, expert: Reward, proxy: Proxy) -> None:
        super().__init__(recipe, models, expert)
        regression = recipe.proxy.loss == "regression"
        logit_scale = recipe.proxy.logit_scale or getattr(expert, "logit_scale", None) or (1.0 if regression else None)
        if logit_scale is None:
            raise UsageError(
                f"proxy.logit_scale: {expert.name} has none; give the factor from its scores to logits of a "
                "preference, or use proxy.loss: regression"
            )
        self.logit_scale, self.proxy, self.is_small = float(logit_scale), proxy, recipe.proxy.small is not None
        section, trainable = recipe.proxy.fidelity, recipe.proxy.trainable
        self.moments = self.standardise() if regression else None
        self.fidelity: Fidelity | None = None
        if section.every:
            data = open_source(section.data or recipe.data).load(list(range(section.prompts)))
            grid = recipe.lcd.num_ddim_timesteps
            self.fidelity = Fidelity(section, data, recipe.seed, grid, self.score_samples)
        self.proxy_parameters = (
            list(proxy.requires_grad_(True).parameters())
            if self.is_small
            else self.proxy.unfreeze(trainable.image_layers, trainable.text_layers)
        )
        self.correlations = Window()

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> LRM:
        """The trainer of a recipe, with the recipe's reward and proxy or the preset's.

        Raises:
            UsageError: a part is missing, or the proxy reads latents of another shape or scale.
        """
        assert isinstance(recipe, LRMRecipe)
        return cls(recipe, models, load_expert(recipe, models), load_proxy(recipe, models))

    def optimiser_groups(self) -> dict[str, OptimiserGroup]:
        """The student, and the proxy's trainable part."""
        section = self.recipe.proxy.optimiser
        factor = lr_factor(section, self.recipe.train.steps)
        return {
            **super().optimiser_groups(),
            "proxy": OptimiserGroup(self.proxy_parameters, self.recipe.proxy.lr, section, factor),
        }

    def modules(self) -> dict[str, Stateful]:
        """Student, target and proxy; with a gate, the measurement that sets it; with a bound, the correlations."""
        modules = {**super().modules(), "proxy": self.proxy}
        if self.recipe.proxy.min_correlation is not None:
            modules["correlations"] = self.correlations
        if self.fidelity is not None and self.recipe.proxy.fidelity.gate is not None:
            modules["fidelity"] = self.fidelity
        return modules

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Lines 1–8 of LCD, the proxy's reward, and the proxy's own loss on predictions made before any update."""
        measured = self._measure_fidelity(rng.step, len(batch.prompts))
        losses: dict[str, dict[str, Tensor]] = {}

        # 1–8. as LCD
        inputs, moves = self.prepare(batch, rng), self.moves(rng.step)
        with torch.set_grad_enabled(moves):
            distilled = self.distil(inputs)

        # 9. L_LCD − β · R^L(f / scaling_factor, prompt), the proxy frozen
        if moves:
            guided = self.guide(distilled, batch.prompts, rng.step)
            losses["student"] = guided.losses
            measured |= {"proxy_reward": guided.rewards, **guided.stats}

        # 10. prediction (detached), EMA target and ground truth, with their prompts
        candidates = self.candidates(inputs, distilled, batch.prompts)

        # 11. Σ over pairs of KL(softmax(expert pair) ‖ softmax(proxy pair)), or the regression
        losses["proxy"], stats = self.label(candidates, batch, rng)
        return StepResult(losses, stats | measured, reward_calls=len(candidates.prompts))

    def guide(self, distilled: Distillation, prompts: list[str], step: int) -> Guided:
        """Line 9: the student's losses, its reward through the proxy as it stands."""

        def reward(prediction: Tensor) -> Tensor:
            return self.proxy(prediction / self.models.scaling_factor, prompts)

        with frozen(self.proxy_parameters):
            gated = self.fidelity is not None and not self.fidelity.is_open
            return self.guidance(distilled, reward, step, gated=gated)

    def label(
        self, candidates: Candidates, batch: Batch, rng: StepDraws
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Line 11: the proxy's losses on candidates that the expert scores, and statistics of both, (B,) each."""
        images = batch.images_BCHW if self.recipe.proxy.truth == "image" else None
        scores = self.expert_scores(candidates, crop_offsets(self.expert, rng), images)
        found = self.proxy_scores(candidates)
        losses, agreement = self.proxy_losses(scores, found)
        if self.recipe.proxy.labels == "shuffled":
            losses, _ = self.proxy_losses(shuffled(scores, rng), found)
        stats = {"reward": scores[0], "proxy_reward": found[0].detach(), "pair_accuracy": agreement}
        return losses, stats

    def proxy_losses(self, scores: Tensor, cosines: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The proxy's loss terms, (B,) each, and the share of pairs ordered alike, (B,).

        Args:
            scores: the expert's, (n, B).
            cosines: the proxy's, (n, B), with gradient.
        """
        kind, expert, proxy = self.recipe.proxy.loss, scores * self.logit_scale, self.proxy_logits(cosines)
        if kind != "regression":
            losses, agreement = pair_losses(expert, proxy, kind)
            return {"pairs": losses}, agreement
        assert self.moments is not None
        return {"regression": self.moments.losses(scores, cosines)}, pair_losses(expert, proxy.detach(), "kl")[1]

    def proxy_logits(self, scores: Tensor) -> Tensor:
        """The proxy's scores as logits of a preference: a CLIP's by its scale, the small network's by the expert's."""
        if not self.is_small:
            return scores * self.proxy.logit_scale()
        assert self.moments is not None
        return scores * (self.moments.expert[1] * self.logit_scale)

    def watch(self, step: int, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """The correlation of proxy and expert over a batch's predictions; stops a run whose proxy has died.

        Raises:
            RgbenchError: the mean of the last guided steps is under ``proxy.min_correlation``.
        """
        value = correlation(columns["proxy_reward"], columns["reward"])
        least = self.recipe.proxy.min_correlation
        if least is not None and self.recipe.guidance.ramp(step) > 0:
            values = self.correlations.add(value)
            mean = sum(values) / len(values)
            if len(values) == WATCHED and mean < least:
                raise RgbenchError(
                    f"step {step}: the proxy does not follow {self.expert.name}: correlation {mean:.2f} over {WATCHED} "
                    f"steps, proxy.min_correlation is {least}; lower proxy.lr, or align the proxy first"
                )
        return {"proxy_correlation": value}

    @torch.no_grad()
    def standardise(self) -> Moments:
        """Moments of both scores over candidates of the untrained student, on the first samples of the data."""
        source = open_source(self.recipe.data)
        num = min(CALIBRATED, source.length or CALIBRATED)
        data, scores, cosines = source.load(list(range(num))), [], []
        for first in range(0, num, CHUNK):
            rows = slice(first, first + CHUNK)
            assert data.images_BCHW is not None  # of a source, not of a cache
            batch = Batch(data.images_BCHW[rows], data.prompts[rows], data.ids[rows])
            draws = FidelityDraws(self.recipe.seed, 0, len(batch.prompts), first=first, dtype=self.models.dtype)
            inputs = self.prepare(batch, draws)
            candidates = self.candidates(inputs, self.distil(inputs), batch.prompts)
            scores.append(self.expert_scores(candidates, crop_offsets(self.expert, draws)))
            cosines.append(self.proxy_scores(candidates))
        return Moments.of(torch.cat(scores, 1), None if self.is_small else torch.cat(cosines, 1), self.expert.name)

    def export(self, run: RunDirectory) -> Path:
        """Write the student's pipeline, and the proxy as it is at the end; returns the pipeline's folder."""
        self.export_proxy(run)
        return super().export(run)

    def export_proxy(self, run: RunDirectory) -> Path:
        """Write the proxy, which ``proxy.path`` of a recipe takes; returns its folder."""
        self.proxy.save(run.path / PROXY_FOLDER)
        return run.path / PROXY_FOLDER

    def after_update(self, moved: Collection[str]) -> None:
        """Line 9 of LCD, and the bound on the proxy's logit scale."""
        super().after_update(moved)
        if not self.is_small:
            self.proxy.clamp_logit_scale()

    def candidates(self, inputs: Inputs, distilled: Distillation, prompts: list[str]) -> Candidates:
        """What expert and proxy compare: predictions (detached), EMA targets and ground truths."""
        latents = torch.cat([distilled.prediction.detach(), distilled.target, inputs.latents])
        return Candidates(latents / self.models.scaling_factor, prompts * 3, 3)

    @torch.no_grad()
    def expert_scores(
        self, candidates: Candidates, offsets: Tensor | None = None, truths: Tensor | None = None
    ) -> Tensor:
        """The expert's raw scores of the decoded candidates, (n, B).

        Args:
            candidates: n·B of them.
            offsets: (B, 2) of the expert's random crops, the same for the images of a prompt, which are compared.
            truths: (B, 3, H, W) in [0, 1], scored in place of the decoded ground truths.
        """
        parts = candidates.latents.chunk(candidates.num)
        decoded = [decode_images(self.models.vae, part) for part in (parts if truths is None else parts[:-1])]
        images = torch.cat(decoded if truths is None else [*decoded, truths.to(decoded[0])])
        repeated = None if offsets is None else offsets.repeat(candidates.num, 1)
        return score(self.expert, images, candidates.prompts, repeated).view(candidates.num, -1)

    def proxy_scores(self, candidates: Candidates) -> Tensor:
        """The proxy's raw scores of the candidates, cosines of a CLIP, (n, B)."""
        return self.proxy(candidates.latents, candidates.prompts).view(candidates.num, -1)

    def _measure_fidelity(self, step: int, num: int) -> dict[str, Tensor]:
        """Fidelity where it is due, and the gate where there is one, as statistics of ``num`` samples."""
        if self.fidelity is None:
            return {}
        values = self.fidelity.at(step)
        if self.recipe.proxy.fidelity.gate is not None:
            values = values | {"reward_gate": float(self.fidelity.is_open)}
        return {name: torch.full((num,), value) for name, value in values.items()}

    def score_samples(self, batch: Batch, draws: StepDraws, index: Tensor, compare_gradients: bool) -> Scores:
        """Logits of expert and proxy on samples of the student, for :class:`Fidelity`.

        Args:
            batch: prompts and ground truths.
            draws: noise and guidance.
            index: into the DDIM grid, (B,).
            compare_gradients: compare those of the first sample, where the expert has one.
        """
        scaling_factor, offsets = self.models.scaling_factor, crop_offsets(self.expert, draws)
        with torch.no_grad():
            inputs = replace(self.prepare(batch, draws), index=index.to(self.models.device))
            distilled = self.distil(inputs)
            candidates = self.candidates(inputs, distilled, batch.prompts)
            expert = self.expert_scores(candidates, offsets) * self.logit_scale
            proxy = self.proxy_logits(self.proxy_scores(candidates))
        if not (compare_gradients and self.expert.differentiable):
            return Scores(expert, proxy, expert.new_zeros(0))
        with torch.enable_grad():
            f = distilled.prediction[:1].detach().requires_grad_()
            first = self.proxy(f / scaling_factor, batch.prompts[:1])
            images = decode_images(self.models.vae, f / scaling_factor)
            second = score(self.expert, images, batch.prompts[:1], None if offsets is None else offsets[:1])
            gradients = [torch.autograd.grad(value.sum(), f)[0] for value in (first, second)]
        return Scores(expert, proxy, gradient_cosine(*gradients))


class Window:
    """Correlations of the last guided steps, at most :data:`WATCHED`."""

    def __init__(self) -> None:
        self._values: list[float] = []

    def add(self, value: float) -> list[float]:
        """Take one more; returns all, the newest last."""
        self._values = [*self._values, value][-WATCHED:]
        return self._values

    def state_dict(self) -> dict[str, Tensor]:
        """The values, float64."""
        return {"values": torch.tensor(self._values, dtype=torch.float64)}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Restore them."""
        self._values = state_dict["values"].tolist()


def load_proxy(recipe: LRMRecipe, models: DiffusionModels) -> Proxy:
    """The proxy that a recipe starts from: its own, the preset's, or a fresh small network.

    Raises:
        UsageError: a part is missing, or the proxy reads latents of another shape or scale.
    """
    small, path = recipe.proxy.small, find_proxy(recipe)
    if small is None:
        assert path is not None
        proxy = LatentCLIP.load(path, models.device, models.dtype)
        proxy.check_fits(models.latent_shape, models.scaling_factor, path)
        return proxy
    fresh = small_proxy(recipe.seed, small, models)
    if path is not None:
        fresh.load_weights(path)
    return fresh.eval()


def small_proxy(seed: int, small: SmallSection, models: DiffusionModels) -> LatentRegressor:
    """A fresh small network of a recipe's seed, for a teacher's latents and text states."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "proxy", 0))
        network = LatentRegressor(
            models.latent_shape, models.scaling_factor, models.encode_empty().shape[-1], **small.model_dump()
        )
    return network.reading(models.encode_prompts).to(models.device, models.dtype)


@dataclass(frozen=True)
class Moments:
    """Means and standard deviations that standardise scores of expert and proxy.

    Attributes:
        expert, proxy: (mean, standard deviation).
    """

    expert: tuple[float, float]
    proxy: tuple[float, float]

    @classmethod
    def of(cls, scores: Tensor, cosines: Tensor | None, name: str) -> Moments:
        """The moments of two sets of scores; without ``cosines``, the proxy gives standardised scores itself.

        Raises:
            UsageError: the expert, called ``name``, scores all images alike.
        """
        expert, proxy = (
            (float(x.double().mean()), float(x.double().std())) if x is not None else (0.0, 1.0)
            for x in (scores, cosines)
        )
        if not expert[1] > 0:
            raise UsageError(
                f"reward {name}: scores {scores.numel()} different images alike; a proxy learns nothing from it"
            )
        return cls(expert, (proxy[0], max(proxy[1], TINY)))

    def losses(self, scores: Tensor, cosines: Tensor) -> Tensor:
        """Σ over candidates of ½ (ẑ − z)², (B,): z of the expert's ``scores``, ẑ of the proxy's ``cosines``, (n, B)."""
        wanted, found = ((x - mean) / std for x, (mean, std) in ((scores, self.expert), (cosines, self.proxy)))
        return 0.5 * (found - wanted).square().sum(0)


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's r of two columns (B,), B ≥ 2; 0 where one of them is constant."""
    a, b = (x.double() - x.double().mean() for x in (first, second))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=TINY))


@dataclass(frozen=True)
class Scores:
    """Expert and proxy on a chunk of samples.

    Attributes:
        expert: logits of prediction, target and ground truth, (3, n).
        proxy: the same of the proxy.
        cosine: between both gradients at the predictions, (n,); empty where they were not compared.
    """

    expert: Tensor
    proxy: Tensor
    cosine: Tensor


class Fidelity:
    """Measures every so many steps, and keeps τ for the gate.

    Args:
        section: of the recipe.
        held_out: the first ``section.prompts`` samples, with their prompts.
        seed: of the recipe.
        num_ddim_timesteps: N of the solver's grid.
        score_samples: scores a chunk: (batch, draws, grid indices (n,), whether to compare gradients).
    """

    def __init__(
        self,
        section: FidelitySection,
        held_out: Batch,
        seed: int,
        num_ddim_timesteps: int,
        score_samples: Callable[[Batch, StepDraws, Tensor, bool], Scores],
    ) -> None:
        self.section, self.held_out, self.seed, self.score_samples = section, held_out, seed, score_samples
        grid = ddim_grid(1000, num_ddim_timesteps)
        bins = {name: inside(grid, ends).nonzero().flatten() for name, ends in timestep_bins(section.bins).items()}
        self.bins = {name: indices for name, indices in bins.items() if len(indices)}  # into the grid
        self.tau = float("nan")
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def state_dict(self) -> dict[str, Tensor]:
        """The last τ, which sets the gate."""
        return {"tau": torch.tensor([self.tau], dtype=torch.float64)}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Restore it."""
        self.tau = float(state_dict["tau"][0])

    @property
    def is_open(self) -> bool:
        """Whether the gate lets the reward guide the student."""
        return self.section.gate is None or self.tau >= self.section.gate

    def at(self, step: int) -> dict[str, float]:
        """Measurements before the update of an optimiser step, from 0, where they are due; else nothing.

        They are due at the last update before a logged step, so that the log has them; with a gate, at the first too.
        """
        due = (step + 1) % self.section.every == 0 or (self.section.gate is not None and self.tau != self.tau)
        if due and self._last[0] != step:  # once per optimiser step, whatever its micro-batches
            self._last = step, self.measure()
            self.tau = self._last[1]["fidelity/kendall_tau"]
        return self._last[1] if self._last[0] == step else {}

    def measure(self) -> dict[str, float]:
        """All values, with the networks as they are."""
        scores = {name: self._scores(number, indices) for number, (name, indices) in enumerate(self.bins.items())}
        taus = {name: _tau(found, self.section.samples) for name, found in scores.items()}
        expert, proxy = (torch.cat([getattr(s, part) for s in scores.values()], 1) for part in ("expert", "proxy"))
        agreement = pair_losses(expert, proxy, "kl")[1]
        values = {"kendall_tau": _mean(taus), "pair_accuracy": float(agreement.mean())}
        values["calibration_error"] = calibration_error(expert, proxy)
        values |= {f"kendall_tau/{name}": tau for name, tau in taus.items()}
        if all(found.cosine.numel() for found in scores.values()):
            cosines = {name: float(found.cosine.mean()) for name, found in scores.items()}
            values |= {"gradient_cosine": _mean(cosines)}
            values |= {f"gradient_cosine/{name}": cosine for name, cosine in cosines.items()}
        return {f"fidelity/{name}": value for name, value in values.items()}

    def _scores(self, number: int, indices: Tensor) -> Scores:
        """All prompts × samples of one timestep bin, prompt by prompt; gradients of each prompt's first sample."""
        num, parts = self.section.samples, []
        for prompt in range(len(self.held_out.prompts)):
            first = (number * len(self.held_out.prompts) + prompt) * num
            for start in range(0, num, CHUNK):
                size = min(CHUNK, num - start)
                images = self.held_out.images_BCHW
                assert images is not None  # of a source, not of a cache
                batch = Batch(
                    images[[prompt] * size], [self.held_out.prompts[prompt]] * size, [self.held_out.ids[prompt]] * size
                )
                draws = FidelityDraws(self.seed, 0, size, first=first + start)
                index = indices[(draws.uniform("index", 0.0, 1.0) * len(indices)).long()]
                parts.append(self.score_samples(batch, draws, index, start == 0))
        return Scores(*(torch.cat([getattr(p, name) for p in parts], -1) for name in ("expert", "proxy", "cosine")))


def shuffled(scores: Tensor, rng: StepDraws) -> Tensor:
    """Scores (3, B) of the three images of each prompt, permuted among them by draws of each sample's own."""
    keys = torch.stack([rng.uniform(f"label_{i}", 0.0, 1.0) for i in range(len(scores))])
    return scores.gather(0, keys.argsort(0).to(scores.device))


class FidelityDraws(StepDraws):
    """Draws from streams of their own, so that the proxy learns from none of these samples."""

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


def _tau(scores: Scores, num: int) -> float:
    """Mean over prompts of τ-b over the predictions of one prompt; 0 where one of the two scores all alike."""
    rows = zip(scores.expert[0].view(-1, num).cpu(), scores.proxy[0].view(-1, num).cpu(), strict=True)
    taus = [float(kendalltau(a.numpy(), b.numpy()).statistic) for a, b in rows]
    return sum(tau if tau == tau else 0.0 for tau in taus) / len(taus)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
