"""From an LR image to what the networks see, by reflection to whole latent pixels or as published, and back."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from infra.errors import ConfigError, DataError
from infra.imaging.pictures import resized, to_grey
from training.config import SamplingConfig, SizeRule
from training.sampling import color_fix

SHORT_SIDE = 512  # px that the published scripts enlarge smaller images to
ColorFix = Callable[..., Tensor]
"""`color_fix`, or what replaces it for the frames of a sequence."""
_Step = tuple[int, int, Image.Resampling]


def network_input(lr: np.ndarray, size: tuple[int, int], config: SamplingConfig, *, where: str) -> Tensor:
    """The LR, uint8 or uint16 (h, w, 3), at the networks' size: float32 (1, 3, H, W) in [0, 1], on the CPU.

    DataError for uint16 under a published size rule.
    """
    if config.sizes == "pad":
        pixels = resized(lr, size, Image.Resampling[config.enlargement.upper()])
    elif lr.dtype == np.uint8:
        pixels = published_input(lr, size, config.sizes, where=where)
    else:
        raise DataError("published size rules are of 8-bit images", where=where, todo="use --set sampling.sizes=pad")
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / np.iinfo(pixels.dtype).max


def finish(
    decoded: Tensor,
    enlarged: Tensor,
    size: tuple[int, int],
    config: SamplingConfig,
    epsilon: float,
    levels: int = 255,
    fix: ColorFix = color_fix,
) -> np.ndarray:
    """The output (H, W, 3) of `size`, uint8 or, with 65535 levels, uint16, from a decoded image (1, 3, h, w) around
    [0, 1]: padding cut off, colours of `enlarged`, AdaIN's `epsilon`; of a grey `enlarged` (its channels are equal) the
    luma. DataError where it is not finite."""
    pixels = fix(decoded[..., : enlarged.shape[-2], : enlarged.shape[-1]], enlarged, config.color_fix, epsilon)
    if not pixels.isfinite().all():
        raise DataError("the networks' numbers overflowed", where="decoder", todo="use --dtype bfloat16 or float32")
    dtype = torch.uint8 if levels == 255 else torch.uint16
    image = pixels[0].clamp(0, 1).mul_(levels).round_().to(dtype).permute(1, 2, 0).cpu().numpy()
    if (enlarged == enlarged[:, :1]).all():
        image = to_grey(image)
    return image if config.sizes == "pad" else published_output(image, size, config.sizes)


def reflect(image: Tensor, bottom: int, right: int) -> Tensor:
    """Pad at bottom and right by reflection, repeatedly where the image is smaller than the padding."""
    while bottom or right:
        step_h, step_w = min(bottom, image.shape[-2] - 1), min(right, image.shape[-1] - 1)
        image = pad(image, (0, step_w, 0, step_h), mode="reflect")
        bottom, right = bottom - step_h, right - step_w
    return image


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
