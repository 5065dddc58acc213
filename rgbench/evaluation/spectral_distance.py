"""Log-spectral distance between the images of two models, from the spectra that their results keep.

    LSD = √mean_k (10 log₁₀ S_k − 10 log₁₀ S_base,k)²,  S_k: mean power of ring k

0 only where the two spectra are equal, so the luck of which images were made keeps it above 0; what
two students of one method differ by says by how much. Both models show the same prompts, so their
groups are left out together for the interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rgbench.evaluation.paired import Paired
from rgbench.evaluation.results import Result
from rgbench.metrics.intervals import jackknife_interval
from rgbench.metrics.overopt.power import log_spectral_distance

PLANES = {"luma": "power", "chroma": "chroma_power"}
LEFT_OUT = "{}_left_out"  # key of the spectra without each group of prompts


def spectral_distance(model: Result, base: Result, plane: str = "luma") -> Paired | None:
    """How far the mean spectrum of one model is from another's, in dB.

    Args:
        model: any figure of ``--metric spectrum``.
        base: the same figure of the other model.
        plane: "luma" or "chroma", the mean of Cb and Cr.

    Returns:
        None where either kept no spectrum, or a ring of it is empty; without an interval where one kept no spectra
        of which groups of prompts are left out.

    Raises:
        ValueError: results of two metrics or protocols, which cannot be compared.
    """
    if (model.metric.name, model.protocol.id) != (base.metric.name, base.protocol.id):
        raise ValueError(f"{model.protocol.id} and {base.protocol.id} are two protocols; nothing to compare")
    key = PLANES[plane]
    ours, theirs = (_vectors(result.extra.get(key), 1) for result in (model, base))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    value = log_spectral_distance(ours, theirs)
    if not np.isfinite(value):
        return None
    parts = [_vectors(result.extra.get(LEFT_OUT.format(key)), 2) for result in (model, base)]
    if parts[0] is None or parts[1] is None or parts[0].shape != parts[1].shape:
        return Paired(value, None, None, "none")
    drawn = [log_spectral_distance(a, b) for a, b in zip(*parts, strict=True)]
    interval = jackknife_interval(value, drawn) if np.isfinite(drawn).all() else None
    if interval is None:
        return Paired(value, None, None, "none")
    return Paired(value, max(0.0, interval.low), interval.high, "jackknife")


def _vectors(kept: Any, dimensions: int) -> np.ndarray | None:
    found = np.asarray(kept, dtype=np.float64) if isinstance(kept, list) and kept else None
    return found if found is not None and found.ndim == dimensions else None
