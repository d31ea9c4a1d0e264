"""Blur kernels as the published chains define them, float64, each summing to 1."""

from functools import lru_cache
from typing import Any

import numpy as np


def _offsets(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.float64) - (size - 1) / 2


def bivariate(kind: str, size: int, sigma: tuple[float, float], theta: float = 0.0, beta: float = 1.0) -> np.ndarray:
    """(size, size) float64 Gaussian, generalised Gaussian or plateau kernel (Real-ESRGAN, Wang et al. 2021, sec. 3.2).

    `kind` begins with "generalized", "plateau" or neither; `sigma` (x, y) in px before the rotation by `theta` (rad).
    With q = vᵀ Sigma^-1 v: exp(-q/2), exp(-q^beta/2), 1/(1+q^beta).
    """
    x, y = np.meshgrid(_offsets(size), _offsets(size))
    cos, sin = np.cos(theta), np.sin(theta)
    q = ((cos * x + sin * y) / sigma[0]) ** 2 + ((cos * y - sin * x) / sigma[1]) ** 2
    if kind.startswith("plateau"):
        kernel = 1 / (1 + q**beta)
    elif kind.startswith("generalized"):
        kernel = np.exp(-0.5 * q**beta)
    else:
        kernel = np.exp(-0.5 * q)
    return kernel / kernel.sum()


def sinc(size: int, cutoff: float) -> np.ndarray:
    """(size, size) float64 circular low-pass w J1(w r) / (2 pi r), `cutoff` w in rad per px; negative lobes stay."""
    squared = (_offsets(size) ** 2).astype(int)
    squares, position = np.unique(squared[:, None] + squared, return_inverse=True)
    radius = np.sqrt(squares[1:])
    values = np.append(cutoff**2 / (4 * np.pi), cutoff * bessel_j1(cutoff * radius) / (2 * np.pi * radius))
    kernel = values[position].reshape(size, size)
    return kernel / kernel.sum()


def bessel_j1(x: np.ndarray) -> np.ndarray:
    """J1 of (n,) non-negative float64, to 1e-14 (PyTorch's is good to 5e-7 only).

    The midpoint rule on J1(x) = 1/pi times the integral of cos(t - x sin t) over 0 < t < pi, whose error falls
    faster than exponentially once the nodes number more than x / 2 (DLMF 10.9.2).
    """
    nodes = int(x.max() / 2) + 32
    t = (np.arange(nodes) + 0.5) * (np.pi / nodes)
    return np.cos(t - x[:, None] * np.sin(t)).mean(axis=1)


def truncated_gaussian(size: int, sigma: float) -> np.ndarray:
    """(size, size) float64 isotropic Gaussian; weights under eps of the largest are 0 (MATLAB's fspecial)."""
    squared = _offsets(size) ** 2
    kernel = np.exp(-(squared[:, None] + squared) / (2 * max(sigma, 1e-6) ** 2))
    kernel[kernel < np.finfo(np.float64).eps * kernel.max()] = 0
    return kernel / kernel.sum()


def shifted_gaussian(size: int, sigma: float, scale: int) -> np.ndarray:
    """`truncated_gaussian` moved by (scale - 1) / 2 px up and left, so that keeping every scale-th pixel stays centred.

    Bilinear, the sampling positions held inside the kernel (BSRGAN's `shift_pixel`). Meant for a true convolution.
    """
    kernel = truncated_gaussian(size, sigma)
    position = np.minimum(np.arange(size) + (scale - 1) / 2, size - 1)
    low = np.minimum(position.astype(int), size - 2)
    weight = position - low
    kernel = kernel[low] * (1 - weight[:, None]) + kernel[low + 1] * weight[:, None]
    kernel = kernel[:, low] * (1 - weight) + kernel[:, low + 1] * weight
    return kernel / kernel.sum()


def make_kernel(spec: dict[str, Any]) -> np.ndarray:
    """The kernel that a trace's `kernel` entry describes, as the correlation kernel that `filters.blur` applies."""
    kind, size = spec["kind"], spec["size"]
    if kind == "sinc":
        return sinc(size, spec["cutoff"])
    if kind == "fspecial":
        return truncated_gaussian(size, spec["sigma"])
    if kind == "shifted":
        return shifted_gaussian(size, spec["sigma"], spec["scale"])[::-1, ::-1]
    return bivariate(kind, size, spec["sigma"], spec["theta"], spec.get("beta", 1.0))


@lru_cache
def usm_kernel() -> np.ndarray:
    """(51,) float64: OpenCV's Gaussian for 51 taps (sigma 8.0), one axis of the USM blur."""
    weights = np.exp(-0.5 * (_offsets(51) / 8.0) ** 2)
    return weights / weights.sum()
