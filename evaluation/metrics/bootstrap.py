"""The 95 % interval of a mean over images."""

import numpy as np

from infra.seeding import rng_for


def bootstrap_interval(differences: np.ndarray, *, seed: int = 0, num_resamples: int = 10_000) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the mean of resampled images (Efron 1979): the 95 % interval of the mean.

    `differences`: float64 (num_images,). Equal `seed` and num_images give equal resamples, so metrics stay paired.
    """
    num_images = len(differences)
    rng = rng_for(seed, "bootstrap")
    rows = max(1, 4_000_000 // num_images)  # caps the index table at 32 MB
    means = [
        differences[rng.integers(num_images, size=(min(rows, num_resamples - start), num_images))].mean(axis=1)
        for start in range(0, num_resamples, rows)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
