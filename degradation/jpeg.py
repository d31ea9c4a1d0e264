"""JPEG on planes (float32 (3, H, W) RGB in [0, 1]): DiffJPEG's arithmetic as matrix products, and libjpeg's."""

from functools import lru_cache

import cv2
import numpy as np
import torch

from degradation.noise import to_levels

# ITU-T T.81, Annex K
_LUMA_TABLE = """
    16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
_CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))


# Black up to the next multiple of 16 is DiffJPEG's padding; more changes nothing, and oneDNN, which compiles a
# convolution for every new shape, then meets few shapes.
_PADDING = 64


def diffjpeg(planes: np.ndarray, quality: float) -> np.ndarray:
    """DiffJPEG (Shin and Song 2017) with hard rounding, `quality` real: 4:2:0, no 8-bit step, tables never rounded.

    As published: the luma table is applied transposed, the image is padded with black to a multiple of 16, chroma is
    replicated on decoding. The result is in [0, 1].
    """
    height, width = planes.shape[1:]
    padded = np.zeros((3, -(-height // _PADDING) * _PADDING, -(-width // _PADDING) * _PADDING), np.float32)
    np.clip(planes, 0, 1, out=padded[:, :height, :width])
    padded *= 255
    red, green, blue = padded
    small_red, small_green, small_blue = (
        cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for p in padded
    )
    luma = 0.299 * red + 0.587 * green + 0.114 * blue - 128
    chroma_blue = -0.168736 * small_red - 0.331264 * small_green + 0.5 * small_blue
    chroma_red = 0.5 * small_red - 0.418688 * small_green - 0.081312 * small_blue
    # At quality 100 the published factor is 0 and its result NaN; here it is nearly lossless instead.
    factor = max(50 / quality if quality < 50 else (200 - 2 * quality) / 100, 1e-6)
    luma_table, chroma_table = _tables()
    luma = _quantise(luma, luma_table * factor) + np.float32(128 / 255)
    chroma_blue = _enlarge(_quantise(chroma_blue, chroma_table * factor))
    chroma_red = _enlarge(_quantise(chroma_red, chroma_table * factor))
    red, green, blue = padded
    np.add(luma, 1.402 * chroma_red, out=red)
    np.subtract(luma, 0.344136 * chroma_blue + 0.714136 * chroma_red, out=green)
    np.add(luma, 1.772 * chroma_blue, out=blue)
    np.clip(padded, 0, 1, out=padded)
    return padded[:, :height, :width]


def _enlarge(plane: np.ndarray) -> np.ndarray:
    return cv2.resize(plane, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)


def _quantise(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """DCT, division by `table` (64,), rounding and back, on the 8 x 8 blocks of one plane in [-128, 127]; then / 255.

    The DCT and its inverse are convolutions with a stride of 8 rows whose 8 channels are neighbouring pixels of a
    row: the plane itself is their channels-last input, and no number of threads changes a bit.
    """
    height, width = plane.shape
    basis = _dct_basis()
    forward = torch.from_numpy((basis / table).T.reshape(64, 8, 8, 1).astype(np.float32))
    inverse = torch.from_numpy((basis * (table / 255)).T.reshape(64, 8, 8, 1).astype(np.float32))
    lanes = torch.from_numpy(plane).view(1, height, width // 8, 8).permute(0, 3, 1, 2)
    coefficients = torch.nn.functional.conv2d(lanes, _last(forward), stride=(8, 1)).round_()
    lanes = torch.nn.functional.conv_transpose2d(coefficients, _last(inverse), stride=(8, 1))
    return lanes.permute(0, 2, 3, 1).reshape(height, width).numpy()


def _last(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=1)
def _dct_basis() -> np.ndarray:
    """(64, 64) float64 orthonormal 8 x 8 DCT-II: pixel (column-major) by coefficient (row frequency first)."""
    frequency, position = np.arange(8)[:, None], np.arange(8)
    basis = 0.5 * np.cos((2 * position + 1) * frequency * np.pi / 16)
    basis[0] /= np.sqrt(2)
    return np.einsum("uy,vx->xyuv", basis, basis).reshape(64, 64)


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    luma = np.array(_LUMA_TABLE.split(), np.float64).reshape(8, 8).T
    chroma = np.full((8, 8), 99.0)
    chroma[:4, :4] = _CHROMA_CORNER
    return luma.ravel(), chroma.ravel()


def libjpeg(planes: np.ndarray, quality: int) -> np.ndarray:
    """OpenCV's JPEG round trip (4:2:0) at an integer quality; the input is rounded to 8 bits first."""
    red, green, blue = to_levels(planes)
    bgr = cv2.merge([blue, green, red])
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.split(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    out = np.empty(planes.shape, np.float32)
    for plane, channel in zip(out, reversed(decoded), strict=True):
        np.multiply(channel, np.float32(1 / 255), out=plane)
    return out
