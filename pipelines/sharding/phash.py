"""Pictures that look alike: a 64-bit hash of each, and the pairs of two lists that differ in a few bits."""

from collections.abc import Iterator

import cv2
import numpy as np

SIDE_PX = 32
FLAT = 2.0
NEAR_BITS = 6


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


def near_pairs(a: np.ndarray, b: np.ndarray, *, max_bits: int = NEAR_BITS) -> Iterator[tuple[int, int, int]]:
    """(i, j, bits) of all hashes a[i] and b[j], uint64 (N,) and (M,), that differ in at most `max_bits`, by i then j.

    A hash of 0 says that nothing is known and is like no other.
    """
    known = np.flatnonzero(b)
    step = max(1, 2**20 // max(1, len(known)))  # blocks that stay in the processor's cache
    for start in range(0, len(a), step):
        bits = np.bitwise_count(a[start : start + step, None] ^ b[known])
        for i, j in zip(*np.nonzero(bits <= max_bits), strict=True):
            if a[start + i]:
                yield start + int(i), int(known[j]), int(bits[i, j])
