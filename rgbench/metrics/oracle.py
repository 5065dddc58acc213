"""Benchtop oracle: what share of the caption an image really shows, as three judges vote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rgbench.benchtop.oracle import load_oracle
from rgbench.benchtop.scenes import IMAGE_SIZE
from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_tree
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import Interval, Measurement, Metric, Quantity
from rgbench.metrics.context import Context
from rgbench.metrics.statistics import bootstrap_interval, wilson_interval

LABELS = {
    "all": "Oracle, all right",
    "mean": "Oracle, mean",
    "shape": "Oracle, shape",
    "colour": "Oracle, colour",
    "size": "Oracle, size",
    "layout": "Oracle, layout",
}
PERCENT = 100


class OracleAccuracy:
    """Share of attributes right, in per cent: mean, each of the four, and the images with everything right.

    Args:
        context: needs prompts with scenes.

    Raises:
        UsageError: prompts without scenes, no judges, images of another size.
    """

    gathers_per_image = ("shares",)

    def __init__(self, context: Context) -> None:
        self.context = context
        context.require("oracle", 1, IMAGE_SIZE)
        folder = context.judges_folder
        if not folder.is_dir():
            raise UsageError(f"{folder}: the judges are missing; make them with: python -m tools.benchtop build")
        self.oracle = load_oracle(folder, context.device)
        judges = {"judges_sha256": sha256_tree(folder), "vote": "majority of the judges"}
        protocol = context.protocol(scenes_sha256=context.reference.sha256, **judges)
        self.quantities = tuple(Quantity(_metric(name), protocol) for name in LABELS)
        self.shares = {name: np.zeros(len(context.prompts)) for name in (*LABELS, "agreement")}

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        scores = self.oracle.score(images, self.context.reference.scenes[positions.tolist()])
        for name, shares in self.shares.items():
            shares[positions] = scores[name].double().cpu().numpy()

    def finish(self) -> list[Measurement]:
        agreement = self.shares["agreement"]
        judges = {"mean": PERCENT * float(agreement.mean()), "groups": self.context.by_group(PERCENT * agreement)}
        return [self._measure(quantity, name, judges) for quantity, name in zip(self.quantities, LABELS, strict=True)]

    def _measure(self, quantity: Quantity, name: str, judges: dict) -> Measurement:
        rows = PERCENT * self.shares[name]
        over = self.context.over_prompts(rows)
        independent = len(over) == len(rows)  # no prompt has two seeds
        return Measurement(
            quantity=quantity,
            value=float(rows.mean()),
            interval=_wilson(self.shares[name]) if name == "all" and independent else bootstrap_interval(over),
            num_samples=len(rows),
            extra={"groups": self.context.by_group(rows), "judges_agree": judges},
            rows=rows,
        )


def _metric(name: str) -> Metric:
    return Metric(name=f"oracle_{name}", label=LABELS[name], direction="higher", unit="%", family="oracle", decimals=1)


def _wilson(right: np.ndarray) -> Interval:
    found = wilson_interval(float(right.sum()), len(right))
    return found.model_copy(update={"low": PERCENT * found.low, "high": PERCENT * found.high})
