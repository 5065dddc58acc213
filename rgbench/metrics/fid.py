"""Fréchet distance between generated and real images, on the features that the protocol names.

On Inception features it is called FID, with FID∞ besides; offline, on EfficientNet-Lite0's, FD-EffLite0: the two
cannot be compared. FID∞ (Chong and Forsyth, 2020, arXiv 1911.07023) removes the bias of finite n: the distance is
measured at 15 sample sizes, each on a fresh random subset, and the line through it against 1/n is read at 1/n = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.metrics.contract import Context, Measurement, Metric, Quantity
from rgbench.metrics.frechet import Gaussian, moments_of_rows, split_half_null
from rgbench.metrics.intervals import NUM_GROUPS, cluster_groups, jackknife_interval
from rgbench.metrics.tracking import Track, untracked

FAMILY = "set distance"
MIN_IMAGES = 4  # two in each half of the null
NUM_SIZES = 15  # of FID∞, and its smallest size, as in the authors' code
SMALLEST = 5000
INFINITY_SEED = 0


class FrechetDistance:
    """Fréchet distance with jackknife interval and split-half null.

    Args:
        context: with a reference that suits the prompts.

    Raises:
        UsageError: prompts without scenes where the reference is of scenes, or fewer than 4.
    """

    gathers_per_image = ()  # but the features, which all set metrics share

    def __init__(self, context: Context) -> None:
        self.context, self.network = context, context.features.network
        context.features.reference.require("fid", MIN_IMAGES)
        context.require_images("fid", MIN_IMAGES)
        metric = _metric("fid" if not self.network.suffix else f"fd{self.network.suffix}", self.network.label("FD"))
        protocol = context.set_protocol(jackknife=f"{NUM_GROUPS} groups of images, reference fixed")
        self.quantities = (Quantity(metric, protocol),)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.context.see(images, positions)

    def finish(self) -> list[Measurement]:
        features, num = self.context.features, len(self.context.prompts)
        track, rows = self.context.track, self.context.rows.take
        reference = reference_gaussian(self.context)
        null = features.remember("fd null", lambda: split_half_null(features.reference_rows(), track))
        value = reference.distance(moments_of_rows(rows, np.arange(num), track))
        replicates = reference.replicates(rows, cluster_groups(self.context.clusters(num)), track)
        extra = {
            "split_half_null": null,
            "split_half_of": "the reference",
            "num_features": self.network.num_features,
            "num_reference": len(features.reference),
            "jackknife": replicates,
        }
        if features.num_converted():
            extra["num_reference_converted"] = features.num_converted()
        if self.network.smallest is not None:
            extra["num_reference_uncropped"] = features.num_small()
        flags = singular(self.context)
        return [
            Measurement(
                quantity=self.quantities[0],
                value=value,
                interval=jackknife_interval(value, replicates),
                num_samples=num,
                flags=(*flags, *self.context.departures),
                extra=extra,
            )
        ]


class FrechetInfinity:
    """FID∞, the Fréchet distance extrapolated to infinitely many images.

    Below 2 d images the smallest subsets have no regular covariance, and the line means nothing: there is no value.

    Args:
        context: as for :class:`FrechetDistance`.

    Raises:
        UsageError: as for :class:`FrechetDistance`.
    """

    gathers_per_image = ()  # but the features, which all set metrics share

    def __init__(self, context: Context) -> None:
        self.context, self.network = context, context.features.network
        context.features.reference.require("fid_inf", MIN_IMAGES)
        context.require_images("fid_inf", MIN_IMAGES)
        suffix = self.network.suffix
        metric = _metric("fid_inf" if not suffix else f"fd_inf{suffix}", f"{self.network.label('FD')}∞")
        line = {"sizes": NUM_SIZES, "smallest": SMALLEST, "seed": INFINITY_SEED}
        self.quantities = (Quantity(metric, context.set_protocol(extrapolation=line)),)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.context.see(images, positions)

    def finish(self) -> list[Measurement]:
        num, dim = len(self.context.prompts), self.network.num_features
        departures = self.context.departures
        if num < 2 * dim:
            return [Measurement(self.quantities[0], None, None, num, (f"n<{2 * dim}", *departures))]
        flags = (*singular(self.context), *departures)
        reference, rows = reference_gaussian(self.context), self.context.rows.take
        sizes, values = infinity_points(reference, rows, num, dim, self.context.track)
        extra = {"sizes": sizes, "values": values, "seed": INFINITY_SEED}
        return [Measurement(self.quantities[0], extrapolated(sizes, values), None, num, flags, extra=extra)]


def infinity_points(
    reference: Gaussian, rows: Callable[[np.ndarray], np.ndarray], num: int, dim: int, track: Track = untracked
) -> tuple[list[int], list[float]]:
    """Sample sizes and the distance of a random subset of each.

    Args:
        reference: the other side.
        rows: gives the (k, d) float64 features at k positions.
        num: images, at least 2 d.
        dim: d.
        track: shows how far it is.
    """
    rng = np.random.default_rng(INFINITY_SEED)
    smallest = min(SMALLEST, max(dim + 1, num // 2))
    sizes = np.linspace(smallest, num, NUM_SIZES).astype(int).tolist()
    drawn = [np.sort(rng.permutation(num)[:size]) for size in sizes]
    return sizes, [reference.distance(moments_of_rows(rows, at)) for at in track(drawn, "subsets")]


def extrapolated(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The least-squares line of values against 1/n, read at 1/n = 0."""
    return float(np.polyfit(1 / np.asarray(sizes, dtype=np.float64), np.asarray(values), 1)[1])


def reference_gaussian(context: Context) -> Gaussian:
    """The reference's side of the distance, factored once per process."""
    features = context.features
    return features.remember("fd gaussian", lambda: Gaussian.of_rows(features.reference_rows(), context.track))


def singular(context: Context) -> tuple[str, ...]:
    """The flag of a distance that rests on a singular covariance, of the images or else of the reference."""
    dim = context.features.network.num_features
    if len(context.prompts) <= dim:
        return ("n<=d",)
    return ("reference n<=d",) if len(context.features.reference) <= dim else ()


def _metric(name: str, label: str) -> Metric:
    return Metric(name=name, label=label, direction="lower", unit="", family=FAMILY, decimals=2)
