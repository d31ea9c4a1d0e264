"""`degrade` = `apply` after `draw`: the trace lists every step with its drawn numbers, `apply` interprets it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from degradation import filters, jpeg, noise
from degradation.bsrgan import draw_bicubic, draw_bsrgan, draw_bsrgan_plus
from degradation.config import DegradationConfig
from degradation.kernels import make_kernel
from degradation.resize import resize
from degradation.second_order import draw_steps
from infra.errors import DataError

Trace = dict[str, Any]
MIN_SIDE_PX = 32


@dataclass(frozen=True)
class DegradedPair:
    """`hr` uint8 (H, W, 3), `lr` uint8 (H / scale, W / scale, 3), both RGB; `trace` gives the pair again by `apply`."""

    hr: np.ndarray
    lr: np.ndarray
    trace: Trace


def degrade(hr: np.ndarray, config: DegradationConfig, rng: np.random.Generator) -> DegradedPair:
    """Degrade one HR image by draws from `rng`.

    `hr` is uint8 (H, W, 3) RGB, its sides multiples of the scale and at least 32 px; grey (H, W) or (H, W, 1) is
    repeated on three channels, an opaque alpha channel is dropped. DataError for any other array.
    """
    hr = _as_rgb(hr)
    return apply(hr, draw(config, hr.shape[0], hr.shape[1], rng))


def draw(config: DegradationConfig, height: int, width: int, rng: np.random.Generator) -> Trace:
    """Every random choice for one image of (height, width) px, as a dict that JSON keeps exactly.

    Fields of noise are represented by seeds. DataError if a side is no multiple of the scale or under 32 px.
    """
    _check_size(height, width, config.scale)
    draws: dict[str, Callable] = {
        "second_order": draw_steps,
        "bsrgan": draw_bsrgan,
        "bsrgan_plus": draw_bsrgan_plus,
        "bicubic": draw_bicubic,
    }
    trace: Trace = {"recipe": config.recipe, "scale": config.scale, "height": height, "width": width, "clean": False}
    trace["steps"] = draws[config.recipe](config, height, width, rng)
    if config.recipe == "second_order":
        trace["clean"] = bool(rng.random() < config.clean)
    return trace


def apply(hr: np.ndarray, trace: Trace) -> DegradedPair:
    """Replay `trace` on `hr`: the same bytes each time, for any number of threads. `hr` as in `degrade`.

    A clean pair (`trace["clean"]`) has a degraded `lr` like any other: training puts HR in its place.
    """
    hr = _as_rgb(hr)
    if hr.shape[:2] != (trace["height"], trace["width"]):
        raise DataError(
            f"the image is {hr.shape[0]} x {hr.shape[1]} px, the trace was drawn for "
            f"{trace['height']} x {trace['width']}",
            where="hr",
            todo="replay a trace on the image that it was drawn for",
        )
    planes = np.ascontiguousarray(hr.transpose(2, 0, 1)) * np.float32(1 / 255)
    target = hr
    for step in trace["steps"]:
        planes = _STEPS[step["op"]](planes, step)
        if step.get("target"):
            target = _to_image(planes)
    return DegradedPair(target, _to_image(planes), trace)


# Every step may overwrite the planes it is given.
_STEPS: dict[str, Callable[[np.ndarray, dict], np.ndarray]] = {
    "sharpen": lambda planes, step: filters.sharpen(planes),
    "blur": lambda planes, step: filters.blur(planes, make_kernel(step["kernel"])),
    "resize": lambda planes, step: resize(planes, step["height"], step["width"], step["mode"], step.get("factor")),
    "decimate": lambda planes, step: planes[:, :: step["factor"], :: step["factor"]],
    "clip": lambda planes, step: np.clip(planes, 0, 1, out=planes),
    "gaussian": noise.gaussian,
    "poisson": noise.poisson,
    "diffjpeg": lambda planes, step: jpeg.diffjpeg(planes, step["quality"]),
    "libjpeg": lambda planes, step: jpeg.libjpeg(planes, step["quality"]),
}


def _to_image(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(noise.to_levels(planes).transpose(1, 2, 0))


def _as_rgb(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(
            f"hr is {found}; it must be a NumPy array of uint8 in [0, 255]",
            where="hr",
            todo="convert it first (16-bit: divide by 257 and round; float in [0, 1]: multiply by 255 and round)",
        )
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise DataError(
            f"hr has shape {image.shape}; it must be (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) or (H, W, 1) grey",
            where="hr",
            todo="pass one image, its channels last",
        )
    if image.shape[2] == 4 and image[:, :, 3].min() < 255:
        raise DataError(
            "hr has transparent pixels, whose colours are not defined",
            where="hr",
            todo="compose the image onto a background first",
        )
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]


def _check_size(height: int, width: int, scale: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side < MIN_SIDE_PX or side % scale:
            raise DataError(
                f"the {name} is {side} px; it must be a multiple of the scale {scale} and at least {MIN_SIDE_PX}",
                where="hr",
                todo=f"crop the image to multiples of {scale} px",
            )
