"""The order is a pure function, a permutation of every epoch, and the same for every world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.reading.batches import batch_plan
from blip3o_lit.tokens.reading.order import SampleOrder, random_permutation

sizes_lists = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**40), 2**40), sizes_lists, st.integers(1, 5))
def test_each_epoch_is_a_permutation(seed: int, sizes: list[int], window: int) -> None:
    total = sum(sizes)
    ids, epochs = SampleOrder(seed, np.array(sizes), window).at(0, 3 * total)
    for epoch in range(3):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(total))
    assert epochs.tolist() == sorted(epochs.tolist())


@settings(max_examples=60, deadline=None)
@given(sizes_lists, st.integers(1, 5), st.integers(0, 200), st.integers(1, 90))
def test_any_piece_equals_that_piece_of_the_whole(
    sizes: list[int], window: int, start: int, count: int
) -> None:
    whole = SampleOrder(3, np.array(sizes), window).at(0, start + count)
    piece = SampleOrder(3, np.array(sizes), window).at(start, count)
    for a, b in zip(whole, piece):
        np.testing.assert_array_equal(a[start:], b)


def test_epochs_and_seeds_differ() -> None:
    sizes = np.full(8, 16)
    ids, _ = SampleOrder(0, sizes, 4).at(0, 256)
    other, _ = SampleOrder(1, sizes, 4).at(0, 128)
    assert (ids[:128] != ids[128:]).any()
    assert (ids[:128] != other).any()


def test_samples_stay_in_their_window_of_shards() -> None:
    ids, _ = SampleOrder(0, np.full(12, 10), 3).at(0, 120)
    for window in ids.reshape(4, 30):
        assert len(set((window // 10).tolist())) == 3


def test_permutations_are_uniform() -> None:
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        counts[np.arange(4), random_permutation(7, epoch, 0, 4)] += 1
    # 4000 draws, p = 1/4: standard deviation 27; 5 of them.
    assert abs(counts - 1000).max() < 137


def test_the_order_never_changes() -> None:
    """Resumed runs depend on these very numbers."""
    ids, epochs = SampleOrder(42, np.array([3, 4, 2]), 2).at(5, 8)
    assert ids.tolist() == [0, 4, 7, 8, 2, 7, 8, 1]
    assert epochs.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_batch_plan_cuts_every_step_alike() -> None:
    for world, micro in ((1, None), (2, None), (2, 3), (3, 2), (1, 4), (4, 1)):
        plan = batch_plan(12, micro, world)
        places = [
            plan.offset(rank, m) + i
            for rank in range(world)
            for m in range(plan.accumulation)
            for i in range(plan.micro_batch_size)
        ]
        assert places == list(range(12))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, None, 4), "batch_size=10 .* 4 processes.*trainer.devices"),
        ((0, None, 1), "batch_size=0"),
        ((12, 5, 1), "micro_batch_size=5 .*use 4"),
        ((12, 24, 2), "micro_batch_size=24 .*use 6"),
        ((12, 0, 1), "micro_batch_size=0"),
    ],
)
def test_sizes_that_do_not_divide(sizes: tuple[int, int | None, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        batch_plan(*sizes)
