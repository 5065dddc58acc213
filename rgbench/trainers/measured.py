"""What the steps of one global batch measured: every sample's losses, from all micro-batches and ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgbench.errors import RgbenchError
from rgbench.launch.ranks import Ranks
from rgbench.trainers.contract import StepResult


class Measured:
    """Per-sample losses and statistics of one optimiser step.

    Attributes:
        ids: names of this rank's samples so far.
        reward_calls: images the expert scored on this rank.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.reward_calls = 0
        self._terms: dict[str, list[Tensor]] = {}
        self._names: dict[str, str] = {}

    def add(self, result: StepResult, ids: list[str]) -> None:
        """Take one micro-batch's values.

        Raises:
            RgbenchError: a loss term or statistic that is not one value per sample.
        """
        rows = {
            f"loss/{term}": (f"loss term {term} of the {name}", value)
            for name, losses in result.losses.items()
            for term, value in losses.items()
        }
        rows |= {name: (f"statistic {name}", value) for name, value in result.stats.items()}
        device = next(value for _, value in rows.values()).device  # a loss's; a statistic may be made on the CPU
        for key, (name, value) in rows.items():
            if value.shape != (len(ids),):
                shape = tuple(value.shape)
                raise RgbenchError(f"{name} has shape {shape}: a reward gives one score per image, (B,)")
            self._names[key] = name
            self._terms.setdefault(key, []).append(value.detach().to(device, torch.float64))
        self.ids += ids
        self.reward_calls += result.reward_calls

    def gather(self, ranks: Ranks) -> Tensor:
        """All samples' values in the order of the global batch, (B, names)."""
        return ranks.gather_rows(torch.stack([torch.cat(parts) for parts in self._terms.values()], dim=1))

    def means(self, rows: Tensor) -> dict[str, float]:
        """By the log's names, from what :meth:`gather` gave.

        A statistic that is no finite number is left out, as a gradient's where float16 overflowed: the step is skipped,
        and neither JSON nor a curve can hold it.
        """
        means = zip(self._terms, rows.mean(0).tolist(), strict=True)
        return {name: value for name, value in means if math.isfinite(value)}

    def fault(self, rows: Tensor) -> tuple[str, list[int]] | None:
        """The first loss term that is not finite, and its samples' positions in the global batch."""
        if rows.isfinite().all():
            return None
        for column, (key, name) in enumerate(self._names.items()):
            wrong = (~rows[:, column].isfinite()).nonzero().flatten().tolist()
            if key.startswith("loss/") and wrong:
                return name, wrong
        return None
