"""Batches of a run: what a data source offers, which samples make up a batch, and reading ahead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rgbench.core.run import splitmix64, stream_seed

NUM_ROUNDS = 12  # small domains need more than the 4 of Luby and Rackoff (1988)
UNBOUNDED_STRIDE = 1 << 32  # samples between the starting points of two seeds


@dataclass(frozen=True)
class Encoded:
    """Samples as a model's encoders give them.

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
    """Samples of one batch, in the order of their indices.

    Attributes:
        images_BCHW: (B, 3, resolution, resolution) float32 in [0, 1]; None where ``encoded`` stands for them.
        prompts: B captions.
        ids: B names of the samples, for messages.
        encoded: from the latents cache.
        scores: of all samples of each one's prompt, (B, n); None where nothing was scored.
        rank: which of the n each one is, (B,) int64; with ``scores``.
    """

    images_BCHW: Tensor | None
    prompts: list[str]
    ids: list[str]
    encoded: Encoded | None = None
    scores: Tensor | None = None
    rank: Tensor | None = None


class DataSource(Protocol):
    """Random access to captioned images.

    Attributes:
        name: short name for messages and tables.
        length: number of samples, or None where there is no end.
    """

    name: str
    length: int | None

    def fingerprint(self) -> dict[str, Any]:
        """Identify the data: equal fingerprints, equal samples at equal indices."""
        ...

    def load(self, indices: list[int]) -> Batch:
        """Load samples by index, a pure function of it.

        Raises:
            UsageError: more than 0.1 % of the samples cannot be read; lists the reasons.
        """
        ...


def batch_indices(seed: int, step: int, batch_size: int, length: int | None) -> np.ndarray:
    """Sample indices of the global batch of one optimiser step, a pure function of seed and step.

    So there is no iterator and nothing to save: a resumed run calls this with its next step. Each epoch over a finite
    source is a permutation of its own, computed for these positions alone (a Feistel network with cycle walking), so
    that 12 M samples cost no more memory than 12. Position ``p = step * batch_size + j`` lies in epoch ``p // length``;
    batches run across the edge between epochs, and each epoch visits every sample once. A source without an end is read
    in order, from ``seed * 2**32`` on, so that training seeds differ in their data too.

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
    """Map ``values`` by a keyed permutation of ``range(length)``.

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
        left, right = right, left ^ (splitmix64(right ^ key) & mask)
    return (left << bits) | right


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    return np.array([stream_seed(seed, "data.order", epoch, r) for r in range(NUM_ROUNDS)], dtype=np.uint64)


class BatchLoader:
    """Micro-batches of each step for one rank, read ahead by threads; what is read never depends on them.

    Decoding leaves Python's lock, and a kill orphans no thread as it would a process.

    Args:
        source: the data.
        seed: the run's.
        batch_size: images per optimiser step over all ranks.
        positions: this rank's, in the global batch.
        num_micro: micro-batches they are read in; divides their number.
        num_workers: threads that read ahead; 0 reads each step when it is loaded.
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
        """End the threads and drop what they have not begun."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None
        self._ahead.clear()

    def _read(self, step: int, micro: int) -> Batch:
        indices = batch_indices(self.seed, step, self.batch_size, self.source.length)
        positions = self.micro[micro]
        return self.source.load(indices[positions[0] : positions[-1] + 1].tolist())

    def _read_ahead(self, step: int) -> None:
        """Start reading this step and as many micro-batches beyond it as there are threads."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="rgbench-data")
        beyond = -(-self.num_workers // len(self.micro))
        last = step + beyond if self.steps is None else min(step + beyond, self.steps - 1)
        for later in range(step, max(last, step) + 1):
            for micro in range(len(self.micro)):
                if (later, micro) not in self._ahead:
                    self._ahead[later, micro] = self._threads.submit(self._read, later, micro)
