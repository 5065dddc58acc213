"""How well the latent proxy stands for its expert, on samples of the student that it does not learn from.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from rgbench.data.contract import Batch
from rgbench.rewards.pairs import PAIRS, pair_losses
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.guidance import TINY, timestep_bins
from rgbench.trainers.proxy_config import FidelitySection

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
