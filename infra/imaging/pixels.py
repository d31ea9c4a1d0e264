"""What validation during training and the evaluation both measure of 8-bit RGB images: PSNR-Y and L-STD."""

import math
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from infra.errors import DataError

CROP_BORDER = 4
COLORMAP = cv2.COLORMAP_VIRIDIS
_TOLERANCE = 1e-3  # of the gradient energy, relative
_MAX_SIGMA_PX = 64.0
MAP_TOP = 0.1  # std of values in [0, 1]: one scale, so that maps of several runs and steps compare
LUMA = np.array([[65.481, 128.553, 24.966]])  # of RGB / 255, on the 16..235 scale (ITU-R BT.601 studio swing)


def psnr_y(sr: np.ndarray, gt: np.ndarray, *, crop_border: int = CROP_BORDER) -> float:
    """Peak signal-to-noise ratio of the unrounded luma, in dB; 80 for identical images.

    `sr`, `gt`: uint8 RGB (H, W, 3) of one shape; `crop_border` px are cut from every side first. Luma Y is BT.601
    studio swing in [0, 1]; 10 log10(1 / (MSE + 1e-8)), pyiqa's `psnr` with `color_space='ycbcr'`.
    Raises DataError for any other shape or dtype.
    """
    sr, gt = cropped_pair(sr, gt, crop_border)
    # Luma is linear: one transform of the difference instead of two of the images.
    difference = cv2.transform(cv2.subtract(sr, gt, dtype=cv2.CV_64F), LUMA / 255**2)
    return -10 * math.log10(cv2.norm(difference, cv2.NORM_L2SQR) / difference.size + 1e-8)


def cropped(image: np.ndarray, crop_border: int, name: str) -> np.ndarray:
    """`image` without `crop_border` px on every side, after checking that it is uint8 RGB (H, W, 3)."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(
            f"a metric takes uint8 RGB images of shape (H, W, 3), not {found}",
            where=name,
            todo="score the 8-bit image as it is saved",
        )
    height, width = image.shape[:2]
    if crop_border < 0 or min(height, width) <= 2 * crop_border:
        raise DataError(
            f"a crop of {crop_border} px leaves nothing of {height} x {width}",
            where=name,
            todo="use larger images or a smaller, non-negative crop_border",
        )
    return image[crop_border : height - crop_border, crop_border : width - crop_border]


def cropped_pair(sr: np.ndarray, gt: np.ndarray, crop_border: int) -> tuple[np.ndarray, np.ndarray]:
    """Both images `cropped`. DataError where they differ in size."""
    pair = cropped(sr, crop_border, "first image"), cropped(gt, crop_border, "second image")
    if sr.shape != gt.shape:
        raise DataError(
            "the two images differ in size",
            where=f"{sr.shape[0]} x {sr.shape[1]} against {gt.shape[0]} x {gt.shape[1]} px (height x width)",
            todo="pair each output with its own ground truth at the same scale",
        )
    return pair


def coloured(stds: np.ndarray, top: float = MAP_TOP) -> np.ndarray:
    """A stability map for people, uint8 RGB (H, W, 3): dark blue where `stds`, float (H, W), is 0, yellow at `top`."""
    levels = np.rint(np.clip(stds / top, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, COLORMAP)[..., ::-1])


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
        require_two_runs(self.count)
        return np.sqrt(self.count * squares - sums * sums) / (255 * self.count)

    def _require_size(self, shape: tuple[int, ...]) -> None:
        if shape != self._sums.shape:
            raise DataError(
                "the runs of one image differ in size",
                where=f"run {self.count}: {shape[:2]}, runs before it: {self._sums.shape[:2]} (height, width)",
                todo="make all runs of an image with the same model and scale",
            )


def require_two_runs(num_runs: int) -> None:
    """DataError for a stability over fewer than two runs."""
    if num_runs < 2:
        raise DataError(
            f"stability needs at least 2 runs, not {num_runs}",
            where="number of runs",
            todo="restore every image with 2 or more seeds (the paper uses 10)",
        )


def luma(image: np.ndarray) -> np.ndarray:
    """Unrounded BT.601 luma of uint8 RGB (H, W, 3) without its offset: float64 (H, W), 0..219."""
    return cv2.transform(image.astype(np.float64), LUMA / 255)


def grey_levels(image: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) -> float32 (H, W), rounded to whole levels, 0..255."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


def gradient_energy(plane: np.ndarray, crop_border: int = 0) -> float:
    """Mean squared difference of horizontal neighbours plus that of vertical ones, of a float (H, W) plane.

    Of `grey_levels` below about 4 a picture is flat (sky, wall); most photographs have 50 to 2000.
    """
    height, width = plane.shape
    inside = plane[crop_border : height - crop_border, crop_border : width - crop_border]
    pairs = (inside[1:], inside[:-1]), (inside[:, 1:], inside[:, :-1])
    return sum(cv2.norm(a, b, cv2.NORM_L2SQR) / a.size for a, b in pairs if a.size)


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
        """Mean energy of the low-passed runs less bicubic's, in parts of that."""
        energies = [gradient_energy(_low_passed(plane, sigma), crop_border) for plane in planes]
        return (sum(energies) / len(energies) - target) / max(target, 1e-12)

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
