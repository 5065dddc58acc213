"""Fréchet distance between Gaussians fitted to the features of generated and of real images.

    FD = |μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr √(Σ_a Σ_b)

(Fréchet, 1957; Heusel et al., 2017, arXiv 1706.08500, eq. 6). On Inception features it is called FID, on
EfficientNet-Lite0's FD-EffLite0: the two cannot be compared. FID∞ (Chong and Forsyth, 2020, arXiv 1911.07023) removes
the bias of finite n: the distance of fresh random subsets of 15 sizes lies on a line against 1/n, read at 1/n = 0.

The eigenvalues of Σ_a Σ_b are those of the symmetric Fᵀ Σ_b F with F Fᵀ = Σ_a, so no matrix square root is needed.
With n ≤ d samples a covariance has rank n − 1: the side of smaller rank is factored, and no more eigenvalues are summed
than the ranks allow, because √ turns the rounding noise 1e-16 of each null eigenvalue into 1e-8.

    n   num      samples            μ  mean          d  features per sample
    Σx  total    (d,) float64       Σ  covariance, divisor n − 1
    Σxxᵀ outer   (d, d) float64     F  factor, (d, rank)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg.lapack import dpotrf, dsygst

from rgbench.core.progress import Track, untracked
from rgbench.metrics.base import SetMetric
from rgbench.metrics.context import Context
from rgbench.metrics.statistics import NUM_GROUPS, cluster_groups, jackknife_interval
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol

NULL_SEED = 0
CHUNK = 4096
MIN_IMAGES = 4  # two in each half of the null
NUM_SIZES = 15  # of FID∞, and its smallest size, as in the authors' code
SMALLEST = 5000
INFINITY_SEED = 0
DISTANCE = Direction.LOWER, Family.SET_DISTANCE


@dataclass(frozen=True)
class Moments:
    """n, Σx and Σxxᵀ of a feature set in float64; they add up over parts of it."""

    num: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of (n, d) features."""
        x = np.asarray(features, dtype=np.float64)
        return cls(len(x), x.sum(0), x.T @ x)

    @classmethod
    def zeros(cls, dim: int) -> Moments:
        """Moments of no samples."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.num + other.num, self.total + other.total, self.outer + other.outer)

    def __sub__(self, part: Moments) -> Moments:
        return Moments(self.num - part.num, self.total - part.total, self.outer - part.outer)

    @property
    def mean(self) -> np.ndarray:
        """(d,)"""
        return self.total / self.num

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), divisor n − 1."""
        covariance = np.outer(self.mean, -self.num * self.mean)
        covariance += self.outer
        covariance /= self.num - 1
        return covariance

    @property
    def rank(self) -> int:
        """The most that the covariance's rank can be."""
        return min(len(self.total), self.num - 1)

    def project(self, factor: np.ndarray) -> Moments:
        """Moments of ``x @ factor``."""
        return Moments(self.num, self.total @ factor, factor.T @ self.outer @ factor)


def moments_of_rows(
    rows: Callable[[np.ndarray], np.ndarray], positions: np.ndarray, track: Track = untracked
) -> Moments:
    """Moments of the features at positions, read a few thousand at a time.

    Args:
        rows: (k,) positions → (k, d) features.
        positions: at least one.
        track: shows progress.
    """
    chunks = [positions[i : i + CHUNK] for i in range(0, len(positions), CHUNK)]
    parts = (Moments.of(rows(at)) for at in track(chunks, "mean and covariance"))
    return sum(parts, start=Moments.zeros(rows(positions[:1]).shape[1]))


class Gaussian:
    """One side of the distance, factored once to be compared many times.

    Args:
        moments: of at least two samples.
        factor: F, where it is known already.
    """

    def __init__(self, moments: Moments, factor: np.ndarray | None = None) -> None:
        _require_two(moments.num)
        covariance = moments.covariance
        self.mean, self.trace, self.rank = moments.mean, float(np.trace(covariance)), moments.rank
        self.factor, self.lower = (factor, False) if factor is not None else _factor(covariance, moments.rank)

    @classmethod
    def of_rows(cls, rows: np.ndarray, track: Track = untracked) -> Gaussian:
        """From (n, d) features, n ≥ 2; with n ≤ d the centred features are a factor already."""
        moments = moments_of_rows(rows.__getitem__, np.arange(len(rows)), track)
        if len(rows) > rows.shape[1]:
            return cls(moments)
        _require_two(len(rows))
        return cls(moments, (np.asarray(rows, dtype=np.float64) - moments.mean).T / np.sqrt(len(rows) - 1))

    def distance(self, other: Moments) -> float:
        """FD to the Gaussian of ``other``."""
        _require_two(other.num)
        covariance = other.covariance
        trace = float(np.trace(covariance))
        eigenvalues = np.linalg.eigvalsh(self._congruent(covariance))
        return self._combine(other.mean, trace, eigenvalues, other.rank)

    def _congruent(self, covariance: np.ndarray) -> np.ndarray:
        """Fᵀ Σ F, at least its lower triangle, which ``eigvalsh`` reads; may overwrite ``covariance``.

        With a Cholesky factor, LAPACK's dsygst gives that triangle in a quarter of the work. Its matrices are
        column-major: it sees ours transposed, and F as an upper triangle.
        """
        if not self.lower:
            return self.factor.T @ covariance @ self.factor
        upper, info = dsygst(covariance.T, self.factor.T, itype=2, lower=0, overwrite_a=1)
        if info:
            raise AssertionError(f"dsygst refuses argument {-info}")
        return upper.T

    def replicates(
        self, rows: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, track: Track = untracked
    ) -> list[float]:
        """FD to a feature set with each of its groups left out.

        Args:
            rows: (k,) positions → (k, d) float64 features.
            groups: (n,) group of each position.
            track: shows progress.

        Returns:
            One distance per group, by group number; none unless each leaves two samples.
        """
        if len(groups) - np.bincount(groups).max() < 2:
            return []
        found = self._wide if len(groups) > self.factor.shape[1] else self._narrow
        return found(rows, groups, track)

    def _wide(self, rows: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, track: Track) -> list[float]:
        """More samples than the factor has columns: subtract each group's moments in the projected space."""
        parts, sums, squares = [], [], []
        for at in track([np.flatnonzero(groups == g) for g in range(groups.max() + 1)], "groups of the jackknife"):
            x = rows(at)
            parts.append(Moments.of(x @ self.factor))
            sums.append(x.sum(0))
            squares.append(float((x * x).sum()))
        whole = sum(parts, start=Moments.zeros(self.factor.shape[1]))
        out = []
        for part, total, square in track(list(zip(parts, sums, squares, strict=True)), "jackknife", "distances"):
            rest = whole - part
            mean = (sum(sums) - total) / rest.num
            trace = (sum(squares) - square - rest.num * float(mean @ mean)) / (rest.num - 1)
            rank = min(len(self.mean), rest.num - 1)
            out.append(self._combine(mean, trace, np.linalg.eigvalsh(rest.covariance), rank))
        return out

    def _narrow(self, rows: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, track: Track) -> list[float]:
        """Fewer samples: the Gram matrix of the projected rows has the same eigenvalues and is smaller."""
        x = rows(np.arange(len(groups)))
        projected = x @ self.factor
        out = []
        for group in track(range(groups.max() + 1), "jackknife", "distances"):
            keep = groups != group
            mean, centred = x[keep].mean(0), projected[keep] - projected[keep].mean(0)
            trace = float(((x[keep] - mean) ** 2).sum()) / (keep.sum() - 1)
            gram = centred @ centred.T / (keep.sum() - 1)
            out.append(self._combine(mean, trace, np.linalg.eigvalsh(gram), int(keep.sum()) - 1))
        return out

    def _combine(self, mean: np.ndarray, trace: float, eigenvalues: np.ndarray, rank: int) -> float:
        """Eq. 6 from the ascending eigenvalues of Σ_a Σ_b and the rank of Σ_b."""
        kept = eigenvalues[max(0, len(eigenvalues) - min(self.rank, rank)) :]
        shift = self.mean - mean
        distance = float(shift @ shift) + self.trace + trace - 2 * float(np.sqrt(kept.clip(min=0)).sum())
        return max(0.0, distance)


def frechet_distance(a: Moments, b: Moments) -> float:
    """FD between the Gaussians of two feature sets.

    Args:
        a: of at least two samples.
        b: of the same number of features.

    Returns:
        The distance, ≥ 0. Biased upwards by about (d²/4 + d)(1/n_a + 1/n_b) for isotropic features.

    Raises:
        ValueError: fewer than two samples, or another number of features.
    """
    if a.total.shape != b.total.shape:
        raise ValueError(f"features of {len(a.total)} and {len(b.total)} numbers cannot be compared")
    smaller, larger = (a, b) if a.rank <= b.rank else (b, a)
    return Gaussian(smaller).distance(larger)


def split_half_null(features: np.ndarray, track: Track = untracked) -> float:
    """FD between two random halves of (n, d) features, n ≥ 4: the distance of equal distributions at n/2."""
    order = np.random.default_rng(NULL_SEED).permutation(len(features))
    half = len(features) // 2
    other = moments_of_rows(features.__getitem__, np.sort(order[half:]), track)
    return Gaussian.of_rows(features[np.sort(order[:half])], track).distance(other)


def _factor(covariance: np.ndarray, rank: int) -> tuple[np.ndarray, bool]:
    """(d, rank) F with F Fᵀ = covariance, and whether it is lower triangular.

    It is Cholesky's where the covariance is regular, else made of the leading eigenvectors.
    """
    if rank == len(covariance):
        upper, failed = dpotrf(covariance.T, lower=0, clean=1)
        if not failed:  # else singular for another reason, such as a feature that is always zero
            return upper.T, True
    eigenvalues, vectors = np.linalg.eigh(covariance)
    return vectors[:, -rank:] * np.sqrt(eigenvalues[-rank:].clip(min=0)), False


def _require_two(num: int) -> None:
    if num < 2:
        raise ValueError(f"a covariance needs at least two samples, not {num}")


class FrechetDistance(SetMetric):
    """Fréchet distance with jackknife interval and split-half null.

    Args:
        context: with a reference that suits the prompts.

    Raises:
        UsageError: prompts without scenes where the reference is of scenes, or fewer than 4.
    """

    name = "fid"
    infos = (
        MetricInfo.of("fid", "FID", "Fréchet distance on Inception features", *DISTANCE),
        MetricInfo.of("fd_efflite0", "FD-EffLite0", "Fréchet distance on EfficientNet-Lite0 features", *DISTANCE),
    )
    min_images = MIN_IMAGES

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.network = context.features.network
        name = f"fd{self.network.suffix}" if self.network.suffix else "fid"
        protocol = context.set_protocol(jackknife=f"{NUM_GROUPS} groups of images, reference fixed")
        self.planned = ((name, Protocol.of(name, protocol)),)

    def compute(self) -> list[MetricValue]:
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
            MetricValue(
                *self.planned[0],
                value=value,
                interval=jackknife_interval(value, replicates),
                num_images=num,
                flags=(*flags, *self.context.departures),
                extra=extra,
            )
        ]


class FrechetInfinity(SetMetric):
    """Fréchet distance extrapolated to infinitely many images: FID∞.

    Below 2 d images it has no value: the smallest subsets have no regular covariance, and the line means nothing.

    Args:
        context: as for :class:`FrechetDistance`.

    Raises:
        UsageError: as for :class:`FrechetDistance`.
    """

    name = "fid_inf"
    infos = (
        MetricInfo.of("fid_inf", "FID∞", "FID extrapolated to infinitely many images", *DISTANCE),
        MetricInfo.of(
            "fd_inf_efflite0", "FD-EffLite0∞", "FD-EffLite0 extrapolated to infinitely many images", *DISTANCE
        ),
    )
    default = False
    min_images = MIN_IMAGES

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.network = context.features.network
        name = f"fd_inf{self.network.suffix}" if self.network.suffix else "fid_inf"
        line = {"sizes": NUM_SIZES, "smallest": SMALLEST, "seed": INFINITY_SEED}
        self.planned = ((name, Protocol.of(name, context.set_protocol(extrapolation=line))),)

    def compute(self) -> list[MetricValue]:
        num, dim = len(self.context.prompts), self.network.num_features
        departures = self.context.departures
        if num < 2 * dim:
            return [MetricValue(*self.planned[0], None, None, num, flags=(f"n<{2 * dim}", *departures))]
        flags = (*singular(self.context), *departures)
        reference, rows = reference_gaussian(self.context), self.context.rows.take
        sizes, values = infinity_points(reference, rows, num, dim, self.context.track)
        extra = {"sizes": sizes, "values": values, "seed": INFINITY_SEED}
        return [MetricValue(*self.planned[0], extrapolated(sizes, values), None, num, flags=flags, extra=extra)]


def infinity_points(
    reference: Gaussian, rows: Callable[[np.ndarray], np.ndarray], num: int, dim: int, track: Track = untracked
) -> tuple[list[int], list[float]]:
    """Sample sizes, and the distance of a random subset of each size.

    Args:
        reference: the other side.
        rows: (k,) positions → (k, d) float64 features.
        num: images, at least 2 d.
        dim: d.
        track: shows progress.
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
    """The flag of a distance with a singular covariance, of the images or else of the reference."""
    dim = context.features.network.num_features
    if len(context.prompts) <= dim:
        return ("n<=d",)
    return ("reference n<=d",) if len(context.features.reference) <= dim else ()
