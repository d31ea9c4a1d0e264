"""Pictures that look alike: a 64-bit hash of each, and the pairs of two lists that differ in a few bits."""

from collections.abc import Iterator
from itertools import pairwise

import cv2
import numpy as np

SIDE_PX = 32
FLAT = 2.0
NEAR_BITS = 6
COMPARED_AT_ONCE = 2**22


def perceptual_hash(image: np.ndarray) -> int:
    """pHash of uint8 RGB (H, W, 3): a bit per low frequency, 0 for a picture that is too flat to tell.

    The image is averaged down to 32 x 32 grey; bit i says whether the i-th of the 8 x 8 lowest DCT coefficients is
    above their median (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). Where that
    typical coefficient is under 2 grey levels, as in skies, the bits would be those of the noise.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8]
    if np.median(np.abs(low)) < FLAT:
        return 0
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def near_pairs(
    a: np.ndarray, b: np.ndarray, *, max_bits: int = NEAR_BITS, skip: np.ndarray | None = None
) -> Iterator[tuple[int, int, int]]:
    """(i, j, bits) of all hashes a[i] and b[j], uint64 (N,) and (M,), that differ in at most `max_bits`, by i then j;
    where `b` is `a`, of i < j alone. `skip`, bool (N,), which may change on the way: places of `a` to leave out.

    A hash of 0 says that nothing is known and is like no other. Hashes that differ in n bits are equal in one of n + 1
    bands of their bits at least, so only those are compared that share a band, some millions at a time.
    """
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    bands = [(np.uint64(start), np.uint64(2 ** int(end - start) - 1)) for start, end in pairwise(edges)]
    known_a, known_b = np.flatnonzero(a), np.flatnonzero(b)
    orders = [np.argsort(b[known_b] >> shift & mask, kind="stable") for shift, mask in bands]
    theirs = [(b[known_b] >> shift & mask)[order] for (shift, mask), order in zip(bands, orders, strict=True)]

    def spans(band: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each of these hashes' band is among the sorted ones, and how often."""
        shift, mask = bands[band]
        ours = a[known_a[places]] >> shift & mask
        first, last = (np.searchsorted(theirs[band], ours, side=side) for side in ("left", "right"))
        return first, last - first

    every = np.arange(len(known_a))
    blocks = np.cumsum(sum(spans(band, every)[1] for band in range(len(bands)))) // COMPARED_AT_ONCE
    for block in np.split(every, np.flatnonzero(np.diff(blocks)) + 1):
        if skip is not None:
            block = block[~skip[known_a[block]]]
        found = []
        for band in range(len(bands)):
            first, counts = spans(band, block)
            i = known_a[np.repeat(block, counts)]
            begins = first - (np.cumsum(counts) - counts)
            j = known_b[orders[band][np.arange(len(i)) + np.repeat(begins, counts)]]
            different = a[i] ^ b[j]
            bits = np.bitwise_count(different)
            near = bits <= max_bits
            if b is a:  # each pair once
                near &= i < j
            for shift, mask in bands[:band]:  # where the pair was found already
                near &= (different >> shift & mask) != 0
            found.append(np.stack([i[near], j[near], bits[near]]))
        pairs = np.concatenate(found, axis=1)
        yield from zip(*pairs[:, np.lexsort((pairs[1], pairs[0]))].tolist(), strict=True)
