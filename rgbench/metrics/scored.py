"""What every reward gives as a metric: the mean over images, an interval over prompts, each image's score."""

from __future__ import annotations

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
    trained = [entry["fingerprint"].get("weights_sha256") for entry in context.trained_rewards]
    return Measurement(
        quantity=quantity,
        value=float(rows.mean()),
        interval=bootstrap_interval(context.over_prompts(rows)),
        num_samples=len(rows),
        in_sample=reward.fingerprint()["weights_sha256"] in trained,
        extra={"groups": context.by_group(rows)},
        rows=rows,
    )
