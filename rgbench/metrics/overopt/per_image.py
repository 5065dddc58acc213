"""Probes that read one number, or several, from each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Direction, Interval, Measurement, Metric, Quantity
from rgbench.metrics.intervals import bootstrap_interval, unpaired_bootstrap_interval
from rgbench.metrics.overopt.real import NO_CAPTIONS, Real, find_real, of_real, without_real


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
        reads_prompt: it is about the image and its prompt, so that a real image of no prompt has none.
    """

    name: str
    label: str
    unit: str
    family: str
    decimals: int
    direction: Direction = "target"
    reads_prompt: bool = False

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
    prompt asks for cancels. A user's own real images belong to no prompt: there the figure is the
    difference of two means, its interval that of two independent samples, and the rows are the images' own
    distances to the real mean, whose standard error (``extra["real_error"]``) two models share.

    Args:
        context: any prompts; where there are real images of this size, figures are gaps to those.
        levels: the numbers that :meth:`measure` gives, in that order.
        protocol: fields of its own.
    """

    gathers_per_image = ("rows",)

    def __init__(self, context: Context, levels: Sequence[Level], **protocol: Any) -> None:
        self.context, self.levels = context, levels
        self.real, self.lacking = find_real(context)
        self.shared = context.protocol(reference=self.real.fields() if self.real else None, **protocol)
        alone = {**self.shared, **without_real(context)}
        self.quantities = tuple(
            Quantity(level.metric(self._is_gap(level)), self.shared if self._is_gap(level) else alone)
            for level in levels
        )
        self.rows = np.full((len(levels), len(context.prompts)), np.nan)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(L, B) numbers of (B, 3, H, W) images in [0, 1]; without prompts, NaN for levels that read them."""
        raise NotImplementedError

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.rows[:, positions] = self.measure(images, prompts).double().cpu().numpy()

    def finish(self) -> list[Measurement]:
        found = None
        if self.real and any(map(self._is_gap, self.levels)):
            found = of_real(self.real, self, self.shared, self.context, partial(self._of_real, self.real))
        return [
            self._measurement(level, quantity, self.rows[i], found[i] if found is not None else None)
            for i, (level, quantity) in enumerate(zip(self.levels, self.quantities, strict=True))
        ]

    def _is_gap(self, level: Level) -> bool:
        return self.real is not None and (self.real.paired or not level.reads_prompt)

    def _measurement(self, level: Level, quantity: Quantity, rows: np.ndarray, real: np.ndarray | None) -> Measurement:
        over_prompts = self.context.over_prompts
        if self.real is None or real is None or not self._is_gap(level):
            lacking = (self.lacking or NO_CAPTIONS,) if self.real or self.lacking else ()
            return self._measured(quantity, rows, rows, bootstrap_interval(over_prompts(rows)), lacking, {})
        more = {"real": float(real.mean())}
        if self.real.paired:
            return self._measured(quantity, rows, rows - real, bootstrap_interval(over_prompts(rows - real)), (), more)
        more["real_error"] = float(real.std(ddof=1) / np.sqrt(len(real)))
        interval = unpaired_bootstrap_interval(over_prompts(rows), real)
        return self._measured(quantity, rows, rows - real.mean(), interval, self.real.flags, more)

    def _measured(
        self,
        quantity: Quantity,
        rows: np.ndarray,
        shown: np.ndarray,
        interval: Interval | None,
        flags: tuple[str, ...],
        more: Mapping[str, float],
    ) -> Measurement:
        return Measurement(
            quantity=quantity,
            value=float(shown.mean()),
            interval=interval,
            num_samples=len(rows),
            flags=flags,
            extra={"level": float(rows.mean()), "groups": self.context.by_group(shown), **more},
            rows=shown,
        )

    def _of_real(self, real: Real) -> np.ndarray:
        prompts, rows = self.context.prompts.prompts, np.empty((len(self.levels), real.num))
        for images, at in real.batches():
            shown = [prompts[i] for i in at] if real.paired else []
            rows[:, at] = self.measure(images.to(self.context.device), shown).double().cpu().numpy()
        return rows
