"""How much outputs change with the noise sample or from frame to frame: G-STD, L-STD at equal sharpness, flicker."""

import math
from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np

from evaluation.metrics.image import gradient_energy, luma
from infra.errors import DataError
from infra.pixels import CROP_BORDER, cropped_pair, l_std, require_two_runs

_TOLERANCE = 1e-3  # of the gradient energy, relative
_MAX_SIGMA_PX = 64.0


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


def l_std_equal_sharpness(runs: Sequence[np.ndarray], bicubic: np.ndarray, *, crop_border: int = CROP_BORDER) -> float:
    """L-STD of one image's runs once they are as sharp as its bicubic enlargement, so that blur cannot lower it.

    `runs`: uint8 RGB, each (H, W, 3) as `bicubic`. One Gaussian low-passes all runs; its sigma is found by bisection so
    that their mean gradient energy (see `sharpness`) is bicubic's. L-STD itself where the energies are equal; NaN where
    the runs are blurrier than bicubic, for nothing can give back what blur took. Errors as of `l_std`.
    """
    require_two_runs(len(runs))
    for run in runs:
        cropped_pair(run, bicubic, crop_border)
    target = gradient_energy(luma(bicubic), crop_border)
    planes = [luma(run).astype(np.float32) for run in runs]

    def excess(sigma: float) -> float:
        """Mean energy of the low-passed runs over bicubic's, less 1."""
        energies = [gradient_energy(_low_passed(plane, sigma), crop_border) for plane in planes]
        return sum(energies) / len(energies) / max(target, 1e-12) - 1

    low, high = 0.0, 0.5
    now = excess(low)
    if abs(now) <= _TOLERANCE:
        return l_std(runs, crop_border=crop_border)
    if now < 0:
        return math.nan
    while excess(high) > 0 and high < _MAX_SIGMA_PX:
        low, high = high, 2 * high
    sigma = high
    while abs(now) > _TOLERANCE and high - low > 1e-4 * high:
        sigma = (low + high) / 2
        now = excess(sigma)
        low, high = (sigma, high) if now > 0 else (low, sigma)
    first = runs[0].astype(np.float32)  # differences: equal runs give exactly 0
    changes = (_low_passed(run - first, sigma) for run in runs)
    sums, squares = np.zeros(first.shape), np.zeros(first.shape)
    for change in changes:
        cv2.accumulate(change, sums)
        cv2.accumulateSquare(change, squares)
    variance = np.maximum(len(runs) * squares - sums * sums, 0)
    height, width = first.shape[:2]
    inside = np.s_[crop_border : height - crop_border, crop_border : width - crop_border]
    return float(np.sqrt(variance[inside]).mean()) / (255 * len(runs))


def _low_passed(plane: np.ndarray, sigma: float) -> np.ndarray:
    if sigma == 0:
        return plane
    kernel = cv2.getGaussianKernel(2 * max(1, math.ceil(4 * sigma)) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(plane, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT)


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
