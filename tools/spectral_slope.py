"""Error of the fitted spectral slope where a ring's radius is its centre k/N, or the mean radius of its cells.

    python -m tools.spectral_slope

Noise whose power falls as a known power of the frequency, at 64 and 256 pixels, periodic and cropped out of a field
twice the size (images have borders). Its slope is fitted under the Hann window with either radius. The table shows
fitted minus true.
"""

from __future__ import annotations

import numpy as np
import torch

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
    plane = half_plane(size)
    inside = plane.bins >= 0
    bins, weight = plane.bins[inside], plane.weight[inside]
    return np.bincount(bins, weight * plane.radius[inside]) / np.bincount(bins, weight)


def main() -> None:
    """Print a row for each size, border and true slope."""
    print("size  cropped  true   k/N     mean radius")
    largest = {"k/N": 0.0, "mean radius": 0.0}
    for size, num in NUM_IMAGES.items():
        for cropped in (False, True):
            for true in SLOPES:
                power = power_spectrum(coloured_noise(num, size, true, cropped)).mean(0).numpy()
                centre, profile = radial_profile(power)
                errors = [slope(radius, profile) - true for radius in (centre, mean_radii(size))]
                print(f"{size:4d}  {cropped!s:7}  {true:4.1f}  {errors[0]:+.3f}  {errors[1]:+.3f}")
                largest = {n: max(e, abs(own)) for (n, e), own in zip(largest.items(), errors, strict=True)}
    print("largest error: " + ", ".join(f"{name} {error:.3f}" for name, error in largest.items()))


if __name__ == "__main__":
    main()
