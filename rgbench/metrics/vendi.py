"""Vendi score: the effective number of different images (Friedman and Dieng, 2023, arXiv 2210.02410).

    VS = exp(−Σ λ_i ln λ_i),  λ the eigenvalues of K / n,  K the cosine similarities of n images

The nonzero eigenvalues of K / n are those of the d × d matrix Σ x̂ x̂ᵀ / n of normalised features x̂, so n images cost
no more than d features. It needs no reference; the reference's own score stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.intervals import NUM_GROUPS, jackknife_groups, jackknife_interval

CHUNK = 4096
MIN_IMAGES = 2


def similarity_moments(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(d, d) Σ x̂ x̂ᵀ over rows of features at positions."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(positions), CHUNK):
        x = np.asarray(rows[positions[start : start + CHUNK]], dtype=np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True).clip(min=np.finfo(np.float64).tiny)
        total += x.T @ x
    return total


def vendi_score(moments: np.ndarray, num: int) -> float:
    """The score of ``num`` images from their similarity moments; in [1, min(num, d)]."""
    eigenvalues = np.linalg.eigvalsh(moments / num)
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


class VendiScore:
    """Vendi score on the features of the protocol, with jackknife interval.

    Args:
        context: with at least 2 prompts.

    Raises:
        UsageError: prompts without scenes where the reference is of scenes, or fewer than 2.
    """

    gathers_per_image = ()  # but the features, which all set metrics share

    def __init__(self, context: Context) -> None:
        self.context, network = context, context.features.network
        context.features.reference.require("vendi", MIN_IMAGES)
        context.require_images("vendi", MIN_IMAGES)
        metric = Metric(
            name=f"vendi{network.suffix}", label="Vendi", direction="higher", unit="", family="diversity", decimals=2
        )
        self.quantities = (Quantity(metric, context.set_protocol(kernel="cosine", jackknife=f"{NUM_GROUPS} groups")),)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.context.see(images, positions)

    def finish(self) -> list[Measurement]:
        features, num = self.context.features, len(self.context.prompts)
        groups = jackknife_groups(num)
        counts = np.bincount(groups)
        parts = [
            similarity_moments(self.context.rows.everything(), np.flatnonzero(groups == g)) for g in range(len(counts))
        ]
        whole = sum(parts[1:], start=parts[0])
        value = vendi_score(whole, num)
        without = [vendi_score(whole - part, num - n) for part, n in zip(parts, counts, strict=True) if n < num]
        extra = {"reference": features.remember("vendi", self._of_reference), "num_reference": len(features.reference)}
        interval = jackknife_interval(value, without)
        return [Measurement(self.quantities[0], value, interval, num, self.context.departures, extra=extra)]

    def _of_reference(self) -> float:
        rows = self.context.features.reference_rows()
        return vendi_score(similarity_moments(rows, np.arange(len(rows))), len(rows))
