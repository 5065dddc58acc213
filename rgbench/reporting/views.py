"""Views that show what the eye misses: the difference to another image, and the log power spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GAIN = 2.0  # of the difference view: half the range of 8 bits fills it
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
RANGE = (1.0, 99.8)  # percentiles of all pixels' decibels that are black and white


def difference(image: Image.Image, base: Image.Image) -> Image.Image:
    """128 + 2 (image − base) per channel, clipped to 8 bits: grey where they are equal.

    `base` is resized where the sizes differ.
    """
    other = base if base.size == image.size else base.resize(image.size, Image.Resampling.LANCZOS)
    change = np.asarray(image, np.float32) - np.asarray(other, np.float32)
    return Image.fromarray((128 + GAIN * change).round().clip(0, 255).astype(np.uint8))


def log_spectra(images: Sequence[Image.Image]) -> tuple[list[Image.Image], tuple[float, float]]:
    """Log power spectra of luma, frequency zero in the middle, all on one scale.

    The mean is removed and a Hann window laid over the image, as the spectrum metric does.

    Returns:
        Grey images, and the decibels that are black and white.
    """
    spectra = [_decibels(image) for image in images]
    low, high = np.percentile(np.concatenate([spectrum.ravel() for spectrum in spectra]), RANGE)
    scale = 255 / max(high - low, 1e-9)
    grey = [((spectrum - low) * scale).round().clip(0, 255).astype(np.uint8) for spectrum in spectra]
    return [Image.fromarray(pixels) for pixels in grey], (float(low), float(high))


def _decibels(image: Image.Image) -> NDArray:
    luma = np.asarray(image, np.float64) @ LUMA / 255
    height, width = luma.shape
    window = np.outer(*(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(side) / side) for side in (height, width)))
    power = np.abs(np.fft.fftshift(np.fft.fft2((luma - luma.mean()) * window))) ** 2
    return 10 * np.log10(power / (height * width) + 1e-12)
