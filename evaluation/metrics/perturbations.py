"""Tiny changes of an LR image that nobody would call another picture, and their undoing in the output (P-STD)."""

import io

import numpy as np
from PIL import Image

from infra.seeding import rng_for


def perturb(lr: np.ndarray, name: str, key: str) -> np.ndarray:
    """`lr`, uint8 RGB (H, W, 3), changed in one way; the noise depends on `key` alone.

    shift: one px down and right, the border repeated; jpeg: quality 95 without chroma subsampling; noise: Gaussian of
    one level; brightness: one level darker.
    """
    if name == "shift":
        return np.pad(lr, ((1, 0), (1, 0), (0, 0)), mode="edge")[:-1, :-1]
    if name == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(lr).save(buffer, "JPEG", quality=95, subsampling=0)
        return np.asarray(Image.open(buffer).convert("RGB"))
    change = rng_for(0, "perturbation", key).normal(0, 1, lr.shape) if name == "noise" else -1.0
    return np.clip(np.rint(lr + change), 0, 255).astype(np.uint8)


def undo(output: np.ndarray, name: str, scale: int) -> np.ndarray:
    """The output for an LR image changed by `perturb`, in the original's place and brightness, where that is exact.

    `output`: uint8 RGB (H, W, 3). A shifted one is rolled back by `scale` px: `perturbation_border` must be cut.
    """
    if name == "shift":
        return np.roll(output, (-scale, -scale), axis=(0, 1))
    return np.where(output < 255, output + 1, 255).astype(np.uint8) if name == "brightness" else output


def perturbation_border(crop_border: int, scale: int) -> int:
    """Px to cut from each side: two LR pixels more than `crop_border`, so that the shift's repeated and lost pixels
    count for no method that looks at 4 x 4 LR pixels (bicubic)."""
    return crop_border + 2 * scale
