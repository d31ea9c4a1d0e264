"""From an LR image to what the networks see: by reflection to a whole number of latent pixels, or as published."""

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from infra.errors import ConfigError
from training.config import SizeRule

SHORT_SIDE = 512  # px that the published scripts enlarge smaller images to
_Step = tuple[int, int, Image.Resampling]


def published_input(lr: np.ndarray, size: tuple[int, int], rule: SizeRule, *, where: str) -> np.ndarray:
    """The uint8 (h, w, 3) image that CCSR's own scripts give the networks for an output of `size` = (H, W).

    v1 stretches to multiples of 64 (rounded down; with tiles always up), v2 to multiples of 8; images below 512 px are
    enlarged first. ConfigError for v2 with a fractional scale. Source: inference_ccsr.py, inference_ccsr_tile.py (v1),
    test_ccsr_tile.py (v2).
    """
    for width, height, resampling in _steps((lr.shape[0], lr.shape[1]), size, rule, where):
        if lr.shape[:2] != (height, width):
            lr = np.asarray(Image.fromarray(lr).resize((width, height), resampling))
    return lr


def published_output(image: np.ndarray, size: tuple[int, int], rule: SizeRule) -> np.ndarray:
    """A restored uint8 image (h, w, 3) brought to `size` = (H, W): v1 by Lanczos, v2 by bicubic interpolation."""
    if image.shape[:2] == size:
        return image
    resampling = Image.Resampling.BICUBIC if rule == "v2" else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize(size[::-1], resampling))


def _steps(lr: tuple[int, int], size: tuple[int, int], rule: SizeRule, where: str) -> Iterator[_Step]:
    height, width = size
    bicubic = Image.Resampling.BICUBIC
    if rule == "v2":
        scale = height // lr[0]
        if (lr[0] * scale, lr[1] * scale) != size:
            raise ConfigError("v2's size rule needs a whole scale", where=where, todo="give one, or use sizes: pad")
        height, width = lr
        least = SHORT_SIDE // scale
        if min(lr) < least:
            height, width = (round(side * least / min(lr)) for side in lr)
            yield width, height, bicubic
        yield width * scale, height * scale, bicubic
        yield width * scale // 8 * 8, height * scale // 8 * 8, bicubic
        return
    yield width, height, bicubic
    if min(size) < SHORT_SIDE:
        height, width = (math.ceil(side * SHORT_SIDE / min(size)) for side in size)
        yield width, height, bicubic
    up = int(rule == "v1_tiled")
    yield (width // 64 + up) * 64, (height // 64 + up) * 64, Image.Resampling.LANCZOS
