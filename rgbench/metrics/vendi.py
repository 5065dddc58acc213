"""Vendi score: the effective number of different images (Friedman and Dieng, 2023, arXiv 2210.02410).

    VS = exp(−Σ λ_i ln λ_i),  λ the eigenvalues of K / n,  K the cosine similarities of n images

The nonzero eigenvalues of K / n are those of the d × d matrix Σ x̂ x̂ᵀ / n of normalised features x̂; the smaller matrix
is taken. The good end is the reference's own score, not a higher one: the value is the difference to it. The score
grows with n, so a larger reference is thinned to as many images.
"""

from __future__ import annotations

import numpy as np

from rgbench.core.progress import Track, untracked
from rgbench.metrics.base import SetMetric
from rgbench.metrics.context import Context
from rgbench.metrics.statistics import NUM_GROUPS, cluster_groups, jackknife_interval
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol

CHUNK = 4096
MIN_IMAGES = 2
SEED = 0  # of the reference's images that serve


def vendi_score(rows: np.ndarray, track: Track = untracked, positions: np.ndarray | None = None) -> float:
    """The score of (n, d) features, or of those at some positions; in [1, min(n, d)]."""
    positions = np.arange(len(rows)) if positions is None else positions
    num = len(positions)
    return _score(_gram(rows[positions]) if num <= rows.shape[1] else _moments(rows, positions, track), num)


def vendi_replicates(rows: np.ndarray, groups: np.ndarray, track: Track = untracked) -> list[float]:
    """The score with each group of rows left out, by group; none where nothing would be left.

    Args:
        rows: (n, d) features.
        groups: (n,) group of each row.
        track: shows progress.
    """
    counts = np.bincount(groups)
    num, dim = rows.shape
    if num <= dim:
        gram = _gram(rows)
        kept = [keep for keep in (np.flatnonzero(groups != g) for g in range(len(counts))) if len(keep)]
        return [_score(gram[np.ix_(keep, keep)], len(keep)) for keep in track(kept, "Vendi: jackknife", "scores")]
    of_group = [np.flatnonzero(groups == g) for g in range(len(counts))]
    parts = [_moments(rows, at) for at in track(of_group, "Vendi: groups of the jackknife")]
    whole = sum(parts[1:], start=parts[0])
    left = [(part, num - n) for part, n in zip(parts, counts, strict=True) if n < num]
    return [_score(whole - part, n) for part, n in track(left, "Vendi: jackknife", "scores")]


def _unit(rows: np.ndarray) -> np.ndarray:
    x = np.asarray(rows, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=np.finfo(np.float64).tiny)


def _gram(rows: np.ndarray) -> np.ndarray:
    x = _unit(rows)
    return x @ x.T


def _moments(rows: np.ndarray, positions: np.ndarray, track: Track = untracked) -> np.ndarray:
    """(d, d) Σ x̂ x̂ᵀ over rows at positions, a few thousand at a time."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for at in track([positions[i : i + CHUNK] for i in range(0, len(positions), CHUNK)], "Vendi: similarities"):
        x = _unit(rows[at])
        total += x.T @ x
    return total


def _score(matrix: np.ndarray, num: int) -> float:
    eigenvalues = np.linalg.eigvalsh(matrix / num)
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


class VendiScore(SetMetric):
    """Vendi score minus that of the reference, with jackknife interval; the reference is taken as fixed.

    Args:
        context: with a reference that suits the prompts.

    Raises:
        UsageError: prompts without scenes where the reference is of scenes, or fewer than 2.
    """

    name = "vendi"
    infos = tuple(
        MetricInfo.of(name, "Vendi", "effective number of different images", Direction.REFERENCE, Family.DIVERSITY)
        for name in ("vendi", "vendi_efflite0")
    )
    min_images = MIN_IMAGES

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        name = f"vendi{context.features.network.suffix}"
        self.num_real = min(len(context.prompts), len(context.features.reference))
        fields = context.set_protocol(kernel="cosine", jackknife=f"{NUM_GROUPS} groups", num_real=self.num_real)
        self.planned = ((name, Protocol.of(name, fields)),)

    def compute(self) -> list[MetricValue]:
        features, num = self.context.features, len(self.context.prompts)
        rows, track = self.context.rows.everything(), self.context.track
        score = vendi_score(rows, track)
        replicates = vendi_replicates(rows, cluster_groups(self.context.clusters(num)), track)
        real = features.remember(f"vendi {self.num_real}", self._real_score)
        differences = [replicate - real for replicate in replicates]
        return [
            MetricValue(
                *self.planned[0],
                value=score - real,
                interval=jackknife_interval(score - real, differences),
                num_images=num,
                reference="real",
                flags=(
                    *(("fewer real images than generated",) if self.num_real < num else ()),
                    *self.context.departures,
                ),
                extra={"level": score, "real": real, "num_reference": self.num_real, "jackknife": differences},
            )
        ]

    def _real_score(self) -> float:
        rows = self.context.features.reference_rows()
        chosen = np.random.default_rng(SEED).permutation(len(rows))[: self.num_real]
        return vendi_score(rows, self.context.track, np.sort(chosen))
