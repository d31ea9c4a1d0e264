"""SSIM-Y, NIQE and sharpness of 8-bit RGB images, as the CCSR paper computes them (docs/metrics.md)."""

import math
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from infra.errors import DataError
from infra.imaging.pixels import CROP_BORDER, cropped, cropped_pair, gradient_energy, luma

_SSIM_KERNEL = cv2.getGaussianKernel(11, 1.5, cv2.CV_64F)
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Luma of integer RGB as an exact fraction (numerators, denominator, offset): halves round as the recipes say.
YIQ = np.array([[299.0, 587.0, 114.0]]), 1000, 0  # full swing, 0..255
BT601 = np.array([[65481.0, 128553.0, 24966.0]]), 255_000, 16  # studio swing, 16..235
_NIQE_BLOCK = 96
# Mean and covariance of pristine photographs as BasicSR 1.4.2 publishes them (Apache-2.0), unchanged; estimated by
# the authors of NIQE (Mittal, Soundararajan, Bovik 2013).
_NIQE_PRISTINE = Path(__file__).with_name("niqe_pris_params.npz")
_NIQE_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))


def ssim_y(sr: np.ndarray, gt: np.ndarray, *, crop_border: int = CROP_BORDER) -> float:
    """Structural similarity of the rounded luma (Wang et al. 2004, doi:10.1109/TIP.2003.819861), at most 1.

    11x11 Gaussian window of sigma 1.5, 'valid' area, biased moments, no down-sampling, contrast-structure term
    clipped at 0 (pyiqa). Arguments and errors as for `psnr_y`; both sides must keep 11 px after the crop.
    """
    sr, gt = cropped_pair(sr, gt, crop_border)
    if min(sr.shape[:2]) < 11:
        raise DataError(
            f"SSIM needs 11 px on both sides, but {sr.shape[0]} x {sr.shape[1]} are left",
            where=f"image after a crop of {crop_border} px",
            todo="use larger images or leave ssim_y out",
        )
    return ssim_of_luma(rounded_luma(sr, *BT601), rounded_luma(gt, *BT601))


def ssim_of_luma(x: np.ndarray, y: np.ndarray) -> float:
    mean_x, mean_y, mean_xy = _window_mean(x), _window_mean(y), _window_mean(x * y)
    squares = _window_mean(x * x + y * y)  # only the sum of the two variances is needed
    product, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    contrast = (2 * (mean_xy - product) + _SSIM_C2) / (squares - mean_squares + _SSIM_C2)
    luminance = (2 * product + _SSIM_C1) / (mean_squares + _SSIM_C1)
    return float(np.mean(luminance * np.maximum(contrast, 0)))


def sharpness(sr: np.ndarray, reference: np.ndarray, *, crop_border: int = CROP_BORDER) -> float:
    """Mean gradient energy of `sr` over that of `reference`: 1 is as sharp, below 1 blurrier, above 1 busier.

    Energy of an image: the mean squared difference of horizontally neighbouring luma values plus that of vertically
    neighbouring ones. It is shown beside L-STD because blur lowers L-STD too. Arguments and errors as for `psnr_y`
    (the reference is the ground truth, or the bicubic image where there is none). NaN if the reference is flat.
    """
    sr, reference = cropped_pair(sr, reference, crop_border)
    of_reference = gradient_energy(luma(reference))
    return gradient_energy(luma(sr)) / of_reference if of_reference > 0 else math.nan


def niqe(sr: np.ndarray, *, crop_border: int = CROP_BORDER) -> float:
    """Natural image quality evaluator (Mittal et al. 2013, doi:10.1109/LSP.2012.2227726); lower is better.

    `sr`: uint8 RGB (H, W, 3). Rounded full-swing luma (YIQ: 0.299 R + 0.587 G + 0.114 B), as in the CCSR paper's tables
    and pyiqa; 96 px blocks at two scales, the published pristine parameters.
    Raises DataError where no two blocks can be described: a side under 96 px, none of 192 px, or flat blocks.
    """
    return _niqe(sr, crop_border, YIQ)


def niqe_bt601(sr: np.ndarray, *, crop_border: int = CROP_BORDER) -> float:
    """`niqe` on rounded BT.601 luma (BasicSR, MATLAB): 0.12 to 0.36 higher, not the published tables' number."""
    return _niqe(sr, crop_border, BT601)


def _niqe(sr: np.ndarray, crop_border: int, weights: tuple[np.ndarray, int, int]) -> float:
    plane = rounded_luma(cropped(sr, crop_border, "image"), *weights)
    rows, columns = (side // _NIQE_BLOCK for side in plane.shape)
    if rows * columns < 2:
        raise DataError(
            f"NIQE needs two blocks of 96 px, but {plane.shape[0]} x {plane.shape[1]} px are left",
            where=f"image after a crop of {crop_border} px",
            todo="use larger images or leave niqe out",
        )
    plane = plane[: rows * _NIQE_BLOCK, : columns * _NIQE_BLOCK]
    features = np.hstack([_niqe_features(plane, _NIQE_BLOCK), _niqe_features(_halved(plane), _NIQE_BLOCK // 2)])
    described = features[~np.isnan(features).any(axis=1)]
    if len(described) < 2:
        raise DataError(
            "NIQE found fewer than two textured blocks of 96 px",
            where=f"image of {sr.shape[0]} x {sr.shape[1]} px",
            todo="leave niqe out for flat images",
        )
    pristine_mean, pristine_covariance = _niqe_pristine()
    distance = np.nanmean(features, axis=0) - pristine_mean
    covariance = (pristine_covariance + np.cov(described, rowvar=False)) / 2
    return math.sqrt(distance @ np.linalg.pinv(covariance) @ distance)


def rounded_luma(image: np.ndarray, weights: np.ndarray, divisor: int, offset: int) -> np.ndarray:
    """Luma levels, rounded half to even, float64 (H, W). Products and sums are exact integers in float64."""
    return np.rint(cv2.transform(image.astype(np.float64), weights) / divisor + offset)


def _window_mean(plane: np.ndarray) -> np.ndarray:
    return cv2.sepFilter2D(plane, -1, _SSIM_KERNEL, _SSIM_KERNEL)[5:-5, 5:-5]


@cache
def _niqe_pristine() -> tuple[np.ndarray, np.ndarray]:
    with np.load(_NIQE_PRISTINE) as published:
        return published["mu_pris_param"][0], published["cov_pris_param"]


@cache
def _shape_grid() -> tuple[np.ndarray, ...]:
    """Generalised Gaussian shapes 0.2, 0.201, ... 10, the midpoints of their moment ratios, and two gamma ratios."""
    shapes = 0.2 + 0.001 * np.arange(9801)
    gamma1, gamma2, gamma3 = (np.array([math.gamma(k / shape) for shape in shapes]) for k in (1, 2, 3))
    ratios = gamma2**2 / (gamma1 * gamma3)  # increases with the shape
    return shapes, (ratios[1:] + ratios[:-1]) / 2, np.sqrt(gamma1 / gamma3), gamma2 / gamma1


def _asymmetric_gaussian(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Moment fit of (n, pixels) samples: shape, mean, left and right scale, each (n,) (Lasmar et al. 2009)."""
    negative, positive = np.minimum(blocks, 0), np.maximum(blocks, 0)
    left_energy, right_energy = np.einsum("ij,ij->i", negative, negative), np.einsum("ij,ij->i", positive, positive)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt(left_energy / np.count_nonzero(blocks < 0, axis=1))
        right = np.sqrt(right_energy / np.count_nonzero(blocks > 0, axis=1))
        ratio = left / right
        absolute = (positive.sum(axis=1) - negative.sum(axis=1)) / blocks.shape[1]
        moments = absolute**2 / ((left_energy + right_energy) / blocks.shape[1])
        moments *= (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shapes, midpoints, scale, mean = _shape_grid()
    # A flat block has no ratio; the published argmin then returns the first shape.
    nearest = np.where(np.isnan(moments), 0, np.searchsorted(midpoints, moments))
    left, right = left * scale[nearest], right * scale[nearest]
    return shapes[nearest], (right - left) * mean[nearest], left, right


def _niqe_features(plane: np.ndarray, block: int) -> np.ndarray:
    """The 18 features of every `block` x `block` part of `plane`, whose sides are multiples of it: (num_blocks, 18)."""
    kernel = cv2.getGaussianKernel(7, 7 / 6, cv2.CV_64F)
    mean, mean_square = (
        cv2.sepFilter2D(plane, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE) for plane in (plane, plane * plane)
    )
    contrast = (plane - mean) / (np.sqrt(np.abs(mean_square - mean * mean)) + 1)
    contrast[np.abs(contrast) < 1e-9] = 0  # rounding noise of flat areas has no sign to count
    rows, columns = plane.shape[0] // block, plane.shape[1] // block
    blocks = contrast.reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)
    shape, _, left, right = _asymmetric_gaussian(blocks.reshape(len(blocks), -1))
    features = [shape, (left + right) / 2]
    for shift in _NIQE_SHIFTS:
        neighbours = blocks * np.roll(blocks, shift, axis=(1, 2))
        features.extend(_asymmetric_gaussian(neighbours.reshape(len(blocks), -1)))
    return np.stack(features, axis=1)


def _halved(plane: np.ndarray) -> np.ndarray:
    """Bicubic (a = -0.5) down-sampling by 2 with antialiasing and mirrored borders, as MATLAB's imresize."""
    distance = np.abs(np.arange(8) - 3.5) / 2
    inner = (1.5 * distance - 2.5) * distance**2 + 1
    outer = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    kernel = np.where(distance < 1, inner, outer)
    kernel /= kernel.sum()
    # Output pixel i covers inputs 2i-3 .. 2i+4.
    return cv2.sepFilter2D(plane, -1, kernel, kernel, anchor=(3, 3), borderType=cv2.BORDER_REFLECT)[::2, ::2]
