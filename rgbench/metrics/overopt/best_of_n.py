"""Best-of-n equivalence: how many draws of the base model are worth one of the trained model.

    E[max of n] = Σ_{i=n..N} C(i−1, n−1) / C(N, n) · x_(i)        x_(1) ≤ … ≤ x_(N)

is the unbiased order-statistic estimator from N ≥ n scores of one prompt (the U-statistic
of the maximum; as in Gao et al., 2023, arXiv 2210.10760, appendix). The equivalent n is the
smallest at which its mean over prompts reaches the trained model's mean reward; where even
n = N does not, it is censored: "> N". Choosing the best of n moves a model by at most

    KL_bon = ln n − (n − 1)/n        (Stiennon et al., 2020; Hilton, 2022)

nats, so n says how hard the reward was optimised in units that no training changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rgbench.metrics.intervals import LEVEL, NUM_RESAMPLES

ROUNDING = 1e-12


@dataclass(frozen=True)
class BestOfN:
    """The equivalent n of a trained model.

    Attributes:
        n: None where it is above ``num_samples``.
        low: of the 95 % interval over prompts; None where that end is above ``num_samples``.
        high: likewise.
        kl: KL_bon of n in nats; None where n is.
        num_samples: N, the base's images of each prompt.
        num_prompts: prompts that both models have.
    """

    n: int | None
    low: int | None
    high: int | None
    kl: float | None
    num_samples: int
    num_prompts: int

    def __str__(self) -> str:
        return f"> {self.num_samples}" if self.n is None else str(self.n)


def order_weights(num: int, n: int) -> np.ndarray:
    """(N,) weights of the ascending order statistics in the unbiased estimator of E[max of n]."""
    if not 1 <= n <= num:
        raise ValueError(f"the maximum of {n} cannot be estimated from {num} samples")
    total = math.lgamma(num + 1) - math.lgamma(n + 1) - math.lgamma(num - n + 1)
    weights = np.zeros(num)
    for i in range(n, num + 1):
        weights[i - 1] = math.exp(math.lgamma(i) - math.lgamma(n) - math.lgamma(i - n + 1) - total)
    return weights


def expected_maxima(scores: np.ndarray) -> np.ndarray:
    """Unbiased E[max of n] of each row for n = 1 … N.

    Args:
        scores: (P, N) scores, one row per prompt.

    Returns:
        (P, N); column n − 1 is for n.
    """
    ascending = np.sort(np.asarray(scores, dtype=np.float64), axis=1)
    num = ascending.shape[1]
    return ascending @ np.stack([order_weights(num, n) for n in range(1, num + 1)], axis=1)


def kl_best_of(n: int) -> float:
    """The most, in nats, that choosing the best of n moves a distribution."""
    return math.log(n) - (n - 1) / n


def equivalent_n(base: np.ndarray, trained: np.ndarray, seed: int = 0) -> BestOfN:
    """The n at which best-of-n of the base reaches the trained model's reward.

    Args:
        base: (P, N) rewards of the base model.
        trained: (P,) mean reward of the trained model for the same prompts.
        seed: of the bootstrap over prompts.

    Raises:
        ValueError: the sides have other prompts, or there is none.
    """
    if len(base) != len(trained) or not len(base):
        raise ValueError(f"{len(base)} and {len(trained)} prompts cannot be compared")
    maxima, trained = expected_maxima(base), np.asarray(trained, dtype=np.float64)
    rng, num = np.random.default_rng(seed), len(trained)
    drawn = [rng.integers(0, num, num) for _ in range(NUM_RESAMPLES)]
    spread = np.array([_reached(maxima[at].mean(0), float(trained[at].mean())) for at in drawn])
    ends = np.quantile(spread, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], method="nearest")
    most = base.shape[1]
    n = _known(_reached(maxima.mean(0), float(trained.mean())), most)
    return BestOfN(
        n=n,
        low=_known(float(ends[0]), most),
        high=_known(float(ends[1]), most),
        kl=None if n is None else kl_best_of(n),
        num_samples=most,
        num_prompts=num,
    )


def _reached(means: np.ndarray, target: float) -> float:
    """The first n whose mean reaches the target; N + 1 where none does. Weights that sum to 1 − 1e-16 do not matter."""
    found = np.flatnonzero(means >= target - ROUNDING * max(1.0, abs(target)))
    return float(found[0] + 1 if len(found) else len(means) + 1)


def _known(n: float, most: int) -> int | None:
    return int(n) if n <= most else None
