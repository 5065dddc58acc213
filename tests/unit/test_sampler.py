"""The sampler is a pure function of the counter, and every epoch a permutation."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgbench.data.batches import batch_indices, permute

GOLDEN10 = [5, 1, 9, 8, 7, 4, 2, 0]
GOLDEN12M = [10553088, 8435897, 2838235, 4278231]


def positions(seed: int, first: int, count: int, length: int) -> list[int]:
    """Indices at global positions [first, first + count), one at a time."""
    return [int(batch_indices(seed, p, 1, length)[0]) for p in range(first, first + count)]


@pytest.mark.parametrize("length", [*range(1, 66), 100, 127, 128, 129, 255, 257, 1000])
def test_each_epoch_visits_every_sample_once(length: int) -> None:
    for epoch in range(3):
        visited = batch_indices(3, epoch, length, length)
        assert sorted(visited) == list(range(length))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 3000),
    keys=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=12),
)
def test_permute_is_a_bijection_for_any_keys(length: int, keys: list[int]) -> None:
    image = permute(np.arange(length), length, np.array(keys, dtype=np.uint64))
    assert sorted(image) == list(range(length))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    length=st.integers(1, 50),
    batch_size=st.integers(1, 120),
    step=st.integers(0, 500),
)
def test_batches_do_not_depend_on_their_size_nor_on_history(seed: int, length: int, batch_size: int, step: int) -> None:
    batch = batch_indices(seed, step, batch_size, length)
    assert batch.tolist() == positions(seed, step * batch_size, batch_size, length)


def test_resume_sees_the_same_batches() -> None:
    straight = [batch_indices(7, step, 8, 30).tolist() for step in range(12)]
    resumed = [batch_indices(7, step, 8, 30).tolist() for step in range(5, 12)]
    assert straight[5:] == resumed


def test_epoch_edge_inside_a_batch() -> None:
    """Batches of 4 over 10 samples: step 2 takes the last 2 of epoch 0 and the first 2 of epoch 1."""
    stream = np.concatenate([batch_indices(0, step, 4, 10) for step in range(5)])
    assert sorted(stream[:10]) == list(range(10))
    assert sorted(stream[10:]) == list(range(10))
    assert stream[:10].tolist() != stream[10:].tolist()


def test_a_batch_may_hold_several_epochs() -> None:
    batch = batch_indices(0, 0, 9, 3)
    assert Counter(batch.tolist()) == {0: 3, 1: 3, 2: 3}


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = [batch_indices(seed, epoch, 100, 100).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_all_orders_of_four_are_about_equally_likely() -> None:
    """24 orders, 2,400 seeds: chi-squared with 23 degrees of freedom stays under its 99.99 % point."""
    seen = Counter(tuple(batch_indices(seed, 0, 4, 4).tolist()) for seed in range(2400))
    chi2 = sum((seen[order] - 100) ** 2 / 100 for order in permutations(range(4)))
    assert chi2 < 58.6


def test_large_epoch_is_shuffled_without_being_made() -> None:
    """12 M samples: a batch from the middle is cheap, and its indices spread evenly over the range."""
    length = 12_000_000
    batch = batch_indices(1, 300, 8192, length)
    assert len(set(batch.tolist())) == 8192
    assert abs(batch.mean() / length - 0.5) < 5 * math.sqrt(1 / 12 / 8192)
    neighbours = np.corrcoef(batch[:-1], batch[1:])[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(8192)


def test_unbounded_source_is_read_in_order_from_a_start_per_seed() -> None:
    assert batch_indices(0, 3, 4, None).tolist() == [12, 13, 14, 15]
    assert batch_indices(2, 0, 2, None).tolist() == [2 << 32, (2 << 32) + 1]


def test_golden_order() -> None:
    """An order that changes between versions would break exact resume."""
    assert batch_indices(0, 0, 8, 10).tolist() == GOLDEN10
    assert batch_indices(1, 1000, 4, 12_000_000).tolist() == GOLDEN12M


@pytest.mark.parametrize("seed, step, batch_size, length", [(-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)])
def test_impossible_batches_are_refused(seed: int, step: int, batch_size: int, length: int) -> None:
    with pytest.raises(ValueError, match="no batch for"):
        batch_indices(seed, step, batch_size, length)
