"""Blur and sharpening on planes: float32 (3, H, W), reflect-101 borders, the same bits for any number of threads."""

import cv2
import numpy as np
import torch

from degradation.kernels import usm_kernel

# Weights that together change no pixel in [0, 1] by more than this are cropped from a kernel's border.
NEGLIGIBLE = 5e-6
# Neighbouring pixels of a row that the convolution yields together (the float32 lanes of an AVX-512 register), and
# those that make up one of its input positions.
_LANES, _BLOCK = 16, 8


def blur(planes: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate each plane with `kernel` (odd sides, float64); within 1e-5 of the direct sum in float64."""
    kernel = _crop(kernel)
    rows, columns = kernel.shape
    middle = kernel[rows // 2, columns // 2]
    if kernel.size == 1:
        return planes * np.float32(middle)
    vertical, horizontal = kernel[:, columns // 2], kernel[rows // 2] / middle if middle else kernel[rows // 2]
    if middle and np.abs(np.outer(vertical, horizontal) - kernel).sum() < NEGLIGIBLE:
        return blur_separable(planes, vertical, horizontal)
    return _convolve(planes, kernel)


def blur_separable(planes: np.ndarray, vertical: np.ndarray, horizontal: np.ndarray) -> np.ndarray:
    """Correlate each plane with the outer product of two odd-sized kernels."""
    out = np.empty(planes.shape, np.float32)
    for plane, result in zip(planes, out, strict=True):
        cv2.sepFilter2D(plane, -1, horizontal, vertical, dst=result, borderType=cv2.BORDER_REFLECT_101)
    return out


def sharpen(planes: np.ndarray) -> np.ndarray:
    """Unsharp masking where the detail exceeds 10/255 (Real-ESRGAN's USMSharp, BSRGAN's add_sharpening): in [0, 1]."""
    gaussian = usm_kernel()
    residual = planes - blur_separable(planes, gaussian, gaussian)
    mask = (np.abs(residual) * 255 > 10).astype(np.float32)
    soft = blur_separable(mask, gaussian, gaussian)
    residual *= 0.5
    residual += planes
    np.clip(residual, 0, 1, out=residual)
    residual -= planes
    residual *= soft
    residual += planes
    return residual


def _crop(kernel: np.ndarray) -> np.ndarray:
    """Drop border rings of rows and of columns whose weights are negligible together."""
    allowed = NEGLIGIBLE / 2
    for axis in (0, 1):
        line = np.abs(kernel).sum(axis=1 - axis)
        rings = np.cumsum(line[: line.size // 2] + line[: line.size // 2 : -1])
        drop = int(np.searchsorted(rings, allowed))
        if drop:
            kernel = kernel[drop:-drop] if axis == 0 else kernel[:, drop:-drop]
    return kernel


def _convolve(planes: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A 2-D correlation as a convolution with a stride: 8 neighbouring pixels of a row are its input's channels.

    The planes' memory needs no copy for that (it is the channels-last layout of (3, 8, H, W / 8)), and the
    convolution runs as matrix products, up to three times faster than filter2D's DFT.
    """
    count, height, width = planes.shape
    rows, columns = kernel.shape
    blocks_out = -(-width // _LANES)
    blocks_in = -(-(_LANES + columns - 1) // _BLOCK)
    padded_width = _LANES * (blocks_out - 1) + _BLOCK * blocks_in
    padded = np.empty((count, height + rows - 1, padded_width), np.float32)
    left, top = columns // 2, rows // 2
    for plane, target in zip(planes, padded, strict=True):
        right = padded_width - width - left
        cv2.copyMakeBorder(plane, top, top, left, right, cv2.BORDER_REFLECT_101, dst=target)
    weight = np.zeros((_LANES, rows, _BLOCK * blocks_in), np.float32)
    for lane in range(_LANES):
        weight[lane, :, lane : lane + columns] = kernel
    result = torch.nn.functional.conv2d(_channels(padded), _channels(weight), stride=(1, _LANES // _BLOCK))
    out = result.permute(0, 2, 3, 1).reshape(count, height, _LANES * blocks_out).numpy()
    return out[:, :, :width]


def _channels(array: np.ndarray) -> torch.Tensor:
    """(N, H, W) as the (N, 8, H, W / 8) view whose memory is channels-last."""
    count, height, width = array.shape
    return torch.from_numpy(array).view(count, height, width // _BLOCK, _BLOCK).permute(0, 3, 1, 2)
