"""All randomness: counter-based generators keyed by what the numbers are for, never by who draws them."""

import hashlib
import json
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from infra.process.memory import to_device

if TYPE_CHECKING:
    import torch


def rng_for(seed: int, *keys: str | int) -> np.random.Generator:
    """A Philox generator whose stream depends on `seed` and `keys` (their order and type included) alone.

    Streams of different keys are independent: the Philox key is a 128-bit BLAKE2b hash of all of them.
    """
    plain = [operator.index(seed), *(key if isinstance(key, str) else operator.index(key) for key in keys)]
    digest = hashlib.blake2b(json.dumps(plain).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Noise:
    """Standard normal noise whose row i comes from its own generator, so batching changes no number."""

    def __init__(self, generators: Sequence[np.random.Generator], device: "torch.device | str", dtype: "torch.dtype"):
        self._generators = generators
        self._device = device
        self._dtype = dtype

    def __call__(self, shape: Sequence[int]) -> "torch.Tensor":
        """The next draw: `shape` (B, ...) with B = number of keys, drawn in float32 on CPU, then moved and cast."""
        import torch

        if shape[0] != len(self._generators):
            raise ValueError(f"noise of shape {tuple(shape)} was asked for, but there are {len(self._generators)} keys")
        rows = [generator.standard_normal(tuple(shape[1:]), dtype=np.float32) for generator in self._generators]
        return to_device(torch.from_numpy(np.stack(rows)), self._device).to(self._dtype)


def noise_for(seed: int, keys: Sequence[tuple], device: "torch.device | str", dtype: "torch.dtype") -> Noise:
    """Noise for a batch: row i is drawn from `rng_for(seed, *keys[i])`, one draw after another."""
    return Noise([rng_for(seed, *key) for key in keys], device, dtype)
