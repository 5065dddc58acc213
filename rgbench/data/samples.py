"""Captioned images from files: decoded, resized and cropped, and the limit on those that cannot be read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.io import MAX_PIXELS, open_image
from rgbench.data.batches import Batch
from rgbench.data.files import clean_text, decode_text

MAX_UNREADABLE = 0.001  # share of the samples
NUM_PROBES = 64  # samples read when a source is opened
NUM_REASONS = 10  # reasons printed
NUM_HASHED = 1024  # samples whose bytes are hashed; all of a large data set would take hours
HASHED = {"hashed": "contents"}  # beside the sha256 of a fingerprint; that of older versions saw names and sizes alone

log = logging.getLogger(__name__)


class UnreadableSample(Exception):
    """A sample that cannot be used; the message names it and says why."""


def decode_image(source: Path | bytes, resolution: int, where: str) -> np.ndarray:
    """Open one image upright and fit it: (resolution, resolution, 3) uint8.

    Raises:
        UnreadableSample: no image that rgbench reads, or a damaged one.
    """
    try:
        return fit_image(open_image(source, upright=True), resolution)
    except (UsageError, OSError) as error:
        raise UnreadableSample(f"{where}: {error}") from error


def fit_image(image: Image.Image, resolution: int) -> np.ndarray:
    """Resize the short side with Lanczos (antialiased, on uint8), then crop the centre.

    Args:
        image: RGB.
        resolution: side of the result, pixels; an image of that size is left as it is.

    Returns:
        (resolution, resolution, 3) uint8.

    Raises:
        UsageError: so long and narrow that it is not worth the memory.
    """
    scale = resolution / min(image.size)
    if resolution * scale * max(image.size) > MAX_PIXELS:
        raise UsageError(f"{image.width}×{image.height} pixels are too long and narrow; crop it first")
    if scale != 1:
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = ((side - resolution) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def decode_caption(data: bytes, where: str) -> str:
    """Caption text from the bytes of a file.

    Raises:
        UnreadableSample: not UTF-8, damaged, or nothing to be seen in it.
    """
    try:
        return check_caption(clean_text(decode_text(data, f"{where}: caption"), where), where)
    except UsageError as error:
        raise UnreadableSample(str(error)) from error


def check_caption(text: str, where: str) -> str:
    """Give a clean caption back; an UnreadableSample where it is empty."""
    if not text:
        raise UnreadableSample(f"{where}: the caption is empty")
    return text


def to_batch(images: Sequence[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 images of one size → (B, 3, H, W) float32 in [0, 1].

    NumPy's division runs in the thread that reads and without Python's lock; torch's would wake a second team of
    threads for each reader.
    """
    batch = np.empty((len(images), 3, *images[0].shape[:2]), dtype=np.float32)
    for pixels, out in zip(images, batch, strict=True):
        np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=out)
    return torch.from_numpy(batch)


def spread(length: int, num: int) -> list[int]:
    """Up to ``num`` different indices spread evenly over ``range(length)``."""
    return np.unique(np.linspace(0, length - 1, min(num, length)).astype(int)).tolist() if length else []


def hash_contents(length: int, read: Callable[[int], Iterable[bytes]]) -> str:
    """sha256 over the bytes of up to ``NUM_HASHED`` samples spread evenly, for a source's fingerprint.

    Args:
        length: of the source.
        read: (index) → the bytes of an image, of a caption.

    Raises:
        UsageError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for index in spread(length, NUM_HASHED):
            for part in read(index):
                digest.update(hashlib.sha256(part).digest())
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror}; repair or remove it") from error
    return digest.hexdigest()


class TolerantReader:
    """Batches of a finite source in which up to 0.1 % of the samples may be unreadable.

    An unreadable sample is replaced by the next readable one in file order, so that batches stay a pure function of
    their indices. The run stops once the share is over the limit for certain (against all samples) or beyond doubt
    (against those read so far, so that a folder of something else stops at once). Under 1,000 samples one unreadable is
    over the limit: all are read when the source is opened.

    Args:
        where: the source as the user named it, for messages.
        length: samples that have an image and a caption.
        read: (index) → image (H, W, 3) uint8, prompt, id; raises UnreadableSample.
        dropped: reasons of samples that ``length`` does not count.

    Raises:
        UsageError: the limit is passed already.
    """

    def __init__(
        self,
        where: str,
        length: int,
        read: Callable[[int], tuple[np.ndarray, str, str]],
        dropped: Iterable[str] = (),
    ):
        self._where, self._length, self._read = where, length, read
        self._dropped = list(dropped)
        self._unreadable: dict[int, str] = {}
        self._num_read = 0
        self._check_limit()
        small = (length + len(self._dropped)) * MAX_UNREADABLE < 1
        for index in range(length) if small else spread(length, NUM_PROBES):
            self._try_read(index)
        for reason in self._dropped[:NUM_REASONS]:
            log.warning("left out: %s", reason)

    def load(self, indices: list[int]) -> Batch:
        """Read samples; an unreadable one gives way to the next that can be read.

        Raises:
            UsageError: more than 0.1 % are unreadable; lists the reasons.
        """
        images, prompts, ids = zip(*(self._read_from(index) for index in indices), strict=True)
        return Batch(to_batch(images), list(prompts), list(ids))

    def _read_from(self, index: int) -> tuple[np.ndarray, str, str]:
        while True:
            sample = None if index in self._unreadable else self._try_read(index)
            if sample is not None:
                return sample
            index = (index + 1) % self._length

    def _try_read(self, index: int) -> tuple[np.ndarray, str, str] | None:
        self._num_read += 1
        try:
            return self._read(index)
        except UnreadableSample as error:
            self._unreadable[index] = str(error)
            self._check_limit()
            log.warning("replaced by the next sample: %s", error)
            return None

    def _check_limit(self) -> None:
        num_bad = len(self._unreadable) + len(self._dropped)
        total = self._length + len(self._dropped)
        certain = num_bad > MAX_UNREADABLE * total
        beyond_doubt = len(self._unreadable) > 5 + 2 * MAX_UNREADABLE * self._num_read
        if not (certain or beyond_doubt):
            return
        reasons = [*self._dropped, *self._unreadable.values()]
        more = f"\n  … and {len(reasons) - NUM_REASONS} more" if len(reasons) > NUM_REASONS else ""
        listed = "".join(f"\n  {reason}" for reason in reasons[:NUM_REASONS])
        raise UsageError(
            f"{self._where}: {num_bad} of {total} samples cannot be used ({self._num_read} read so far), over the "
            f"limit of {MAX_UNREADABLE:.1%}; repair or remove them:{listed}{more}"
        )
