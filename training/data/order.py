"""Which sample is at which position of the training stream, and which rank takes it: pure functions of integers."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import isqrt
from typing import TypeVar

import numpy as np

from infra.errors import ConfigError
from infra.seeding import rng_for

Index = TypeVar("Index", int, np.ndarray)
FEISTEL, SORTED = "feistel", "sorted"
"""How an epoch is permuted: a keyed bijection; a sorted table, in checkpoints that do not name their order."""
NUM_ROUNDS = 4
MASK = 2**64 - 1


@dataclass(frozen=True)
class Order:
    """The endless stream over one or several sets of `sizes` samples, numbered through all sets in turn.

    A set of n samples and weight w takes round(w * n) slots of every epoch, and an epoch is a true permutation of all
    slots. A set's slots walk through an endless row of permutations of that set: with weight 1 every sample is
    exactly once in an epoch, with 2 twice, with 0.5 (of an even n) once in two. ConfigError for a set without a slot.
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    form: str = FEISTEL

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Slots of an epoch by set."""
        slots = tuple(round(weight * size) for size, weight in zip(self.sizes, self.weights, strict=True))
        if 0 in slots:
            number = slots.index(0)
            raise ConfigError(
                f"weight {self.weights[number]} of {self.sizes[number]} samples is less than one sample an epoch",
                where=f"data.{number}.weight",
                todo="raise the weight, or leave this set out",
            )
        return slots

    @cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        """The first slot and the first sample of each set."""
        return list(accumulate(self.slots, initial=0)), list(accumulate(self.sizes, initial=0))

    def sample_at(self, position: int) -> tuple[int, int]:
        """(epoch, sample) of the `position`-th sample seen since the run began."""
        first_slot, first_sample = self._starts
        epoch, offset = divmod(position, first_slot[-1])
        slot = self._permuted(offset, first_slot[-1], "order", epoch)
        number = bisect(first_slot, slot) - 1
        size, count = self.sizes[number], self.slots[number]
        sample = slot - first_slot[number]
        if count != size:
            lap, place = divmod(epoch * count + sample, size)
            sample = self._permuted(place, size, "order", "set", number, lap)
        return epoch, first_sample[number] + sample

    def _permuted(self, index: int, size: int, *keys: str | int) -> int:
        if self.form == SORTED:
            return int(_table(size, self.seed, *keys)[index])
        rounds = round_keys(self.seed, *keys)
        while (index := feistel(index, size, rounds)) >= size:
            pass
        return index


@lru_cache(maxsize=64)
def _table(size: int, seed: int, *keys: str | int) -> np.ndarray:
    return np.argsort(rng_for(seed, *keys).bit_generator.random_raw(size), kind="stable")


@lru_cache(maxsize=1024)
def round_keys(seed: int, *keys: str | int) -> tuple[tuple[int, int], ...]:
    # Raw Philox words, because NumPy keeps those the same from release to release.
    words = rng_for(seed, *keys).bit_generator.random_raw((NUM_ROUNDS, 2)).tolist()
    return tuple((one, other) for one, other in words)


def feistel(index: Index, size: int, rounds: Sequence[tuple[int, int]]) -> Index:
    """A keyed bijection of [0, rows * columns), which holds [0, size) and hardly more: repeated until the result is
    below `size`, it is one of [0, size) (cycle walking).

    A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 5) whose
    round function is SplitMix64's finaliser. `index`: an int, or an array of uint64.
    """
    columns = isqrt(size - 1) + 1
    rows = -(-size // columns)
    row, column = index // columns, index % columns
    for one, other in rounds:
        row = (row + _mixed(column ^ one)) % rows
        column = (column + _mixed(row ^ other)) % columns
    return row * columns + column


def _mixed(word: Index) -> Index:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def positions_of(
    update: int, rank: int, world_size: int, *, global_batch_size: int, micro_batch_size: int
) -> list[range]:
    """The positions that `rank` takes at `update`, one range per micro-step.

    Update u covers positions [u * global_batch_size, (u + 1) * global_batch_size), cut into micro-batches that are
    dealt out in turn: the micro-batches are the same for every legal world size.
    """
    start = update * global_batch_size
    num_micro = global_batch_size // micro_batch_size
    firsts = [start + micro * micro_batch_size for micro in range(rank, num_micro, world_size)]
    return [range(first, first + micro_batch_size) for first in firsts]
