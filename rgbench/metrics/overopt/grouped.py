"""Probes that read mean power spectra: sums by jackknife group, figures, intervals.

The scenes show what the prompts ask for, so the jackknife leaves out prompts on both
sides at once: what a prompt's objects do to the spectrum then cancels. A user's own real
images belong to no prompt: there each side is left out by itself, and the variances add. The
replicates are kept in the result (``extra["jackknife"]``, and ``extra["jackknife_real"]`` for
real images that were left out by themselves), so that two models of one protocol, whose groups
hold the same prompts and the same real images, are compared pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Interval, Measurement, Metric, Quantity
from rgbench.metrics.intervals import NUM_GROUPS, cluster_groups, jackknife_groups, jackknife_interval_of_sides
from rgbench.metrics.overopt.power import luma_chroma, power_spectrum
from rgbench.metrics.overopt.real import Real, RealScenes, find_real, without_real

Figures = dict[str, float]
PLANES = ("luma", "Cb", "Cr")
PAIRED = f"{NUM_GROUPS} groups of prompts, left out on both sides"
UNPAIRED = f"{NUM_GROUPS} groups of prompts and as many of real images, each side left out by itself"


class GroupedPower:
    """Σ P by jackknife group of images, in float64, where the images are.

    Args:
        groups: (n,) group of each position.
        total: (groups, planes, H, W//2 + 1) sums; the planes are the leading ones of (Y, Cb, Cr).
    """

    def __init__(self, groups: np.ndarray, total: Tensor) -> None:
        self.groups, self.counts, self.total = groups, np.bincount(groups), total

    @classmethod
    def empty(cls, groups: np.ndarray, planes: int, side: int, device: torch.device) -> GroupedPower:
        """Sums of no image yet, of square ones of ``side`` pixels."""
        shape = (int(groups.max()) + 1, planes, side, side // 2 + 1)
        return cls(groups, torch.zeros(shape, dtype=torch.float64, device=device))

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
        self.context, self.planes = context, planes
        self.real, self.lacking = find_real(context)
        shared = context.protocol(
            **({"reference": self.real.fields()} if self.real else without_real(context)),
            planes="Rec. 601 " + ", ".join(PLANES[:planes]),
            window="periodic 2-D Hann after the mean is removed",
            ring="k/N, N the shorter side",
            jackknife=PAIRED if self.real is None or self.real.paired else UNPAIRED,
            **protocol,
        )
        self.quantities = tuple(Quantity(metric, shared) for metric in metrics[0 if self.real else 1])
        self.groups = cluster_groups(context.clusters(len(context.prompts)))
        self.sums = GroupedPower.empty(self.groups, planes, context.resolution, context.device)

    def figures(self, power: np.ndarray, real: np.ndarray | None) -> Figures:
        """The figures of mean power (planes, H, W//2 + 1), and of real images' where there are any."""
        raise NotImplementedError

    def describe(self, power: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
        """Vectors and further figures for the result's ``extra``."""
        raise NotImplementedError

    def left_out(self, powers: Sequence[np.ndarray]) -> dict[str, Any]:
        """What the first figure keeps of mean power with each group of prompts left out, for later comparisons."""
        return {}

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.sums.add(images, positions)

    def finish(self) -> list[Measurement]:
        real = self._real_power(self.real) if self.real else None
        means = self.sums.mean(), real.mean() if real else None
        values = self.figures(*means)
        sides = self._replicates(real)
        extra = self.describe(*means) | self._further(values, sides)
        found = [self._measure(quantity, values, sides, extra) for quantity in self.quantities]
        found[0] = replace(found[0], extra={**found[0].extra, **self.left_out(list(self.sums.without_each()))})
        return found

    def _replicates(self, real: GroupedPower | None) -> list[list[Figures]]:
        """Figures with each group left out, of each side that is left out by itself."""
        if self.real is None or real is None:
            return [[self.figures(ours, None) for ours in self.sums.without_each()]]
        if self.real.paired:
            pairs = zip(self.sums.without_each(), real.without_each(), strict=True)
            return [[self.figures(ours, theirs) for ours, theirs in pairs]]
        own, theirs = self.sums.mean(), real.mean()
        return [
            [self.figures(left, theirs) for left in self.sums.without_each()],
            [self.figures(own, left) for left in real.without_each()],
        ]

    def _further(self, values: Figures, sides: list[list[Figures]]) -> dict[str, Any]:
        """Figures that are no quantity of their own, with their intervals."""
        own = {quantity.metric.name for quantity in self.quantities}
        names = [name for name in values if name not in own]
        bounds = {name: _interval(name, values, sides) for name in names}
        return {
            **finite({name: values[name] for name in names}),
            "intervals": {name: [found.low, found.high] for name, found in bounds.items() if found},
        }

    def _measure(
        self, quantity: Quantity, values: Figures, sides: list[list[Figures]], extra: dict[str, Any]
    ) -> Measurement:
        name = quantity.metric.name
        defined = math.isfinite(values[name])
        interval = _interval(name, values, sides)
        keys = ("jackknife", "jackknife_real")
        kept = {key: [row[name] for row in rows] for key, rows in zip(keys, sides, strict=False)} if interval else {}
        about = self.real.flags if self.real else (self.lacking,) if self.lacking else ()
        return Measurement(
            quantity=quantity,
            value=values[name] if defined else None,
            interval=interval,
            num_samples=len(self.groups),
            flags=about if defined else ("images without contrast", *about),
            extra=extra | kept,
        )

    def _real_power(self, real: Real) -> GroupedPower:
        """Sums of the real images; a user's are kept on disk, all planes for every probe."""
        if isinstance(real, RealScenes):
            key = f"power {self.planes}"
            return self.context.reference.remember(key, lambda: self._add_up(real, self.groups, self.planes))
        groups = jackknife_groups(real.num)

        def make() -> np.ndarray:
            return self._add_up(real, groups, len(PLANES)).total.cpu().numpy()

        fields = {"sums": "power of Y, Cb, Cr by jackknife group", "device": str(self.context.device)}
        kept = self.context.features.remember(f"power {real.side}", lambda: real.keep(real, fields, make))
        return GroupedPower(groups, torch.from_numpy(kept[:, : self.planes]))

    def _add_up(self, real: Real, groups: np.ndarray, planes: int) -> GroupedPower:
        sums = GroupedPower.empty(groups, planes, self.context.resolution, self.context.device)
        for images, at in real.batches():
            sums.add(images.to(self.context.device), at)
        return sums


def _interval(name: str, values: Figures, sides: list[list[Figures]]) -> Interval | None:
    drawn = [[row[name] for row in rows] for rows in sides]
    finite_all = np.isfinite([values[name], *(x for side in drawn for x in side)]).all()
    return jackknife_interval_of_sides(values[name], drawn) if finite_all else None


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """NaN, a figure that does not exist, as None."""
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}
