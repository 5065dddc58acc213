"""Probes that read one number, or several, from each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Direction, Measurement, Metric, Quantity
from rgbench.metrics.intervals import bootstrap_interval
from rgbench.metrics.overopt.real import has_real, real_batches


@dataclass(frozen=True)
class Level:
    """A number that an image, or a set of them, has.

    Attributes:
        name: of the figure; against real images ``_gap`` is added.
        label: in tables; likewise.
        unit: "" for none.
        family: as in :class:`Metric`.
        decimals: digits shown.
        direction: as in :class:`Metric`.
    """

    name: str
    label: str
    unit: str
    family: str
    decimals: int
    direction: Direction = "target"

    def metric(self, against_real: bool) -> Metric:
        """The metric of this level, or of its gap to real images."""
        gap = ("_gap", " gap") if against_real else ("", "")
        return Metric(
            name=self.name + gap[0],
            label=self.label + gap[1],
            direction=self.direction,
            unit=self.unit,
            family=self.family,
            decimals=self.decimals,
        )


class PerImageProbe:
    """What a per-image probe does, but for its numbers.

    The image of a prompt is compared with the real image of that prompt, so that what the
    prompt asks for cancels.

    Args:
        context: any prompts; where they have real images of this size, figures are gaps to those.
        levels: the numbers that :meth:`measure` gives, in that order.
        protocol: fields of its own.
    """

    gathers_per_image = ("rows",)

    def __init__(self, context: Context, levels: Sequence[Level], **protocol: Any) -> None:
        self.context, self.levels, self.against_real = context, levels, has_real(context)
        reference = context.reference.fields() if self.against_real else None
        shared = context.protocol(reference=reference, **protocol)
        self.quantities = tuple(Quantity(level.metric(self.against_real), shared) for level in levels)
        self.rows = np.full((len(levels), len(context.prompts)), np.nan)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(L, B) numbers of (B, 3, H, W) images in [0, 1]."""
        raise NotImplementedError

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.rows[:, positions] = self.measure(images, prompts).double().cpu().numpy()

    def finish(self) -> list[Measurement]:
        real = self.context.of_real(self, self.quantities[0].protocol, self._of_real) if self.against_real else None
        return [
            self._measurement(quantity, self.rows[i], None if real is None else real[i])
            for i, quantity in enumerate(self.quantities)
        ]

    def _measurement(self, quantity: Quantity, rows: np.ndarray, real: np.ndarray | None) -> Measurement:
        shown = rows if real is None else rows - real
        extra: dict[str, Any] = {"level": float(rows.mean()), "groups": self.context.by_group(shown)}
        if real is not None:
            extra["real"] = float(real.mean())
        return Measurement(
            quantity=quantity,
            value=float(shown.mean()),
            interval=bootstrap_interval(self.context.over_prompts(shown)),
            num_samples=len(rows),
            extra=extra,
            rows=shown,
        )

    def _of_real(self) -> np.ndarray:
        prompts, rows = self.context.prompts.prompts, np.empty_like(self.rows)
        for images, at in real_batches(self.context):
            rows[:, at] = self.measure(images, [prompts[i] for i in at]).double().cpu().numpy()
        return rows
