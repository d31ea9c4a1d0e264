"""How much outputs change with the noise sample or from frame to frame: G-STD of scores, flicker (docs/metrics.md)."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from infra.errors import DataError
from infra.imaging.pixels import CROP_BORDER, cropped_pair, require_two_runs


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


def temporal_std(
    frames: Sequence[np.ndarray], inputs: Sequence[np.ndarray], *, crop_border: int = CROP_BORDER
) -> float:
    """Flicker of a sequence: |(y[t+1] - y[t]) - (x[t+1] - x[t])|, averaged over pixels, channels and neighbours.

    `frames` y and `inputs` x, the LR frames enlarged to the same size: uint8 RGB (num_frames, H, W, 3); values in
    [0, 1], `crop_border` px cut from every side. 0 where outputs change exactly as their inputs do. It also counts
    detail that moves with the picture, so compare sequences of equal sharpness. DataError for fewer than two frames,
    unlike numbers and sizes.
    """
    if len(frames) < 2 or len(frames) != len(inputs):
        raise DataError(
            f"temporal_std takes as many inputs as frames, two or more, not {len(inputs)} and {len(frames)}",
            where="frames",
            todo="give one enlarged input per output",
        )
    residuals = [
        np.subtract(*cropped_pair(y, x, crop_border), dtype=np.int16) for y, x in zip(frames, inputs, strict=True)
    ]
    for residual in residuals:
        if residual.shape != residuals[0].shape:
            raise DataError("frames differ in size", where=f"{residual.shape}", todo="give frames of one size")
    changes = [np.abs(after - before).mean() for before, after in pairwise(residuals)]
    return float(np.mean(changes) / 255)
