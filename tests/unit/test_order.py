"""The order of training: permutations, equal global batches for every world size, exact resumption."""

import tracemalloc
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import ConfigError, rng_for
from training.data.order import FEISTEL, SORTED, Order, feistel, positions_of, round_keys
from training.runtime import legal_world_sizes

WORLD_SIZES = [1, 2, 3, 4, 6, 8, 12, 24]


def sample_at(position: int, num_samples: int, seed: int) -> tuple[int, int]:
    return Order(seed, (num_samples,), (1.0,)).sample_at(position)


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


FIRST = {
    FEISTEL: [3, 2, 4, 0, 8, 7, 5, 1, 6, 9, 3, 4, 7, 5, 2, 8, 0, 1, 6, 9],
    SORTED: [3, 0, 9, 8, 7, 5, 1, 4, 2, 6, 5, 3, 0, 8, 2, 4, 9, 7, 1, 6],
}


@pytest.mark.parametrize("form", FIRST)
def test_the_order_is_a_fixed_function(form: str) -> None:
    """Raw Philox words: a run may be resumed with another NumPy. Drawn once with NumPy 2.4; the sorted one by the
    version that knew no other."""
    order = Order(5, (10,), (1.0,), form)
    assert [order.sample_at(position)[1] for position in range(20)] == FIRST[form]


def walked(size: int, seed: int) -> np.ndarray:
    """The whole of an epoch's permutation by arrays."""
    rounds = round_keys(seed, "order", 0)
    index = feistel(np.arange(size, dtype=np.uint64), size, rounds)
    while (outside := index >= size).any():
        index[outside] = feistel(index[outside], size, rounds)
    return index.astype(int)


@pytest.mark.parametrize("sizes", [range(1, 2001), [65_536, 65_537, 1_000_003]], ids=["small", "large"])
def test_the_keyed_order_is_a_bijection(sizes: Sequence[int]) -> None:
    for size in sizes:
        order, index = Order(size, (size,), (1.0,)), walked(size, size)
        assert np.array_equal(np.sort(index), np.arange(size))
        for position in range(0, size, max(size // 3, 1)):
            assert order.sample_at(position) == (0, index[position])


@pytest.mark.parametrize("size", [1000, 4099, 1_000_000])
def test_positions_tell_nothing_of_samples(size: int) -> None:
    """Correlation of a sample with its position, the next one, the next epoch's: within 4.5 standard errors."""
    index = walked(size, 1)
    pairs = [(index, np.arange(size)), (index[:-1], index[1:]), (index[:-7], index[7:]), (index, walked(size, 2))]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(size)
    steps = np.bincount(np.diff(index) % size * 16 // size, minlength=16)
    assert ((steps - size / 16) ** 2 / (size / 16)).sum() < 55, "steps between neighbours are of any length"


def test_a_position_of_a_hundred_million_costs_no_table() -> None:
    tracemalloc.start()
    order = Order(0, (10**8, 10**8), (1.0, 0.5))
    seen = {order.sample_at(position)[1] for position in range(0, 15 * 10**7, 10**6)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(seen) == 150
    assert max(seen) < 2 * 10**8
    assert peak < 1_000_000


def global_batch(update: int, world_size: int, global_batch_size: int, micro_batch_size: int) -> list[int]:
    """The positions of one update in the order of (micro-step, rank): nothing is sorted."""
    shares = [
        positions_of(update, rank, world_size, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1, "every rank takes equally many micro-steps"
    return [position for micro_step in zip(*shares, strict=True) for taken in micro_step for position in taken]


def uneven_shards() -> tuple[int, ...]:
    """The sizes of 37 shards, no two alike, 10,000 samples in all."""
    cuts = np.sort(rng_for(0, "shards").choice(np.arange(1, 10_000), 36, replace=False))
    sizes = tuple(np.diff([0, *cuts, 10_000]).tolist())
    assert len(sizes) == 37
    assert sum(sizes) == 10_000
    assert max(sizes) > 10 * min(sizes)
    return sizes


NUM_UPDATES = 3 * 10_000 // 96 + 1


@pytest.fixture(scope="module")
def reference() -> list[list[tuple[int, int]]]:
    """Three epochs of global batches of one worker; the shards are sets of weight 1."""
    return sequence(1, 4, 0, NUM_UPDATES)


def sequence(world_size: int, micro_batch_size: int, start: int, end: int) -> list[list[tuple[int, int]]]:
    """(epoch, sample) of every global batch from `start` to `end`, by an order made anew."""
    sizes = uneven_shards()
    order = Order(7, sizes, (1.0,) * len(sizes))
    return [
        [order.sample_at(position) for position in global_batch(update, world_size, 96, micro_batch_size)]
        for update in range(start, end)
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_global_batches_are_equal_for_every_world_size(world_size: int, reference: list[list[tuple[int, int]]]) -> None:
    assert sequence(world_size, 4, 0, NUM_UPDATES) == reference


def test_three_epochs_take_every_sample_once_each_and_not_in_shard_order(
    reference: list[list[tuple[int, int]]],
) -> None:
    for epoch in range(3):
        samples = [sample for number, sample in chain.from_iterable(reference) if number == epoch]
        assert samples != list(range(10_000))
        assert sorted(samples) == list(range(10_000))
    bounds = np.cumsum(uneven_shards())
    shards = [np.searchsorted(bounds, [sample for _, sample in batch], side="right") for batch in reference]
    assert np.mean([len(set(batch)) for batch in shards]) > 18, "a batch comes from shards all over, not from one"


def test_how_samples_are_divided_into_shards_does_not_matter(reference: list[list[tuple[int, int]]]) -> None:
    order = Order(7, (10_000,), (1.0,))
    assert [order.sample_at(p) for p in range(NUM_UPDATES * 96)] == list(chain.from_iterable(reference))


def test_a_chain_of_world_sizes_resumed_in_mid_epoch_gives_the_same_sequence(
    reference: list[list[tuple[int, int]]],
) -> None:
    stops = [0, 57, 103, 106, 111, NUM_UPDATES]  # the first epoch ends within update 104
    resumed = [
        batch
        for world_size, (start, end) in zip([24, 16, 48, 1, 8], pairwise(stops), strict=True)
        for batch in sequence(world_size, 2, start, end)
    ]
    assert resumed == reference


WEIGHTED = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from([0.25, 0.5, 0.7, 1.0, 2.0, 2.6])), min_size=1, max_size=4
)


@given(WEIGHTED, st.integers())
def test_weights(parts: list[tuple[int, float]], seed: int) -> None:
    """Each set has its share of every epoch, and goes through all its samples before it takes one again."""
    sizes, weights = (tuple(values) for values in zip(*parts, strict=True))
    order = Order(seed, sizes, weights)
    if any(round(size * weight) == 0 for size, weight in parts):
        with pytest.raises(ConfigError, match="less than one sample") as caught:
            order.sample_at(0)
        assert caught.value.where.startswith("data.")
        return
    slots = [round(size * weight) for size, weight in parts]
    bounds = np.cumsum(sizes)
    counts = np.zeros(sum(sizes), int)
    for epoch in range(5):
        start = epoch * sum(slots)
        seen = [order.sample_at(position) for position in range(start, start + sum(slots))]
        assert {number for number, _ in seen} == {epoch}
        samples = np.array([sample for _, sample in seen])
        shares = np.bincount(np.searchsorted(bounds, samples, side="right"), minlength=len(sizes))
        assert shares.tolist() == slots
        np.add.at(counts, samples, 1)
        for times in np.split(counts, bounds[:-1]):
            assert np.ptp(times) <= 1, "none is taken again before all others"
        for (_, weight), times in zip(parts, np.split(counts, bounds[:-1]), strict=True):
            if weight in (1.0, 2.0):
                assert (times == weight * (epoch + 1)).all()
    assert (counts > 0)[np.repeat(np.array(weights) >= 0.5, sizes) & (np.repeat(np.array(sizes) % 2 == 0, sizes))].all()


def test_a_weighted_set_is_taken_in_another_order_every_lap() -> None:
    order = Order(3, (200, 100), (0.5, 2.0))
    assert order.slots == (100, 200)
    stream = [order.sample_at(position)[1] for position in range(1200)]
    first, second = (
        [[s for s in stream[e * 300 : e * 300 + 300] if (s < 200) == (part == 0)] for e in range(4)] for part in (0, 1)
    )
    assert set(first[0]).isdisjoint(first[1])
    assert set(first[0]) | set(first[1]) == set(range(200))
    assert set(first[0]) != set(first[2]), "the halves of the second lap are others"
    assert len({tuple(epoch) for epoch in second}) == 4


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 1000))
def test_legal_world_sizes_are_those_that_share_a_batch_evenly(num_micro: int, micro: int, update: int) -> None:
    size = num_micro * micro
    legal = legal_world_sizes(size, micro)
    assert legal == [world for world in range(1, num_micro + 1) if num_micro % world == 0]
    for world_size in legal:
        assert global_batch(update, world_size, size, micro) == list(range(update * size, (update + 1) * size))
    if micro > 1:
        assert legal_world_sizes(size + 1, micro) == []
