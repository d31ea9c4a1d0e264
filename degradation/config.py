"""What a degradation may be: one schema per recipe, checked so that an error names field, value and rule."""

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

from infra.config import Config

KernelKind = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
Direction = Literal["up", "down", "keep"]
Mode = Literal["area", "bilinear", "bicubic"]
Key = TypeVar("Key")


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the range {list(value)} is inverted: the first number must not exceed the second")
    return value


def _around_one(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] <= 1 <= value[1]:
        raise ValueError(f"the range {list(value)} must contain 1: draws are made on either side of 1")
    return value


def _sums_to_one(value: dict[Key, float]) -> dict[Key, float]:
    if abs(sum(value.values()) - 1) > 1e-6:
        raise ValueError(f"the probabilities {value} sum to {sum(value.values()):.6g}: they must sum to 1")
    return value


def _odd(value: tuple[int, ...]) -> tuple[int, ...]:
    if even := [size for size in value if size % 2 == 0]:
        raise ValueError(f"the kernel sizes {even} are even: every size must be odd")
    return value


Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sigma = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
Level = Annotated[float, Field(ge=0, le=255)]
Levels = Annotated[tuple[Level, Level], AfterValidator(_ordered)]
Quality = Annotated[float, Field(ge=1, le=100)]
Qualities = Annotated[tuple[Quality, Quality], AfterValidator(_ordered)]
Factor = Annotated[float, Field(ge=0.05, le=8)]
AroundOne = Annotated[tuple[Factor, Factor], AfterValidator(_ordered), AfterValidator(_around_one)]
KernelSize = Annotated[int, Field(ge=3, le=51)]
KernelSizes = Annotated[tuple[KernelSize, ...], Field(min_length=1), AfterValidator(_odd)]
Scale = Annotated[int, Field(ge=1, le=8)]

_KINDS: dict[KernelKind, float] = {
    "iso": 0.45,
    "aniso": 0.25,
    "generalized_iso": 0.12,
    "generalized_aniso": 0.03,
    "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}


class Blur(Config):
    """A kernel's distribution. `sigma` in px; `beta_*` are the shape exponents; `sinc` is the share of sinc kernels."""

    probability: Probability = 1.0
    sizes: KernelSizes = (7, 9, 11, 13, 15, 17, 19, 21)
    kinds: Annotated[dict[KernelKind, Probability], AfterValidator(_sums_to_one)] = _KINDS
    sinc: Probability = 0.1
    sigma: Sigma
    beta_generalized: AroundOne
    beta_plateau: AroundOne


class Resize(Config):
    """A factor from `range` (up: 1 to its end, down: its start to 1, keep: 1) and an interpolation mode."""

    directions: Annotated[dict[Direction, Probability], AfterValidator(_sums_to_one)]
    range: AroundOne
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("area", "bilinear", "bicubic")


class AddedNoise(Config):
    """Gaussian (`sigma` in units of 1/255) with probability `gaussian`, else Poisson; `gray`: one field for R, G, B."""

    gaussian: Probability = 0.5
    gray: Probability = 0.4
    sigma: Levels
    poisson_scale: Sigma


class Round(Config):
    """One of the two rounds of the second-order chain."""

    blur: Blur
    resize: Resize
    noise: AddedNoise
    jpeg_quality: Qualities


class SecondOrder(Config):
    """Real-ESRGAN's second-order chain (Wang et al. 2021), as CCSR and StableSR also use it.

    `sharpen`: USM on the chain's `input` only, or also on the `target` (the HR returned).
    `clean`: probability of a pair whose LR training replaces by HR (`trace["clean"]`).
    The last three fields choose between the published behaviour (default) and a faster or cleaner one.
    """

    recipe: Literal["second_order"] = "second_order"
    scale: Scale = 4
    sharpen: Literal["none", "input", "target"] = "none"
    first: Round
    second: Round
    final_sinc: Probability = 0.8
    final_jpeg_first: Probability = 0.5
    clean: Probability = 0.0
    scale_drift: bool = True
    area: Literal["adaptive", "opencv"] = "adaptive"
    jpeg_codec: Literal["diffjpeg", "libjpeg"] = "diffjpeg"


class Bsrgan(Config):
    """BSRGAN's shuffled chain (Zhang et al. 2021), without the ISP step, whose model was never published."""

    recipe: Literal["bsrgan"] = "bsrgan"
    scale: Scale = 4
    half_first: Probability = 0.25
    jpeg: Probability = 0.9
    jpeg_quality: Qualities = (30, 95)
    noise_level: Levels = (2, 25)
    blur_sizes: KernelSizes = (7, 9, 11, 13, 15, 17, 19, 21, 23, 25)


class BsrganPlus(Config):
    """BSRGAN-plus: two rounds of blur, resize and noise, in a fixed order or (`shuffle`) a random one; no ISP step."""

    recipe: Literal["bsrgan_plus"] = "bsrgan_plus"
    scale: Scale = 4
    shuffle: Probability = 0.1
    sharpen: bool = False
    poisson: Probability = 0.1
    speckle: Probability = 0.1
    jpeg_quality: Qualities = (30, 95)
    noise_level: Levels = (2, 25)
    blur_sizes: KernelSizes = (7, 9, 11, 13, 15, 17, 19, 21, 23, 25)


class Bicubic(Config):
    """MATLAB's antialiased `imresize` alone."""

    recipe: Literal["bicubic"] = "bicubic"
    scale: Scale = 4


DegradationConfig = Annotated[SecondOrder | Bsrgan | BsrganPlus | Bicubic, Field(discriminator="recipe")]
