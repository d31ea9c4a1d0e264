"""How much an output changes with the noise sample: G-STD of scores, L-STD of pixels (docs/metrics.md)."""

from collections.abc import Iterable

import cv2
import numpy as np

from evaluation.metrics import CROP_BORDER
from infra.errors import DataError


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
    _require_two_runs(scores.shape[1])
    if not np.isfinite(scores).all():
        image, run = np.argwhere(~np.isfinite(scores))[0]
        raise DataError(
            "a score is missing or not finite",
            where=f"image {image}, run {run}",
            todo="score every run of every image, or leave the image out",
        )
    # Relative to the first run, because a mean of equal numbers may round away from them.
    return float(np.std(scores - scores[:, :1], axis=1).mean())


def l_std(runs: Iterable[np.ndarray], *, crop_border: int = CROP_BORDER) -> float:
    """Local stability of one image (CCSR paper, Eq. 5): the population std of each pixel over the runs, averaged.

    `runs`: uint8 RGB (num_runs, H, W, 3) or an iterable of (H, W, 3). The mean is over pixels and the three channels
    of values in [0, 1], `crop_border` px cut from every side; a set's L-STD is the mean over its images.
    Raises DataError for fewer than two runs, unlike sizes and other shapes or dtypes.
    """
    accumulator = StabilityAccumulator(crop_border=crop_border)
    for run in runs:
        accumulator.add(run)
    return accumulator.l_std()


class StabilityAccumulator:
    """L-STD and the stability map of one image from runs that come one at a time or in parts (`merge`).

    It keeps per pixel the sums of the values and of their squares in float64. Of 8-bit values these are exact
    integers, so order and grouping change no bit and identical runs give exactly 0: no Welford update is needed.
    """

    def __init__(self, *, crop_border: int = CROP_BORDER) -> None:
        if crop_border < 0:
            raise DataError(f"crop_border is {crop_border}", where="crop_border", todo="give a number of at least 0")
        self.crop_border = crop_border
        self.count = 0
        self._sums = np.zeros((0, 0, 3))
        self._squares = np.zeros((0, 0, 3))

    def add(self, image: np.ndarray) -> None:
        """Take in one run, uint8 RGB (H, W, 3), of the size of the others."""
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(
                f"L-STD takes uint8 RGB images of shape (H, W, 3), not {found}",
                where=f"run {self.count}",
                todo="give the 8-bit image as it is saved",
            )
        if self.count == 0:
            if min(image.shape[:2]) <= 2 * self.crop_border:
                raise DataError(
                    f"a crop of {self.crop_border} px leaves nothing of {image.shape[0]} x {image.shape[1]}",
                    where="run 0",
                    todo="use larger images or a smaller crop_border",
                )
            self._sums, self._squares = np.zeros(image.shape), np.zeros(image.shape)
        self._require_size(image.shape)
        cv2.accumulate(image, self._sums)
        cv2.accumulateSquare(image, self._squares)
        self.count += 1

    def merge(self, other: "StabilityAccumulator") -> None:
        """Take in all runs of `other`, which stays as it is."""
        if other.count == 0:
            return
        if self.count == 0:
            self._sums, self._squares = np.zeros_like(other._sums), np.zeros_like(other._squares)
        self._require_size(other._sums.shape)
        self._sums += other._sums
        self._squares += other._squares
        self.count += other.count

    def l_std(self) -> float:
        """Mean over the pixels inside the border and the channels, of values in [0, 1]. Needs two runs."""
        border, (height, width) = self.crop_border, self._sums.shape[:2]
        inside = np.s_[border : height - border, border : width - border]
        return float(self._std(self._sums[inside], self._squares[inside]).mean())

    def map(self) -> np.ndarray:
        """The std of every pixel averaged over the channels: float32 (H, W) in [0, 0.5], border included."""
        return self._std(self._sums, self._squares).mean(axis=2, dtype=np.float64).astype(np.float32)

    def _std(self, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
        _require_two_runs(self.count)
        return np.sqrt(self.count * squares - sums * sums) / (255 * self.count)

    def _require_size(self, shape: tuple[int, ...]) -> None:
        if shape != self._sums.shape:
            raise DataError(
                "the runs of one image differ in size",
                where=f"run {self.count}: {shape[:2]}, runs before it: {self._sums.shape[:2]} (height, width)",
                todo="make all runs of an image with the same model and scale",
            )


def _require_two_runs(num_runs: int) -> None:
    if num_runs < 2:
        raise DataError(
            f"stability needs at least 2 runs, not {num_runs}",
            where="number of runs",
            todo="restore every image with 2 or more seeds (the paper uses 10)",
        )
