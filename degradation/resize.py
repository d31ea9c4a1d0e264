"""Resampling of planes (float32 (3, H, W)): PyTorch's, OpenCV's and MATLAB's modes as one weighted sum of pixels."""

from functools import lru_cache

import cv2
import numpy as np
import torch

Taps = tuple[np.ndarray, np.ndarray]


def resize(planes: np.ndarray, height: int, width: int, mode: str, factor: float | None = None) -> np.ndarray:
    """(3, height, width) float32, not clipped; no mode but "imresize" filters before it samples.

    "bilinear", "bicubic" (a = -0.75): PyTorch's interpolate without antialiasing, OpenCV's to 1e-5. With `factor`,
    positions are (i + 0.5) / factor - 0.5, as interpolate(scale_factor=factor) has them: what the size's rounding
    down cuts off at the right and bottom is lost (the published chains' drift). Without, the ratio of sizes counts.
    "adaptive": PyTorch's adaptive average pooling. "area": the mean over exact areas, OpenCV's INTER_AREA.
    "imresize": MATLAB's antialiased bicubic (a = -0.5) with mirrored borders.
    """
    # Where a factor just over 1 leaves the size, PyTorch copies in the bilinear mode but samples in the bicubic one.
    if planes.shape[1:] == (height, width) and (factor is None or mode == "bilinear"):
        return planes
    rows = _weighted_rows(planes, resize_taps(planes.shape[1], height, mode, factor))
    return _transpose(_weighted_rows(_transpose(rows), resize_taps(planes.shape[2], width, mode, factor)))


def _weighted_rows(planes: np.ndarray, taps: Taps) -> np.ndarray:
    """Each output row as a weighted sum of rows, for all planes at once.

    PyTorch's embedding bag is such a sum, vectorised, and its rows do not depend on the number of threads. OpenCV's
    resize may leave float32 to IPP, whose tiles, and with them the last bits, follow the number of threads.
    """
    index, weight = taps
    count, height, width = planes.shape
    target, num_taps = index.shape
    bags = (np.arange(count)[:, None, None] * height + index).reshape(count * target, num_taps)
    table = torch.from_numpy(np.ascontiguousarray(planes)).view(count * height, width)
    sums = torch.nn.functional.embedding_bag(
        torch.from_numpy(bags), table, mode="sum", per_sample_weights=torch.from_numpy(np.tile(weight, (count, 1)))
    )
    return sums.view(count, target, width).numpy()


def _transpose(planes: np.ndarray) -> np.ndarray:
    out = np.empty((planes.shape[0], planes.shape[2], planes.shape[1]), np.float32)
    for plane, result in zip(planes, out, strict=True):
        cv2.transpose(plane, dst=result)
    return out


@lru_cache(maxsize=64)
def resize_taps(size: int, target: int, mode: str, factor: float | None) -> Taps:
    """(target, taps) int64 index and float32 weight of the pixels that each of `target` outputs sums."""
    output, ratio = np.arange(target)[:, None], size / target
    window = np.arange(int(np.ceil(ratio)) + 1)
    if mode == "adaptive":
        pixel = output * size // target + window
        weight = (pixel * target < (output + 1) * size).astype(np.float64)
    elif mode == "area":
        pixel = (output * ratio).astype(int) + window
        weight = np.minimum(pixel + 1, (output + 1) * ratio) - np.maximum(pixel, output * ratio)
    elif mode == "imresize":
        centre, stretch = (output + 0.5) * ratio - 0.5, max(ratio, 1)
        pixel = np.floor(centre - 2 * stretch).astype(int) + np.arange(4 * window.size)
        weight = _cubic((pixel - centre) / stretch, -0.5)
    else:
        # Positions in float32, as PyTorch computes them: in float64 its results would be missed by up to 5e-5.
        step = np.float32(ratio if factor is None else 1 / factor)
        centre = step * (output.astype(np.float32) + np.float32(0.5)) - np.float32(0.5)
        pixel = np.floor(centre).astype(int) + np.arange(-1, 3)
        distance = pixel - centre.astype(np.float64)
        weight = _cubic(distance, -0.75) if mode == "bicubic" else 1 - np.abs(distance)
    weight = np.maximum(weight, 0) if mode in ("area", "bilinear") else weight
    used = weight.any(axis=0)
    pixel, weight = pixel[:, used], weight[:, used]
    if mode == "imresize":
        pixel = pixel % (2 * size)
        pixel = np.minimum(pixel, 2 * size - 1 - pixel)
    weight = weight / weight.sum(axis=1, keepdims=True)
    return np.clip(pixel, 0, size - 1), weight.astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981)."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
