"""How much an output changes with the noise sample: G-STD of scores (docs/metrics.md)."""

import numpy as np

from infra.errors import DataError
from infra.pixels import require_two_runs


def g_std(scores: np.ndarray) -> float:
    """Global stability (CCSR paper, Eq. 4): the population std of each image's scores over its runs, averaged.

    `scores`: float (num_images, num_runs) of one metric; the result is in that metric's unit. Identical runs give
    exactly 0. Raises DataError for fewer than two runs and for scores that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] == 0:
        raise DataError(
            f"G-STD takes scores of shape (num_images, num_runs), not {scores.shape}",
            where="scores",
            todo="give one row per image and one column per run",
        )
    require_two_runs(scores.shape[1])
    if not np.isfinite(scores).all():
        image, run = np.argwhere(~np.isfinite(scores))[0]
        raise DataError(
            "a score is missing or not finite",
            where=f"image {image}, run {run}",
            todo="score every run of every image, or leave the image out",
        )
    # Relative to the first run, because a mean of equal numbers may round away from them.
    return float(np.std(scores - scores[:, :1], axis=1).mean())
