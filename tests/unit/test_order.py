"""The order of training: permutations, equal global batches for every world size, exact resumption."""

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.order import legal_world_sizes, positions_of, sample_at

WORLD_SIZES = [1, 2, 3, 4, 6, 8, 12, 24]


@given(st.integers(1, 500), st.integers(0, 3), st.integers())
def test_every_sample_stands_exactly_once_in_an_epoch(num_samples: int, epoch: int, seed: int) -> None:
    first = epoch * num_samples
    seen = [sample_at(position, num_samples, seed) for position in range(first, first + num_samples)]
    assert {number for number, _ in seen} == {epoch}
    assert sorted(sample for _, sample in seen) == list(range(num_samples))


def test_epochs_and_seeds_are_shuffled_differently_and_none_is_the_identity() -> None:
    orders = [
        [sample_at(epoch * 1000 + offset, 1000, seed)[1] for offset in range(1000)]
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in [*orders, list(range(1000))]}) == 7
    for order in orders:  # far from sorted: neighbours are nowhere near each other
        assert np.abs(np.diff(order)).mean() == pytest.approx(1000 / 3, rel=0.1)


def test_a_sample_may_stand_anywhere_with_equal_chance() -> None:
    places = np.array([[sample_at(p, 6, seed)[1] for p in range(6)] for seed in range(3000)])
    counts = np.array([np.bincount(places[:, offset], minlength=6) for offset in range(6)])
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 60  # 25 degrees of freedom: exceeded by chance with p < 1e-4


def test_the_order_is_a_fixed_function() -> None:
    """Philox words sorted: a run may be resumed with another NumPy. Drawn once with NumPy 2.4."""
    assert [sample_at(position, 10, 5)[1] for position in range(20)] == [
        3,
        0,
        9,
        8,
        7,
        5,
        1,
        4,
        2,
        6,
        5,
        3,
        0,
        8,
        2,
        4,
        9,
        7,
        1,
        6,
    ]


def global_batch(update: int, world_size: int, global_batch_size: int, micro_batch_size: int) -> list[int]:
    """The positions of one update in the order of (micro-step, rank): nothing is sorted."""
    shares = [
        positions_of(update, rank, world_size, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1, "every rank takes equally many micro-steps"
    return [position for micro_step in zip(*shares, strict=True) for taken in micro_step for position in taken]


def test_global_batches_are_equal_for_every_world_size() -> None:
    num_samples, global_batch_size, micro_batch_size = 10_000, 96, 4
    num_updates = -(-3 * num_samples // global_batch_size)
    reference = None
    for world_size in WORLD_SIZES:
        sequence = [
            [
                sample_at(p, num_samples, 7)
                for p in global_batch(update, world_size, global_batch_size, micro_batch_size)
            ]
            for update in range(num_updates)
        ]
        reference = reference or sequence
        assert sequence == reference
    assert reference is not None
    for epoch in range(3):
        samples = [sample for number, sample in chain.from_iterable(reference) if number == epoch]
        assert sorted(samples) == list(range(num_samples))
        assert samples != sorted(samples)


def test_a_chain_of_world_sizes_resumed_in_mid_epoch_gives_the_same_sequence() -> None:
    stops = [0, 5, 11, 12, 30, 41]
    resumed = [
        global_batch(update, world_size, 96, 2)
        for world_size, (start, end) in zip([24, 16, 48, 1, 8], pairwise(stops), strict=True)
        for update in range(start, end)
    ]
    assert resumed == [list(range(update * 96, (update + 1) * 96)) for update in range(41)]


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 1000))
def test_legal_world_sizes_are_those_that_share_a_batch_evenly(num_micro: int, micro: int, update: int) -> None:
    size = num_micro * micro
    legal = legal_world_sizes(size, micro)
    assert legal == [world for world in range(1, num_micro + 1) if num_micro % world == 0]
    for world_size in legal:
        assert global_batch(update, world_size, size, micro) == list(range(update * size, (update + 1) * size))
    if micro > 1:
        assert legal_world_sizes(size + 1, micro) == []
