"""Probes that read mean power spectra: sums by jackknife group, figures, intervals.

The scenes show what the prompts ask for, so the jackknife leaves out prompts on both
sides at once: what a prompt's objects do to the spectrum then cancels. The replicates are
kept in the result (``extra["jackknife"]``), so that two models of one protocol, whose
groups hold the same prompts, are compared pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Interval, Measurement, Metric, Quantity
from rgbench.metrics.intervals import NUM_GROUPS, cluster_groups, jackknife_interval
from rgbench.metrics.overopt.power import luma_chroma, power_spectrum
from rgbench.metrics.overopt.real import has_real, real_batches

Figures = dict[str, float]


class GroupedPower:
    """Σ P by jackknife group of prompts, in float64, where the images are.

    Args:
        groups: (n,) group of each position.
        planes: leading planes of (Y, Cb, Cr) that are kept.
        side: of the square images, in pixels.
        device: of the images.
    """

    def __init__(self, groups: np.ndarray, planes: int, side: int, device: torch.device) -> None:
        self.groups, self.counts = groups, np.bincount(groups)
        shape = (len(self.counts), planes, side, side // 2 + 1)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, images: Tensor, positions: np.ndarray) -> None:
        """Take in (B, 3, H, W) images in [0, 1]."""
        power = power_spectrum(luma_chroma(images)[:, : self.total.shape[1]])
        self.total.index_add_(0, torch.from_numpy(self.groups[positions]).to(power.device), power)

    def mean(self) -> np.ndarray:
        """(planes, H, W//2 + 1)"""
        return self.total.sum(0).cpu().numpy() / len(self.groups)

    def without_each(self) -> Iterator[np.ndarray]:
        """Mean power with each group left out; none where nothing would be left."""
        sums, num = self.total.cpu().numpy(), len(self.groups)
        for part, count in zip(sums, self.counts, strict=True):
            if count < num:
                yield (sums.sum(0) - part) / (num - count)


class SpectralProbe:
    """What a probe of mean power spectra does, but for its figures.

    Args:
        context: any prompts; where they have real images of this size, figures are gaps to those.
        metrics: (against real images, without any): what is measured in either case.
        planes: leading planes of (Y, Cb, Cr) that are read.
        protocol: fields of its own.
    """

    gathers_sums = ("sums.total",)

    def __init__(
        self, context: Context, metrics: tuple[Sequence[Metric], Sequence[Metric]], planes: int, **protocol: Any
    ) -> None:
        self.context, self.planes, self.against_real = context, planes, has_real(context)
        shared = context.protocol(
            reference=context.reference.fields() if self.against_real else None,
            planes="Rec. 601 " + ", ".join(("luma", "Cb", "Cr")[:planes]),
            window="periodic 2-D Hann after the mean is removed",
            ring="k/N, N the shorter side",
            jackknife=f"{NUM_GROUPS} groups of prompts, left out on both sides",
            **protocol,
        )
        self.quantities = tuple(Quantity(metric, shared) for metric in metrics[0 if self.against_real else 1])
        self.groups = cluster_groups(context.clusters(len(context.prompts)))
        self.sums = self._empty()

    def figures(self, power: np.ndarray, real: np.ndarray | None) -> Figures:
        """The figures of mean power (planes, H, W//2 + 1), and of real images' where there are any."""
        raise NotImplementedError

    def describe(self, power: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
        """Vectors and further figures for the result's ``extra``."""
        raise NotImplementedError

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.sums.add(images, positions)

    def finish(self) -> list[Measurement]:
        real = self.context.reference.remember(f"power {self.planes}", self._of_real) if self.against_real else None
        means = self.sums.mean(), real.mean() if real else None
        values = self.figures(*means)
        pairs = zip(
            self.sums.without_each(),
            real.without_each() if real else iter([None] * len(self.sums.counts)),
            strict=False,  # a single group leaves nothing to leave out
        )
        replicates = [self.figures(ours, theirs) for ours, theirs in pairs]
        extra = self.describe(*means) | self._further(values, replicates)
        return [self._measure(quantity, values, replicates, extra) for quantity in self.quantities]

    def _further(self, values: Figures, replicates: list[Figures]) -> dict[str, Any]:
        """Figures that are no quantity of their own, with their intervals."""
        own = {quantity.metric.name for quantity in self.quantities}
        names = [name for name in values if name not in own]
        bounds = {name: _interval(name, values, replicates) for name in names}
        return {
            **finite({name: values[name] for name in names}),
            "intervals": {name: [found.low, found.high] for name, found in bounds.items() if found},
        }

    def _measure(
        self, quantity: Quantity, values: Figures, replicates: list[Figures], extra: dict[str, Any]
    ) -> Measurement:
        name = quantity.metric.name
        defined = math.isfinite(values[name])
        interval = _interval(name, values, replicates)
        kept = {"jackknife": [row[name] for row in replicates]} if interval else {}
        return Measurement(
            quantity=quantity,
            value=values[name] if defined else None,
            interval=interval,
            num_samples=len(self.groups),
            flags=() if defined else ("images without contrast",),
            extra=extra | kept,
        )

    def _empty(self) -> GroupedPower:
        return GroupedPower(self.groups, self.planes, self.context.resolution, self.context.device)

    def _of_real(self) -> GroupedPower:
        sums = self._empty()
        for images, at in real_batches(self.context):
            sums.add(images, at)
        return sums


def _interval(name: str, values: Figures, replicates: list[Figures]) -> Interval | None:
    drawn = [row[name] for row in replicates]
    return jackknife_interval(values[name], drawn) if np.isfinite([values[name], *drawn]).all() else None


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """NaN, a figure that does not exist, as None."""
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}
