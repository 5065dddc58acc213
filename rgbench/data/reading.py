"""Decoding of captioned images, and the limit on those that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.data.contract import Batch
from rgbench.errors import UsageError
from rgbench.files import open_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_UNREADABLE = 0.001  # share of the samples
NUM_PROBES = 64  # samples read when a source is opened
NUM_REASONS = 10  # reasons printed

logger = logging.getLogger(__name__)


class UnreadableSample(Exception):
    """A sample that cannot be used; the message names it and says why."""


def fit_image(image: Image.Image, resolution: int) -> np.ndarray:
    """Resize the short side with Lanczos (antialiased, on uint8), then crop the centre.

    Args:
        image: RGB.
        resolution: side of the result, pixels; an image of that size is left as it is.

    Returns:
        (resolution, resolution, 3) uint8.
    """
    scale = resolution / min(image.size)
    if scale != 1:
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = ((side - resolution) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def to_batch(images: Sequence[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 images of one size → (B, 3, H, W) float32 in [0, 1].

    NumPy's division runs in the thread that reads and without Python's lock; torch's would wake a second team of
    threads for each reader.
    """
    batch = np.empty((len(images), 3, *images[0].shape[:2]), dtype=np.float32)
    for pixels, out in zip(images, batch, strict=True):
        np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=out)
    return torch.from_numpy(batch)


def decode_image(source: Path | bytes, resolution: int, where: str) -> np.ndarray:
    """Open and fit one image: (resolution, resolution, 3) uint8.

    Raises:
        UnreadableSample: it is no image that rgbench reads, or a damaged one.
    """
    try:
        return fit_image(open_image(source), resolution)
    except (UsageError, OSError) as error:
        raise UnreadableSample(f"{where}: {error}") from error


def decode_caption(data: bytes, where: str) -> str:
    """Caption text from the bytes of a file.

    Raises:
        UnreadableSample: not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UnreadableSample(f"{where}: the caption is not UTF-8 (byte {error.start})") from error
    if not text:
        raise UnreadableSample(f"{where}: the caption is empty")
    return text


class TolerantReader:
    """Batches of a finite source in which up to 0.1 % of the samples may be unreadable.

    An unreadable sample is replaced by the next readable one in file order, so that
    batches stay a pure function of their indices. The run stops once the share is
    over the limit for certain (against all samples) or beyond doubt (against those
    read so far, so that a folder of something else stops at once). Under 1,000
    samples one unreadable is over the limit: all are read when the source is opened.

    Args:
        where: the source as the user named it, for messages.
        length: samples that have an image and a caption.
        read: (index) → image (H, W, 3) uint8, prompt, id; raises UnreadableSample.
        dropped: reasons of what was found and left out of ``length``.

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
        total = length + len(self._dropped)
        small = total * MAX_UNREADABLE < 1
        probes = range(length) if small else np.linspace(0, length - 1, NUM_PROBES).astype(int).tolist()
        for index in probes:
            self._try_read(index)
        for reason in self._dropped[:NUM_REASONS]:
            logger.warning("left out: %s", reason)

    def load(self, indices: list[int]) -> Batch:
        """Read samples; an unreadable one gives way to the next that can be read.

        Raises:
            UsageError: more than 0.1 % are unreadable; lists the reasons.
        """
        samples = [self._read_from(index) for index in indices]
        return Batch(
            to_batch([image for image, _, _ in samples]),
            [prompt for _, prompt, _ in samples],
            [identity for _, _, identity in samples],
        )

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
            logger.warning("replaced by the next sample: %s", error)
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
