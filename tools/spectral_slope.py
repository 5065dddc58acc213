"""Which radius a ring of the spectrum should carry: its centre k/N, or the mean radius of its cells.

    python docs/measure/spectral_slope.py [--out results/probes/spectral-slope.json]

Noise whose power falls as a known power of the frequency is made at 64 and 256 pixels,
periodic and cropped out of a field twice the size (images have borders), and its slope
is fitted under the Hann window with either radius. The table shows fitted minus true.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from rgbench.core.io import write_json_atomic
from rgbench.metrics.probes.spectrum import half_plane, power_spectrum, radial_profile, slope

NUM_IMAGES = {64: 384, 256: 48}
SLOPES = (-1.0, -1.5, -2.0, -2.5, -3.0)


def coloured_noise(num: int, size: int, exponent: float, cropped: bool) -> torch.Tensor:
    """(num, size, size) noise whose power falls as f^exponent."""
    side = 2 * size if cropped else size
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    radius[0, 0] = np.inf
    white = np.random.default_rng(0).standard_normal((num, side, side))
    noise = np.fft.irfft2(np.fft.rfft2(white) * radius ** (exponent / 2), s=(side, side))
    return torch.from_numpy(noise[:, :size, :size].copy())


def mean_radii(size: int) -> np.ndarray:
    """Mean radius of the cells of each ring."""
    plane = half_plane(size, size)
    inside = plane.bins >= 0
    bins, weight = plane.bins[inside], plane.weight[inside]
    return np.bincount(bins, weight * plane.radius[inside]) / np.bincount(bins, weight)


def measure() -> list[dict[str, float | int | bool]]:
    """One row per size, border and true slope."""
    rows = []
    for size, num in NUM_IMAGES.items():
        for cropped in (False, True):
            for true in SLOPES:
                power = power_spectrum(coloured_noise(num, size, true, cropped)).mean(0).numpy()
                centre, profile = radial_profile(power, size, size)
                errors = {
                    "ring_centre": slope(centre, profile) - true,
                    "mean_radius": slope(mean_radii(size), profile) - true,
                }
                rows.append({"size": size, "cropped": cropped, "true": true, **errors})
    return rows


def main() -> None:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows = measure()
    print("size  cropped  true   k/N     mean radius")
    for row in rows:
        print("{size:4d}  {cropped!s:7}  {true:4.1f}  {ring_centre:+.3f}  {mean_radius:+.3f}".format(**row))
    worst = {name: max(abs(row[name]) for row in rows) for name in ("ring_centre", "mean_radius")}
    print("largest error: " + ", ".join(f"{name} {error:.3f}" for name, error in worst.items()))
    if out:
        write_json_atomic(out, {"window": "Hann", "rows": rows, "largest_error": worst})


if __name__ == "__main__":
    main()
