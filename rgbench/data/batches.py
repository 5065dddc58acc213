"""What every data source offers, whatever it reads from.

Batches of a run in the order of its steps, one rank's share of each, read ahead by threads where asked for.

The one sampler: which samples make up a batch, as a pure function of the step counter.

There is no iterator and so nothing to save: resuming at step k is calling
``batch_indices(seed, k, ...)``. Each epoch over a finite source is a permutation
of its own, computed for the asked positions alone (a Feistel network with cycle
walking), so 12 M samples cost no more memory than 12.

Decoding of captioned images, and the limit on those that cannot be read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.io import open_image
from rgbench.core.run import stream_seed


@dataclass(frozen=True)
class Encoded:
    """What a model's encoders make of samples.

    Attributes:
        mean: of the VAE's posterior, unscaled, (B, C, h, w).
        std: of the same.
        prompt_embeds: text-encoder states, (B, L, D).
    """

    mean: Tensor
    std: Tensor
    prompt_embeds: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one batch, in the order asked for.

    Attributes:
        images_BCHW: (B, 3, resolution, resolution) float32 in [0, 1]; None where ``encoded`` stands for them.
        prompts: B captions.
        ids: B names that find the samples again, for messages.
        encoded: from the latents cache.
    """

    images_BCHW: Tensor | None
    prompts: list[str]
    ids: list[str]
    encoded: Encoded | None = None


class DataSource(Protocol):
    """Random access to captioned images; which ones make a batch is the sampler's business.

    Attributes:
        name: short name for messages and tables.
        length: number of samples, or None where there is no end.
    """

    name: str
    length: int | None

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: equal fingerprints, equal samples at equal indices."""
        ...

    def load(self, indices: list[int]) -> Batch:
        """Load samples by index, a pure function of it.

        Raises:
            UsageError: more than 0.1 % of the samples cannot be read; lists the reasons.
        """
        ...


NUM_ROUNDS = 12  # small domains need more than the 4 of Luby and Rackoff (1988)
UNBOUNDED_STRIDE = 1 << 32  # samples between the starting points of two seeds


def batch_indices(seed: int, step: int, batch_size: int, length: int | None) -> np.ndarray:
    """Sample indices of the global batch of one optimiser step.

    Position ``p = step * batch_size + j`` lies in epoch ``p // length``; batches
    run across the edge between epochs, and each epoch visits every sample once.
    A source without an end is read in order, from ``seed * 2**32`` on, so that
    training seeds differ in their data too.

    Args:
        seed: the run's seed, at least 0.
        step: optimiser step, from 0.
        batch_size: samples per optimiser step, over all ranks and micro-batches.
        length: samples in the source, or None where it has no end.

    Returns:
        (batch_size,) int64.

    Raises:
        ValueError: a negative seed or step, a batch or source without samples.
    """
    if seed < 0 or step < 0 or batch_size < 1 or (length is not None and length < 1):
        raise ValueError(f"no batch for seed {seed}, step {step}, batch size {batch_size}, length {length}")
    position = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    if length is None:
        return position + (seed % (1 << 30)) * UNBOUNDED_STRIDE
    epoch, within = np.divmod(position, length)
    indices = np.empty_like(position)
    for e in np.unique(epoch):
        indices[epoch == e] = permute(within[epoch == e], length, _round_keys(seed, int(e)))
    return indices


def permute(values: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """Images of ``values`` under a keyed permutation of ``range(length)``.

    Args:
        values: (B,) int64 in [0, length).
        length: size of the permuted range.
        keys: (rounds,) uint64, one per Feistel round.

    Returns:
        (B,) int64 in [0, length), distinct where ``values`` are.

    Source: Black and Rogaway (2002), "Ciphers with arbitrary finite domains":
    encipher in the next larger power of four, and again while outside the range.
    """
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    out = _feistel(values.astype(np.uint64), half_bits, keys)
    outside = out >= length
    while outside.any():
        out[outside] = _feistel(out[outside], half_bits, keys)
        outside = out >= length
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> bits, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 finaliser (Steele et al., 2014); uint64 arithmetic wraps by intent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    return np.array([stream_seed(seed, "data.order", epoch, r) for r in range(NUM_ROUNDS)], dtype=np.uint64)


class BatchLoader:
    """Micro-batches by (step, number): what is read ahead changes when it is read, never what.

    Threads, not processes: decoding leaves Python's lock, nothing has to be sent between processes, and none is
    orphaned by a kill.

    Args:
        source: the data.
        seed: the run's.
        batch_size: images per optimiser step over all ranks.
        positions: this rank's, in the global batch.
        num_micro: micro-batches they are read in; divides their number.
        num_workers: threads that read ahead; 0 reads when asked.
        steps: of the run; nothing is read beyond.
    """

    def __init__(
        self,
        source: DataSource,
        seed: int,
        batch_size: int,
        positions: Sequence[int],
        num_micro: int = 1,
        num_workers: int = 0,
        steps: int | None = None,
    ) -> None:
        self.source, self.seed, self.batch_size, self.steps = source, seed, batch_size, steps
        each = len(positions) // num_micro
        self.micro = [positions[i * each : (i + 1) * each] for i in range(num_micro)]
        self.num_workers = num_workers
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}

    def load(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step.

        Raises:
            UsageError: data that cannot be read, see :meth:`DataSource.load`.
        """
        if not self.num_workers:
            return [self._read(step, micro) for micro in range(len(self.micro))]
        self._read_ahead(step)
        return [self._ahead.pop((step, micro)).result() for micro in range(len(self.micro))]

    def close(self) -> None:
        """End the threads; what they had not begun is dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None
        self._ahead.clear()

    def _read(self, step: int, micro: int) -> Batch:
        indices = batch_indices(self.seed, step, self.batch_size, self.source.length)
        positions = self.micro[micro]
        return self.source.load(indices[positions[0] : positions[-1] + 1].tolist())

    def _read_ahead(self, step: int) -> None:
        """Have this step and as many micro-batches beyond it as there are threads on their way."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="rgbench-data")
        beyond = -(-self.num_workers // len(self.micro))
        last = step + beyond if self.steps is None else min(step + beyond, self.steps - 1)
        for later in range(step, max(last, step) + 1):
            for micro in range(len(self.micro)):
                if (later, micro) not in self._ahead:
                    self._ahead[later, micro] = self._threads.submit(self._read, later, micro)


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
