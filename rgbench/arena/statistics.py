"""Statistics of pairwise votes: Bradley–Terry strengths, their bootstrap, agreement between raters.

    P(i preferred to j) = π_i / (π_i + π_j)        Bradley and Terry (1952)
    π_i ← W_i / Σ_j n_ij / (π_i + π_j)             Hunter (2004), eq. 3; a tie is half a win for both

Strengths are ln π_i with mean 0: a difference of ln 3 = 1.1 is a win rate of 75 %. Half a win each way between any two
models (Haldane, 1956; Anscombe, 1956) keeps the strength of a model that always wins finite.

Krippendorff's α (Krippendorff, 2011, "Computing Krippendorff's alpha-reliability"), nominal, with missing data:

    α = 1 − (n − 1) · Σ_{c≠k} o_ck / Σ_{c≠k} n_c n_k

from coincidences o_ck: every pair of answers c, k to one unit of m answers counts 1/(m − 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rgbench.metrics.statistics import NUM_RESAMPLES

PRIOR = 0.5  # wins each way between any two models
TOLERANCE = 1e-10
MAX_STEPS = 20_000
CHUNK = 250  # resamples at once


def bradley_terry(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """Strengths of models from their wins.

    Args:
        wins: (…, M, M) wins of the row's model over the column's; ties count half for both.
        prior: wins that are added each way between any two models. With 0, every model must win and lose.

    Returns:
        (…, M) ln π, with mean 0.
    """
    wins = np.asarray(wins, dtype=np.float64)
    apart = 1 - np.eye(wins.shape[-1])
    wins = (wins + prior) * apart
    games, won = wins + np.swapaxes(wins, -1, -2), wins.sum(-1)
    strength = np.ones(won.shape)
    for _ in range(MAX_STEPS):
        met = games / (strength[..., :, None] + strength[..., None, :])
        new = won / met.sum(-1)
        new /= np.exp(np.log(new).mean(-1, keepdims=True))
        done = np.abs(np.log(new / strength)).max() < TOLERANCE
        strength = new
        if done:
            break
    return np.log(strength)


def resample_counts(num_raters: int, num_prompts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample has each rater and each prompt: both are drawn with replacement (Owen, 2007).

    Returns:
        (2000, raters) and (2000, prompts) int64. One rater is in every resample once.
    """
    rng = np.random.default_rng(seed)
    found = [rng.multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES) for num in (num_raters, num_prompts)]
    return found[0], found[1]


def resampled_wins(
    wins: np.ndarray, raters: np.ndarray, prompts: np.ndarray, counts: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Wins of resamples of raters and prompts.

    Args:
        wins: (n, M, M) of each vote.
        raters: (n,) who gave it.
        prompts: (n,) on what.
        counts: from :func:`resample_counts`.

    Returns:
        (2000, M, M).
    """
    flat = wins.reshape(len(wins), -1)
    chunks = (slice(start, start + CHUNK) for start in range(0, NUM_RESAMPLES, CHUNK))
    found = [(counts[0][chunk][:, raters] * counts[1][chunk][:, prompts]) @ flat for chunk in chunks]
    return np.concatenate(found).reshape(NUM_RESAMPLES, *wins.shape[1:])


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Agreement on nominal answers.

    Args:
        units: the answers to each; units of fewer than two do not count.

    Returns:
        1 for agreement, 0 for chance; None where no two answers can be compared, or all are the same.
    """
    shared = [unit for unit in units if len(unit) > 1]
    values = sorted({answer for unit in shared for answer in unit})
    if len(values) < 2:
        return None
    place = {value: i for i, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in shared:
        counts = np.bincount([place[answer] for answer in unit], minlength=len(values)).astype(np.float64)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidences.sum(1)
    num = totals.sum()
    observed = num - np.trace(coincidences)
    expected = num * num - (totals**2).sum()
    return float(1 - (num - 1) * observed / expected)
