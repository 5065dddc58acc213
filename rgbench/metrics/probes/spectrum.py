"""Power spectra of images: does an image carry the high frequencies that real ones carry, and patterns that they lack?

    Y = 0.299 R + 0.587 G + 0.114 B, Cb = (B − Y) / 1.772, Cr = (R − Y) / 1.402    (Rec. 601)
    P = |DFT(h · (Y − mean Y))|² / (H W Σh²),  h a periodic 2-D Hann window

P is averaged over images before anything is binned, and binned before any logarithm. ΣP over all frequencies is the
(windowed) variance of the image, so P of two image sizes can be compared. Only half of the plane is computed; its
interior columns count twice, column 0 and (even widths) the Nyquist column once.

Ring k holds the frequencies whose radius rounds to k/N, N the shorter side, and its radius is k/N itself. The mean
radius of its cells would be exact for a periodic image without window, but under the Hann window, whose main lobe lifts
the lowest rings of a falling spectrum, k/N reads known slopes with a third of the error (tools/spectral_slope.py
measures both).

    power     P, (H, W//2 + 1) float64                 radius  |f| in cycles per pixel, same shape
    weight    how often each cell counts               axis    max(|fx|, |fy|), same shape
    HFER(c)   Σ_{r>c} P / Σ_{r>0} P                    slope   of ln P against ln f on [.02, .35]
    band      Σ_{r>.25} P                              octave  Σ P from f to 2f
    unseen    Σ_{axis>l} P, l the reward's Nyquist     LSD     √mean_k (10 log₁₀ S_k − 10 log₁₀ S_ref,k)²

HFER is a share and hides a gain in all bands; the band energy is absolute. Of the octaves an even rise is contrast, a
rise of the last ones noise, a fall blur. A reward model's resize filters each axis by itself, so what it cannot see
lies outside of a square. Ratios and energies are compared in dB, so the difference between two models is the difference
of their differences to real images.

Grid peaks: a pattern that repeats every p pixels has its power on the lattice (i N/p, j N/p). Each lattice cell of the
mean luma spectrum is divided by the median of its ring's other cells, which removes the radial fall of the content; the
value is the mean of these ratios in dB, 0 where nothing repeats. Periods: the stride of the model's VAE (8 of Stable
Diffusion, SDXL, SD3, FLUX; 32 of Sana), the patch of the reward model in image pixels (14 · 512 / 224 = 32 at 512
pixels), and where the model is a transformer of patches, its token (16 of SD3, FLUX, PixArt).
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgbench.core.io import read_json
from rgbench.data.prompts import Prompt
from rgbench.metrics.context import Context
from rgbench.metrics.probes.base import Probe, Real
from rgbench.metrics.statistics import NUM_GROUPS, cluster_groups, jackknife_groups, jackknife_interval_of_sides
from rgbench.metrics.values import Direction, Family, Interval, MetricInfo, MetricValue, Protocol
from rgbench.rewards.clip import nyquist

NYQUIST = 0.5  # cycles/pixel, of the image itself
CUTOFF = 0.25  # cycles/pixel: the upper octave
SLOPE_BAND = (0.02, 0.35)
OCTAVES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
PLANES = ("luma", "Cb", "Cr")
CHROMA = ("", "chroma_")  # before the names of luma's and of chroma's vectors
VIT_H_14 = (224, 14)  # input side and patch of HPS checkpoint files
PAIRED = f"{NUM_GROUPS} groups of prompts, left out on both sides"
UNPAIRED = f"{NUM_GROUPS} groups of prompts and as many of real images, each side left out by itself"

Values = dict[str, float]


def luma_chroma(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] → float64 Y in [0, 1], Cb and Cr in [−½, ½]."""
    r, g, b = images.double().unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, (b - y) / 1.772, (r - y) / 1.402], 1)


def power_spectrum(planes: Tensor, window: bool = True) -> Tensor:
    """P of each plane; without window, Σ weight · P is the plane's variance.

    Args:
        planes: (..., H, W) float64.
        window: Hann before the transform; without it the borders leak into all frequencies.

    Returns:
        (..., H, W//2 + 1) float64.
    """
    height, width = planes.shape[-2:]
    planes = planes - planes.mean((-2, -1), keepdim=True)
    energy = float(height * width)
    if window:
        hann = torch.outer(*(torch.hann_window(n, dtype=planes.dtype, device=planes.device) for n in (height, width)))
        planes, energy = planes * hann, float(hann.square().sum())
    return torch.fft.rfft2(planes).abs().square() / (height * width * energy)


@dataclass(frozen=True)
class Plane:
    """Geometry of the half plane of an H × W image; arrays are (H, W//2 + 1).

    Attributes:
        radius: |f| in cycles per pixel.
        axis: max(|fx|, |fy|) likewise: what a resize filters, axis by axis.
        weight: how often each cell counts in the whole plane, 1 or 2.
        bins: ring of each cell, from 0; −1 for none.
        num_bins: min(H, W) // 2.
        side: min(H, W).
    """

    radius: np.ndarray
    axis: np.ndarray
    weight: np.ndarray
    bins: np.ndarray
    num_bins: int
    side: int


@lru_cache(maxsize=8)
def half_plane(height: int, width: int | None = None) -> Plane:
    """Radius, multiplicity and radial bin of each cell; of a square by default.

    Bin k holds the radii that round to k / min(H, W), k up to the Nyquist limit 0.5;
    corners beyond it, and the mean, belong to no bin (−1).
    """
    width = width or height
    rows, columns = np.abs(np.fft.fftfreq(height))[:, None], np.fft.rfftfreq(width)[None]
    radius, axis = np.hypot(rows, columns), np.maximum(rows, columns)
    weight = np.full(radius.shape, 2.0)
    weight[:, 0] = 1
    if width % 2 == 0:
        weight[:, -1] = 1
    side = min(height, width)
    bins = np.rint(radius * side).astype(np.int64)
    num_bins = side // 2
    bins[(bins < 1) | (bins > num_bins)] = 0
    return Plane(radius, axis, weight, bins - 1, num_bins, side)


def radial_profile(power: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Radius k / min(H, W) and mean power of each ring, (K,) each, K = min(H, W) // 2.

    Args:
        power: P, (H, W//2 + 1).
        width: W; H by default. The half plane alone does not tell an even from an odd one.
    """
    plane = half_plane(len(power), width)
    inside = plane.bins >= 0
    bins, weight = plane.bins[inside], plane.weight[inside]
    count = np.bincount(bins, weight, plane.num_bins)
    radius = np.arange(1, plane.num_bins + 1) / plane.side
    return radius, np.bincount(bins, weight * power[inside], plane.num_bins) / count


def band_energy(power: np.ndarray, low: float, high: float = math.inf, width: int | None = None) -> float:
    """Σ P over low < r ≤ high, corners included.

    Args:
        power: P, (H, W//2 + 1).
        low: in cycles per pixel.
        high: likewise.
        width: W; H by default.
    """
    plane = half_plane(len(power), width)
    inside = (plane.radius > low) & (plane.radius <= high)
    return float((plane.weight * power)[inside].sum())


def unseen_energy(power: np.ndarray, limit: float, width: int | None = None) -> float:
    """Σ P above a reward model's Nyquist limit on either axis, in cycles per pixel: what it cannot see."""
    plane = half_plane(len(power), width)
    return float((plane.weight * power)[plane.axis > limit].sum())


def high_frequency_ratio(power: np.ndarray, cutoff: float = CUTOFF, width: int | None = None) -> float:
    """HFER(c), in [0, 1]; NaN for images without any contrast."""
    whole = band_energy(power, 0, width=width)
    return band_energy(power, cutoff, width=width) / whole if whole > 0 else math.nan


def slope(radius: np.ndarray, profile: np.ndarray) -> float:
    """Least squares of ln P against ln f on [.02, .35]; natural images about −2.

    Args:
        radius: f of each ring, (K,) in cycles per pixel, from :func:`radial_profile`.
        profile: P of each ring, (K,).

    Returns:
        The exponent; NaN for fewer than two rings there, or one without power.
    """
    inside = (radius >= SLOPE_BAND[0]) & (radius <= SLOPE_BAND[1])
    if inside.sum() < 2 or not (profile[inside] > 0).all():
        return math.nan
    return float(np.polyfit(np.log(radius[inside]), np.log(profile[inside]), 1)[0])


def decibel(ratio: float) -> float:
    """10 log₁₀; NaN where it has none."""
    return 10 * math.log10(ratio) if math.isfinite(ratio) and ratio > 0 else math.nan


def ratio_db(value: float, reference: float) -> float:
    """dB gap of two energies; NaN where one is zero."""
    return decibel(value / reference) if reference > 0 else math.nan


def log_spectral_distance(profile: np.ndarray, reference: np.ndarray) -> float:
    """√mean_k (10 log₁₀ S − 10 log₁₀ S_ref)² in dB of two profiles (K,); NaN where a ring has no power."""
    if not ((profile > 0).all() and (reference > 0).all()):
        return math.nan
    return float(np.sqrt(np.mean((10 * np.log10(profile / reference)) ** 2)))


def octave_energies(power: np.ndarray, width: int | None = None) -> dict[str, float]:
    """Σ P of each octave below Nyquist, by name, such as ``0.25-0.5``."""
    return {f"{low:g}-{high:g}": band_energy(power, low, high, width) for low, high in pairwise(OCTAVES)}


def octave_gaps(power: np.ndarray, reference: np.ndarray, width: int | None = None) -> dict[str, float]:
    """dB gap per octave below Nyquist: an even rise is contrast, a rise of the last ones noise, a fall blur."""
    theirs = octave_energies(reference, width)
    return {band: ratio_db(energy, theirs[band]) for band, energy in octave_energies(power, width).items()}


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
        whole = sums.sum(0)
        for part, count in zip(sums, self.counts, strict=True):
            if count < num:
                yield (whole - part) / (num - count)


class SpectralProbe(Probe):
    """A probe of mean power spectra.

    The first value carries in ``extra`` what :meth:`describe` gives, statistics that have no metric of their own, and
    their ``intervals``. Every value carries ``jackknife``, and ``jackknife_real`` where the real images were left out
    by themselves.

    Args:
        context: any prompts.
        planes: leading planes of (Y, Cb, Cr) that are read.
        own: further protocol fields of single values, by name.
        protocol: protocol fields of all values.
    """

    summed_state = ("total",)

    def __init__(
        self, context: Context, planes: int, own: Mapping[str, Mapping[str, Any]] | None = None, **protocol: Any
    ) -> None:
        super().__init__(context)
        self.planes, self.flags = planes, self.compared()[1]
        shared = self.fields(
            self.real,
            planes="Rec. 601 " + ", ".join(PLANES[:planes]),
            window="periodic 2-D Hann after the mean is removed",
            ring="k/N, N the shorter side",
            jackknife=PAIRED if self.real is None or self.real.paired else UNPAIRED,
            **protocol,
        )
        self.planned = tuple(
            (info.name, Protocol.of(info.name, {**shared, **(own or {}).get(info.name, {})}))
            for info in self.infos
            if self.reports(info.name)
        )
        self.groups = cluster_groups(context.clusters(len(context.prompts)))
        self.sums = GroupedPower.empty(self.groups, planes, context.resolution, context.device)
        self.total = self.sums.total
        self._differences = {info.name for info in self.infos if info.direction is Direction.REFERENCE}

    def reports(self, name: str) -> bool:
        """Whether a value of ``infos`` exists in this evaluation."""
        return True

    @abstractmethod
    def statistics(self, power: np.ndarray) -> Values:
        """Statistics of mean power (planes, H, W//2 + 1), by name; NaN where undefined."""

    @abstractmethod
    def describe(self, ours: GroupedPower, real: GroupedPower | None) -> dict[str, Any]:
        """Vectors and further numbers of both sides' power, for ``extra``."""

    def values(self, power: np.ndarray, real: np.ndarray | None) -> Values:
        """Statistics of mean power, as differences to those of real images where there are any."""
        ours = self.statistics(power)
        if real is None:
            return ours
        theirs = self.statistics(real)
        return {name: ours[name] - theirs[name] for name in ours}

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.sums.add(images, positions)

    def compute(self) -> list[MetricValue]:
        real = self._real_power(self.real) if self.real else None
        means = self.sums.mean(), real.mean() if real else None
        values, sides = self.values(*means), self._replicates(real)
        found = [self._value(planned, values, sides) for planned in self.planned]
        extra = self.describe(self.sums, real) | self._further(values, sides)
        return [replace(found[0], extra={**extra, **found[0].extra}), *found[1:]]

    def _replicates(self, real: GroupedPower | None) -> list[list[Values]]:
        """Values with each group left out, of each side that is left out by itself."""
        if self.real is None or real is None:
            return [[self.values(ours, None) for ours in self.sums.without_each()]]
        if self.real.paired:
            pairs = zip(self.sums.without_each(), real.without_each(), strict=True)
            return [[self.values(ours, theirs) for ours, theirs in pairs]]
        own, theirs = self.sums.mean(), real.mean()
        return [
            [self.values(left, theirs) for left in self.sums.without_each()],
            [self.values(own, left) for left in real.without_each()],
        ]

    def _further(self, values: Values, sides: list[list[Values]]) -> dict[str, Any]:
        """Statistics that have no metric of their own, with their intervals."""
        own = {name for name, _ in self.planned}
        names = [name for name in values if name not in own]
        bounds = {name: _interval(name, values, sides) for name in names}
        return {
            **finite({name: values[name] for name in names}),
            "intervals": {name: [found.low, found.high] for name, found in bounds.items() if found},
        }

    def _value(self, planned: tuple[str, Protocol], values: Values, sides: list[list[Values]]) -> MetricValue:
        name = planned[0]
        defined, interval = math.isfinite(values[name]), _interval(name, values, sides)
        drawn = zip(("jackknife", "jackknife_real"), sides, strict=False) if interval else ()
        return MetricValue(
            *planned,
            value=values[name] if defined else None,
            interval=interval,
            num_images=len(self.groups),
            reference="real" if self.real and name in self._differences else None,
            flags=self.flags if defined else ("images without contrast", *self.flags),
            extra={key: [row[name] for row in rows] for key, rows in drawn},
        )

    def _real_power(self, real: Real) -> GroupedPower:
        """Sums of the real images: all planes, once for all probes and models."""
        groups = self.groups if real.paired else jackknife_groups(len(real))

        def add_up() -> np.ndarray:
            sums = GroupedPower.empty(groups, len(PLANES), self.context.resolution, self.context.device)
            for images, at in real.batches():
                sums.add(images.to(self.context.device), at)
            return sums.total.cpu().numpy()

        fields = {
            "sums": "power of Y, Cb, Cr by jackknife group",
            "groups": hashlib.sha256(groups.tobytes()).hexdigest(),
            "device": str(self.context.device),
        }
        key = json.dumps(["power", self.context.resolution, fields])
        sums = self.context.features.remember(key, lambda: real.keep(real, fields, add_up))
        return GroupedPower(groups, torch.from_numpy(sums[:, : self.planes]))


def _interval(name: str, values: Values, sides: list[list[Values]]) -> Interval | None:
    drawn = [[row[name] for row in rows] for rows in sides]
    finite_all = np.isfinite([values[name], *(x for side in drawn for x in side)]).all()
    return jackknife_interval_of_sides(values[name], drawn) if finite_all else None


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """NaN, of a value that does not exist, as None."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _info(
    name: str, label: str, about: str, unit: str = "dB", direction: Direction = Direction.REFERENCE
) -> MetricInfo:
    return MetricInfo.of(name, label, about, direction, Family.SPECTRUM, unit)


def spectral_statistics(power: np.ndarray, limit: float) -> Values:
    """Statistics of mean power.

    Args:
        power: (3, N, N//2 + 1): luma, Cb, Cr.
        limit: the reward model's Nyquist limit, cycles/pixel; at 0.5 it sees all, and ``unseen_db`` is left out.

    Returns:
        The names of :attr:`SpectrumProbe.infos` but the distance, and ``octave_{low}-{high}`` for luma and, with
        ``chroma_`` before it, for chroma; all in dB but the slope; NaN where undefined.
    """
    luma, chroma = power[0], power[1:].mean(0)
    found = {
        "hfer_db": decibel(high_frequency_ratio(luma)),
        "band_db": decibel(band_energy(luma, CUTOFF)),
        "slope": slope(*radial_profile(luma)),
        "chroma_hfer_db": decibel(high_frequency_ratio(chroma)),
        "chroma_band_db": decibel(band_energy(chroma, CUTOFF)),
    }
    if limit < NYQUIST:
        found["unseen_db"] = decibel(unseen_energy(luma, limit))
    for prefix, plane in (("octave_", luma), ("chroma_octave_", chroma)):
        found |= {f"{prefix}{band}": decibel(energy) for band, energy in octave_energies(plane).items()}
    return found


class SpectrumProbe(SpectralProbe):
    """Spectrum of generated images: HFER, energies, octaves, slope, log-spectral distance; luma and chroma.

    Args:
        context: any prompts.
    """

    name = "spectrum"
    infos = (
        _info("hfer_db", "HFER", "share of energy above .25 cycles/pixel"),
        _info("band_db", "Energy > .25", "energy above .25 cycles/pixel"),
        _info("unseen_db", "Energy above the reward's Nyquist", "energy that the reward model cannot see"),
        _info("slope", "Spectral slope", "fall of power over frequency; natural images about −2", ""),
        _info(
            *("log_spectral_distance_db", "Log-spectral distance", "distance of the mean spectra"),
            direction=Direction.LOWER,
        ),
        _info("chroma_hfer_db", "Chroma HFER", "share of chroma energy above .25 cycles/pixel"),
        _info("chroma_band_db", "Chroma energy > .25", "chroma energy above .25 cycles/pixel"),
    )

    def __init__(self, context: Context) -> None:
        self.nyquist = nyquist(reward_geometry(context)[0], context.resolution)
        super().__init__(
            context,
            planes=3,
            own={"unseen_db": {"unseen": "above the limit on either axis"}},
            cutoff=CUTOFF,
            reward_nyquist=self.nyquist,
            slope_band=list(SLOPE_BAND),
        )

    def reports(self, name: str) -> bool:
        """The distance needs real images, the unseen energy a reward model that does not see all."""
        return {"log_spectral_distance_db": self.real is not None, "unseen_db": self.nyquist < NYQUIST}.get(name, True)

    def statistics(self, power: np.ndarray) -> Values:
        return spectral_statistics(power, self.nyquist)

    def values(self, power: np.ndarray, real: np.ndarray | None) -> Values:
        found = super().values(power, real)
        if real is not None:
            ours, theirs = (radial_profile(side[0])[1] for side in (power, real))
            found["log_spectral_distance_db"] = log_spectral_distance(ours, theirs)
        return found

    def describe(self, ours: GroupedPower, real: GroupedPower | None) -> dict[str, Any]:
        """Luma and mean chroma power over radius and slope of both sides, and octave gaps.

        Spectra without each group of prompts give distances to other models their interval.
        """
        rings = [_rings(power) for power in ours.without_each()]
        found: dict[str, Any] = {
            f"{name}power_left_out": [each[i].tolist() for each in rings] for i, name in enumerate(CHROMA)
        }
        found["radius"] = radial_profile(ours.mean()[0])[0].tolist()
        sides = {"": ours.mean()} | ({"reference_": real.mean()} if real else {})
        for side, power in sides.items():
            found |= {f"{name}{side}power": each.tolist() for name, each in zip(CHROMA, _rings(power), strict=True)}
            found |= finite({f"{side}slope": slope(*radial_profile(power[0]))})
        if real:
            planes = [(power[0], power[1:].mean(0)) for power in sides.values()]
            for name, mine, theirs in zip(CHROMA, *planes, strict=True):
                found[f"{name}octave_gaps_db"] = finite(octave_gaps(mine, theirs))
        return found


def _rings(power: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Luma and mean chroma power by ring."""
    return radial_profile(power[0])[1], radial_profile(power[1:].mean(0))[1]


def reward_geometry(context: Context) -> tuple[int, int]:
    """Input side and patch of the world's reward model, in its pixels, without loading it.

    A folder says so itself; HPS checkpoint files are CLIP ViT-H-14.
    """
    config = context.reward_folder / "open_clip_config.json"
    if not config.is_file():
        return VIT_H_14
    vision = read_json(config)["model_cfg"]["vision_cfg"]
    size = vision["image_size"]
    return int(size[0] if isinstance(size, list) else size), int(vision.get("patch_size") or 1)


@lru_cache(maxsize=16)
def lattice(size: int, period: float) -> np.ndarray:
    """(size, size//2 + 1) bool: cells at multiples of N/p, without the mean and the corners beyond Nyquist."""
    cells = np.zeros((size, size // 2 + 1), dtype=bool)
    steps = np.arange(-(size // 2), size // 2 + 1)
    on = {round(k * size / period) for k in steps if abs(round(k * size / period)) <= size // 2}
    rows = sorted({k % size for k in on})
    cells[np.ix_(rows, sorted(k for k in on if k >= 0))] = True
    return cells & (half_plane(size).bins >= 0)


def peak_ratios(power: np.ndarray, period: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lattice cells over the median of their rings.

    Args:
        power: (N, N//2 + 1) mean power.
        period: p in pixels.

    Returns:
        Row and column of each lattice cell and its ratio, (L,) each; rings without other cells, or without power,
        are left out.
    """
    size = len(power)
    plane, cells = half_plane(size), lattice(size, period)
    rows, columns = np.nonzero(cells)
    ratios = np.full(len(rows), np.nan)
    for ring in np.unique(plane.bins[cells]):
        others = power[(plane.bins == ring) & ~cells]
        here = plane.bins[rows, columns] == ring
        if len(others) and (median := float(np.median(others))) > 0:
            ratios[here] = power[rows[here], columns[here]] / median
    known = np.isfinite(ratios)
    return rows[known], columns[known], ratios[known]


def grid_peak_db(power: np.ndarray, period: float) -> float:
    """Mean lattice cell over the median of its ring, in dB; NaN without contrast or without a lattice."""
    rows, columns, ratios = peak_ratios(power, period)
    if not len(ratios):
        return math.nan
    return decibel(float(np.average(ratios, weights=half_plane(len(power)).weight[rows, columns])))


def axis_peaks_db(power: np.ndarray, period: float) -> dict[str, float]:
    """Peak over ring in dB at k = N/p, 2N/p … on the two axes (the larger of both), by k."""
    rows, columns, ratios = peak_ratios(power, period)
    found: dict[str, float] = {}
    for row, column, ratio in zip(rows, columns, ratios, strict=True):
        if (row == 0) != (column == 0):
            k = str(column or min(row, len(power) - row))
            found[k] = max(found.get(k, -math.inf), decibel(float(ratio)))
    return found


class GridPeaks(SpectralProbe):
    """Peaks at the model's VAE stride and token, and at the reward model's patch period.

    Args:
        context: any prompts.
    """

    name = "grid"
    infos = (
        _info("grid_vae_db", "Grid peaks, VAE stride", "pattern that repeats with the latents, every 8 pixels in most"),
        _info("grid_patch_db", "Grid peaks, reward patch", "pattern that repeats with the reward model's patches"),
        _info("grid_token_db", "Grid peaks, token", "pattern that repeats with the tokens of a transformer"),
    )

    def __init__(self, context: Context) -> None:
        input_size, patch = reward_geometry(context)
        shared = {"vae": context.stride, "patch": patch * context.resolution / input_size}
        token = context.token if context.token != context.stride else None
        periods = {name: float(period) for name, period in shared.items() if period is not None}
        self.periods = periods | ({"token": float(token)} if token is not None else {})
        own = {"grid_token_db": {"token_px": token}}  # its own: models with and without share the other columns
        super().__init__(context, planes=1, own=own, periods_px=periods)

    def reports(self, name: str) -> bool:
        """A period that the model has."""
        return name.removeprefix("grid_").removesuffix("_db") in self.periods

    def statistics(self, power: np.ndarray) -> Values:
        return {f"grid_{name}_db": grid_peak_db(power[0], period) for name, period in self.periods.items()}

    def describe(self, ours: GroupedPower, real: GroupedPower | None) -> dict[str, Any]:
        """Absolute value and peaks by k, of the images and of real ones."""
        found: dict[str, Any] = {}
        sides = {"": ours.mean()[0]} | ({"reference_": real.mean()[0]} if real else {})
        for side, power in sides.items():
            for name, period in self.periods.items():
                found[f"{side}{name}_axis_db"] = finite(axis_peaks_db(power, period))
                found |= finite({f"{side}{name}_level_db": grid_peak_db(power, period)})
        return found
