"""Noise on planes (float32 (3, H, W) in [0, 1]) from seeds: random 16-bit numbers look up quantiles; works in place."""

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch

Step = dict[str, Any]
# torchvision's grey weights (Real-ESRGAN's Poisson noise) and OpenCV's (BSRGAN's)
_TORCHVISION_GRAY = (0.2989, 0.587, 0.114)
_OPENCV_GRAY = (0.299, 0.587, 0.114)
_POISSON_BITS = 12
_CHUNK = 1 << 16
# From this rate on, rounded Cornish-Fisher quantiles keep Poisson's distribution function to 3e-4.
_LARGE_RATE = 64


def gaussian(planes: np.ndarray, step: Step) -> np.ndarray:
    """Add noise of `sigma` / 255, grey or per channel, or mixed by a 3 x 3 matrix; times the image if `speckle`; clip.

    A value is one of 65,536 equiprobable ones, the largest 4.3 sigma.
    """
    height, width = planes.shape[1:]
    mixing = step.get("mixing")
    scale = 1.0 if mixing else step["sigma"] / 255
    shape = (1 if step.get("gray") else 3, height, width)
    field = _field(step["seed"], _normal_quantiles() * np.float32(scale), shape)
    if mixing:
        first, second, third = field
        field = np.stack([a * first + b * second + c * third for a, b, c in np.array(mixing, np.float32)])
    if step.get("speckle"):
        field = field * planes
    return _add(planes, field)


def poisson(planes: np.ndarray, step: Step) -> np.ndarray:
    """Add Poisson noise to 8-bit levels, per channel or (`gray`) that of the luma on all three; clip.

    With `scale` (Real-ESRGAN): `scale` times the noise, whose photons per unit are the power of two not under the
    number of distinct levels. With `photons` (BSRGAN): that many photons, and the image itself is rounded too.
    """
    levels = to_levels(planes)
    if "photons" in step:
        np.multiply(levels, np.float32(1 / 255), out=planes)
    source = levels
    if step["gray"]:
        source = to_levels(_luma(planes, _OPENCV_GRAY if "photons" in step else _TORCHVISION_GRAY))
    if "photons" in step:
        return _add(planes, _field(step["seed"], poisson_quantiles(step["photons"]), source.shape, source))
    histogram = cv2.calcHist([source.reshape(-1, source.shape[2])], [0], None, [256], [0, 256])
    distinct = np.count_nonzero(histogram)
    field = _field(step["seed"], _common_quantiles(int(distinct - 1).bit_length()), source.shape, source)
    field *= np.float32(step["scale"])
    return _add(planes, field)


def to_levels(planes: np.ndarray) -> np.ndarray:
    """[0, 1] float32 (C, H, W) to uint8, clipped, halves to even."""
    levels = np.empty(planes.shape, np.uint8)
    for plane, out in zip(planes, levels, strict=True):
        cv2.convertScaleAbs(np.maximum(plane, 0), dst=out, alpha=255)
    return levels


def _add(planes: np.ndarray, field: np.ndarray) -> np.ndarray:
    planes += field
    return np.clip(planes, 0, 1, out=planes)


def _luma(planes: np.ndarray, weights: tuple[float, float, float]) -> np.ndarray:
    red, green, blue = weights
    return (red * planes[0] + green * planes[1] + blue * planes[2])[None]


def _field(seed: int, table: np.ndarray, shape: tuple[int, ...], levels: np.ndarray | None = None) -> np.ndarray:
    """Random entries of `table` (65536,), or of each pixel's row where `levels` picks one of 256; float32 `shape`.

    In chunks: their index stays in the cache.
    """
    field, stream = np.empty(shape, np.float32), np.random.SFC64(seed)
    flat = field.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        words = stream.random_raw(-(-part.size // 4)).astype("<u8", copy=False)
        index = words.view("<u2")[: part.size].astype(np.int64)
        if levels is not None:
            index >>= 16 - _POISSON_BITS
            index |= levels.reshape(-1)[start : start + _CHUNK].astype(np.int64) << _POISSON_BITS
        np.take(table, index, out=part, mode="clip")
    return field


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    middle = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    values = torch.special.ndtri(middle).numpy()
    return (values / values.std()).astype(np.float32)


@lru_cache(maxsize=9)
def _common_quantiles(log2_photons: int) -> np.ndarray:
    return poisson_quantiles(2**log2_photons)


def poisson_quantiles(photons: float) -> np.ndarray:
    """(256 * 4096,) float32: for each level n, 4096 equiprobable values of Poisson(n/255 photons)/photons - n/255."""
    rate = np.arange(256) / 255 * photons
    middle = (torch.arange(1 << _POISSON_BITS, dtype=torch.float64) + 0.5) / (1 << _POISSON_BITS)
    z = torch.special.ndtri(middle).numpy().astype(np.float32)
    root = np.sqrt(rate).astype(np.float32)[:, None]
    # Cornish and Fisher (1938), to the second order in 1 / root, around the rate
    noise = np.rint(root * z + ((z**2 - 1) / 6 + rate[:, None].astype(np.float32)))
    exact = np.searchsorted(rate, _LARGE_RATE)
    count = np.arange(2 * _LARGE_RATE + 20)
    log_factorial = np.append(0, np.cumsum(np.log(count[1:])))
    with np.errstate(divide="ignore"):
        log_pmf = count * np.log(rate[1:exact, None]) - rate[1:exact, None] - log_factorial
    for level, cdf in enumerate(np.cumsum(np.exp(log_pmf), axis=1), start=1):
        noise[level] = np.searchsorted(cdf, middle.numpy())
    noise[0] = 0
    noise -= rate[:, None].astype(np.float32)
    noise /= np.float32(photons)
    return noise.ravel()
