"""Noise fields from a seed: a counter-free generator gives 16-bit numbers, quantile tables turn them into noise."""

from functools import lru_cache

import cv2
import numpy as np
import torch

# torchvision's grey weights (Real-ESRGAN's Poisson noise) and OpenCV's (BSRGAN's)
TORCHVISION_GRAY = (0.2989, 0.587, 0.114)
BSRGAN_GRAY = (0.299, 0.587, 0.114)
_POISSON_BITS = 12


def normal_field(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise, float32: 65,536 equiprobable values, the largest 4.3 sigma."""
    return np.take(_normal_quantiles(), _uint16(seed, shape))


def _uint16(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    words = np.random.SFC64(seed).random_raw(-(-count // 4))
    return words.astype("<u8", copy=False).view("<u2")[:count].reshape(shape)


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    middle = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    values = torch.special.ndtri(middle).numpy()
    return (values / values.std()).astype(np.float32)


def gaussian(planes: np.ndarray, step: dict) -> np.ndarray:
    """Add noise of `sigma` / 255, grey or per channel or mixed by a 3 x 3 matrix, times the image if `speckle`; clip."""
    height, width = planes.shape[1:]
    if "mixing" in step:
        field = normal_field(step["seed"], (3, height * width))
        field = (np.array(step["mixing"], np.float32) @ field).reshape(3, height, width)
    else:
        field = normal_field(step["seed"], (1 if step["gray"] else 3, height, width))
        field *= np.float32(step["sigma"] / 255)
    if step.get("speckle"):
        field = field * planes
    return np.clip(planes + field, 0, 1)


def poisson(planes: np.ndarray, step: dict) -> np.ndarray:
    """Add `scale` times Poisson noise whose photons per unit are a power of two from the content; clip (Real-ESRGAN)."""
    levels = to_levels(_luma(planes, TORCHVISION_GRAY) if step["gray"] else planes)
    distinct = np.count_nonzero(cv2.calcHist([levels.reshape(-1, 1)], [0], None, [256], [0, 256]))
    table = _poisson_quantiles(int(distinct - 1).bit_length())
    index = levels.astype(np.int32) << _POISSON_BITS
    index |= _uint16(step["seed"], levels.shape) >> (16 - _POISSON_BITS)
    noise = np.take(table, index)
    noise *= np.float32(step["scale"])
    return np.clip(planes + noise, 0, 1)


@lru_cache(maxsize=9)
def _poisson_quantiles(log2_photons: int) -> np.ndarray:
    """(256 * 4096,) float32: for each 8-bit level n/255, 4096 equiprobable values of Poisson(n/255 v)/v - n/255."""
    photons = 2**log2_photons
    rate = np.arange(256)[:, None] / 255 * photons
    count = np.arange(int(photons + 10 * photons**0.5 + 10))
    log_factorial = np.concatenate([[0], np.cumsum(np.log(count[1:]))])
    with np.errstate(divide="ignore", invalid="ignore"):
        log_pmf = np.where(rate > 0, count * np.log(rate) - rate, np.where(count == 0, 0, -np.inf)) - log_factorial
    cdf = np.cumsum(np.exp(log_pmf), axis=1)
    middle = (np.arange(1 << _POISSON_BITS) + 0.5) / (1 << _POISSON_BITS)
    counts = np.stack([np.searchsorted(row, middle) for row in cdf])
    return ((counts - rate) / photons).astype(np.float32).ravel()


def poisson_counts(planes: np.ndarray, step: dict) -> np.ndarray:
    """BSRGAN's Poisson noise: `photons` per unit of the 8-bit image, per channel or (`gray`) of its luma; clip."""
    levels = to_levels(planes)
    rounded = levels * np.float32(1 / 255)
    source = to_levels(_luma(rounded, BSRGAN_GRAY)) if step["gray"] else levels
    rate = np.arange(256) / 255 * step["photons"]
    drawn = np.random.Generator(np.random.SFC64(step["seed"])).poisson(rate[source])
    noise = (drawn / step["photons"]).astype(np.float32)
    if step["gray"]:
        noise = rounded + (noise - source * np.float32(1 / 255))
    return np.clip(noise, 0, 1)


def to_levels(planes: np.ndarray) -> np.ndarray:
    """[0, 1] float32 to uint8, clipped, halves to even."""
    return np.rint(np.clip(planes, 0, 1) * np.float32(255)).astype(np.uint8)


def _luma(planes: np.ndarray, weights: tuple[float, float, float]) -> np.ndarray:
    red, green, blue = (np.float32(w) for w in weights)
    return (planes[0] * red + planes[1] * green + planes[2] * blue)[None]
