"""The one sampler: which samples make up a batch, as a pure function of the step counter.

There is no iterator and so nothing to save: resuming at step k is calling
``batch_indices(seed, k, ...)``. Each epoch over a finite source is a permutation
of its own, computed for the asked positions alone (a Feistel network with cycle
walking), so 12 M samples cost no more memory than 12.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rgbench.run import stream_seed

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
