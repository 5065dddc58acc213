"""Radial power spectrum: does an image carry the high frequencies that real ones carry?

    HFER(c) = Σ_{r>c} P / Σ_{r>0} P        slope   of ln P against ln f on [.02, .35]
    band    = Σ_{r>.25} P, and above the reward model's Nyquist limit: what it cannot see
    octave  = Σ P from f to 2f             LSD     √mean_k (10 log₁₀ S_k − 10 log₁₀ S_ref,k)²

HFER is a share and hides a gain in all bands; the band energy is absolute. Of the octaves
an even rise is contrast, a rise of the last ones noise, a fall blur. Gaps of ratios and
energies are in dB, so the gap to another model is the difference of the gaps to real images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rgbench.files import read_json
from rgbench.metrics.contract import Context, Direction, Metric
from rgbench.metrics.overopt.grouped import Figures, SpectralProbe, finite
from rgbench.metrics.overopt.power import (
    CUTOFF,
    SLOPE_BAND,
    band_energy,
    decibel,
    high_frequency_ratio,
    log_spectral_distance,
    octave_energies,
    octave_gaps,
    radial_profile,
    slope,
)
from rgbench.rewards.preprocess import nyquist

VIT_H_14 = (224, 14)


def _metric(name: str, label: str, unit: str = "dB", direction: Direction = "target") -> Metric:
    return Metric(name=name, label=label, direction=direction, unit=unit, family="spectrum", decimals=2)


AGAINST_REAL = (
    _metric("hfer_gap_db", "HFER gap"),
    _metric("band_gap_db", "Energy gap > .25"),
    _metric("unseen_gap_db", "Energy gap above the reward's Nyquist"),
    _metric("slope_gap", "Spectral slope gap", ""),
    _metric("log_spectral_distance_db", "Log-spectral distance", direction="lower"),
    _metric("chroma_hfer_gap_db", "Chroma HFER gap"),
    _metric("chroma_band_gap_db", "Chroma energy gap > .25"),
)
LEVELS = (
    _metric("hfer_db", "HFER"),
    _metric("band_db", "Energy > .25"),
    _metric("unseen_db", "Energy above the reward's Nyquist"),
    _metric("slope", "Spectral slope", ""),
    _metric("chroma_hfer_db", "Chroma HFER"),
    _metric("chroma_band_db", "Chroma energy > .25"),
)


def levels(power: np.ndarray, cutoff: float) -> Figures:
    """Absolute figures of mean power.

    Args:
        power: (3, H, W//2 + 1): luma, Cb, Cr.
        cutoff: the reward model's Nyquist limit, cycles/pixel.

    Returns:
        The names of ``LEVELS``, and ``octave_{low}-{high}`` for luma and, with ``chroma_`` before it, for chroma;
        all in dB but the slope; NaN where undefined.
    """
    height, width = power.shape[1], _width(power)
    luma, chroma = power[0], power[1:].mean(0)
    found = {
        "hfer_db": decibel(high_frequency_ratio(luma, height, width)),
        "band_db": decibel(band_energy(luma, height, width, CUTOFF)),
        "unseen_db": decibel(band_energy(luma, height, width, cutoff)),
        "slope": slope(*radial_profile(luma, height, width)),
        "chroma_hfer_db": decibel(high_frequency_ratio(chroma, height, width)),
        "chroma_band_db": decibel(band_energy(chroma, height, width, CUTOFF)),
    }
    for prefix, plane in (("octave_", luma), ("chroma_octave_", chroma)):
        energies = octave_energies(plane, height, width)
        found |= {f"{prefix}{band}": decibel(energy) for band, energy in energies.items()}
    return found


def gaps(power: np.ndarray, real: np.ndarray, cutoff: float) -> Figures:
    """Figures of mean power against those of real images of the same size.

    Args:
        power: (3, H, W//2 + 1): luma, Cb, Cr.
        real: the same of real images.
        cutoff: the reward model's Nyquist limit, cycles/pixel.

    Returns:
        The names of ``AGAINST_REAL`` and the octaves'; NaN where undefined.
    """
    ours, theirs = levels(power, cutoff), levels(real, cutoff)
    found = {_gap_name(name): ours[name] - theirs[name] for name in ours}
    profiles = [radial_profile(p[0], p.shape[1], _width(p))[1] for p in (power, real)]
    return found | {"log_spectral_distance_db": log_spectral_distance(profiles[0], profiles[1])}


def _gap_name(name: str) -> str:
    """``hfer_db`` → ``hfer_gap_db``; octaves keep theirs."""
    if "octave" in name:
        return name
    return f"{name.removesuffix('_db')}_gap{'_db' if name.endswith('_db') else ''}"


def _width(power: np.ndarray) -> int:
    """Width of square images; their half plane alone does not tell an even from an odd one."""
    return power.shape[1]


class SpectrumProbe(SpectralProbe):
    """Spectrum of generated images: HFER, energies, octaves, slope, log-spectral distance; luma and chroma.

    Args:
        context: any prompts; with real images of the same size, gaps to those.
    """

    def __init__(self, context: Context) -> None:
        self.nyquist = nyquist(reward_geometry(context)[0], context.resolution)
        super().__init__(
            context,
            (AGAINST_REAL, LEVELS),
            planes=3,
            cutoff=CUTOFF,
            reward_nyquist=self.nyquist,
            slope_band=list(SLOPE_BAND),
        )

    def figures(self, power: np.ndarray, real: np.ndarray | None) -> Figures:
        return levels(power, self.nyquist) if real is None else gaps(power, real, self.nyquist)

    def describe(self, power: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
        """Vectors of luma and mean chroma power over radius, octave gaps and slopes."""
        found: dict[str, Any] = _profiles(power, "")
        found["radius"] = radial_profile(power[0], power.shape[1], _width(power))[0].tolist()
        if real is None:
            return found
        found |= _profiles(real, "reference_")
        size = power.shape[1], _width(power)
        pairs = {"": (power[0], real[0]), "chroma_": (power[1:].mean(0), real[1:].mean(0))}
        for prefix, (ours, theirs) in pairs.items():
            found[f"{prefix}octave_gaps_db"] = finite(octave_gaps(ours, theirs, *size))
        return found

    def left_out(self, powers: Sequence[np.ndarray]) -> dict[str, Any]:
        """Spectra without each group of prompts, so that a distance to another model has an interval."""
        rings = [_rings(power) for power in powers]
        return {f"{name}power_left_out": [each[i].tolist() for each in rings] for i, name in enumerate(("", "chroma_"))}


def _rings(power: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Luma and mean chroma power by ring."""
    side = power.shape[1]
    return radial_profile(power[0], side, side)[1], radial_profile(power[1:].mean(0), side, side)[1]


def _profiles(power: np.ndarray, prefix: str) -> dict[str, Any]:
    luma, chroma = _rings(power)
    radius = radial_profile(power[0], power.shape[1], _width(power))[0]
    vectors = {f"{prefix}power": luma.tolist(), f"chroma_{prefix}power": chroma.tolist()}
    return vectors | finite({f"{prefix}slope": slope(radius, luma)})


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
