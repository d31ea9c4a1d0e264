"""Which sample stands at which position of the training stream, and who takes it: pure functions of integers."""

from functools import lru_cache

import numpy as np

from infra.seeding import rng_for


def sample_at(position: int, num_samples: int, seed: int) -> tuple[int, int]:
    """(epoch, sample) of the `position`-th sample seen since the run began; each epoch is a true permutation."""
    epoch, offset = divmod(position, num_samples)
    return epoch, int(_permutation(epoch, num_samples, seed)[offset])


@lru_cache(maxsize=2)
def _permutation(epoch: int, num_samples: int, seed: int) -> np.ndarray:
    # Sorting raw Philox words, because NumPy keeps those (unlike `permutation`) the same from release to release.
    words = rng_for(seed, "order", epoch).bit_generator.random_raw(num_samples)
    return np.argsort(words, kind="stable")


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


def legal_world_sizes(global_batch_size: int, micro_batch_size: int) -> list[int]:
    """The divisors of global_batch_size / micro_batch_size; none if that is not whole."""
    num_micro, rest = divmod(global_batch_size, micro_batch_size)
    return [] if rest else [size for size in range(1, num_micro + 1) if num_micro % size == 0]
