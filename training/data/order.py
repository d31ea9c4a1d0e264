"""Which sample is at which position of the training stream, and which rank takes it: pure functions of integers."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from infra.errors import ConfigError
from infra.seeding import rng_for


@dataclass(frozen=True)
class Order:
    """The endless stream over one or several sets of `sizes` samples, numbered through all sets in turn.

    A set of n samples and weight w takes round(w * n) slots of every epoch, and an epoch is a true permutation of all
    slots. A set's slots walk through an endless row of permutations of that set: with weight 1 every sample stands
    exactly once in an epoch, with 2 twice, with 0.5 (of an even n) once in two. ConfigError for a set without a slot.
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...]

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

    def sample_at(self, position: int) -> tuple[int, int]:
        """(epoch, sample) of the `position`-th sample seen since the run began."""
        epoch, offset = divmod(position, sum(self.slots))
        return epoch, int(_epoch(self, epoch)[offset])


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> np.ndarray:
    samples, first = [], 0
    for number, (size, count) in enumerate(zip(order.sizes, order.slots, strict=True)):
        stretch = np.arange(size) if count == size else _stretch(order.seed, number, size, epoch * count, count)
        samples.append(first + stretch)
        first += size
    return np.concatenate(samples)[_permutation(sum(order.slots), order.seed, "order", epoch)]


def _stretch(seed: int, number: int, size: int, start: int, count: int) -> np.ndarray:
    """`count` samples from place `start` on in the row of permutations of set `number`."""
    first, last = start // size, (start + count - 1) // size
    laps = [_permutation(size, seed, "order", "set", number, lap) for lap in range(first, last + 1)]
    return np.concatenate(laps)[start - first * size :][:count]


def _permutation(size: int, seed: int, *keys: str | int) -> np.ndarray:
    # Sorting raw Philox words, because NumPy keeps those (unlike `permutation`) the same from release to release.
    return np.argsort(rng_for(seed, *keys).bit_generator.random_raw(size), kind="stable")


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
