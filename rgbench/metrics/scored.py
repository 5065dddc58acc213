"""What every reward gives as a metric: the mean over images, an interval over prompts, each image's score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rgbench.metrics.contract import Context, Measurement, Quantity
from rgbench.metrics.intervals import bootstrap_interval


def score_measurement(context: Context, quantity: Quantity, rows: np.ndarray, reward: Any) -> Measurement:
    """The figure of one reward.

    Args:
        context: of the evaluation.
        quantity: its name and protocol.
        rows: (n,) scores in prompt order.
        reward: whose weights say whether the model was trained on it.
    """
    trained = [_identity(entry["fingerprint"]) for entry in context.trained_rewards]
    return Measurement(
        quantity=quantity,
        value=float(rows.mean()),
        interval=bootstrap_interval(context.over_prompts(rows)),
        num_samples=len(rows),
        in_sample=_identity(reward.fingerprint()) in trained,
        extra={"groups": context.by_group(rows)},
        rows=rows,
    )


def _identity(fingerprint: Mapping[str, Any]) -> tuple[Any, ...]:
    """A reward's weights; of one without, its name and code."""
    weights = fingerprint.get("weights_sha256")
    return (weights, *(fingerprint.get(key) for key in ("name", "code_sha256") if weights in (None, "none")))
