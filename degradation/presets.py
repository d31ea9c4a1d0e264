"""The published recipes by name: Real-ESRGAN x4plus, CCSR, StableSR, BSRGAN and its variants, bicubic."""

import difflib

from degradation.config import (
    AddedNoise,
    Bicubic,
    Blur,
    Bsrgan,
    BsrganPlus,
    DegradationConfig,
    Resize,
    Round,
    SecondOrder,
)
from infra.errors import ConfigError

# Real-ESRGAN a4abfb2, options/train_realesrgan_x4plus.yml
_REALESRGAN = SecondOrder(
    sharpen="input",
    first=Round(
        blur=Blur(sigma=(0.2, 3), beta_generalized=(0.5, 4), beta_plateau=(1, 2)),
        resize=Resize(directions={"up": 0.2, "down": 0.7, "keep": 0.1}, range=(0.15, 1.5)),
        noise=AddedNoise(sigma=(1, 30), poisson_scale=(0.05, 3)),
        jpeg_quality=(30, 95),
    ),
    second=Round(
        blur=Blur(probability=0.8, sigma=(0.2, 1.5), beta_generalized=(0.5, 4), beta_plateau=(1, 2)),
        resize=Resize(directions={"up": 0.3, "down": 0.4, "keep": 0.3}, range=(0.3, 1.2)),
        noise=AddedNoise(sigma=(1, 25), poisson_scale=(0.05, 2.5)),
        jpeg_quality=(30, 95),
    ),
)

# CCSR 15778ed, configs/model/ccsr_stage1.yaml and the training YAML of its data set
_CCSR = SecondOrder(
    first=Round(
        blur=Blur(sigma=(0.2, 1.5), beta_generalized=(0.5, 2), beta_plateau=(1, 1.5)),
        resize=Resize(directions={"up": 0.2, "down": 0.7, "keep": 0.1}, range=(0.3, 1.5)),
        noise=AddedNoise(sigma=(1, 15), poisson_scale=(0.05, 2)),
        jpeg_quality=(60, 95),
    ),
    second=Round(
        blur=Blur(probability=0.5, sigma=(0.2, 1.0), beta_generalized=(0.5, 2), beta_plateau=(1, 1.5)),
        resize=Resize(directions={"up": 0.3, "down": 0.4, "keep": 0.3}, range=(0.6, 1.2)),
        noise=AddedNoise(sigma=(1, 12), poisson_scale=(0.05, 1)),
        jpeg_quality=(60, 100),
    ),
)

PRESETS: dict[str, DegradationConfig] = {
    "realesrgan": _REALESRGAN,
    "ccsr": _CCSR,
    # StableSR 398ee93, configs/stableSRNew/v2-finetune_text_T_512.yaml: CCSR's numbers, USM and clean pairs
    "stablesr": _CCSR.model_copy(update={"sharpen": "target", "clean": 0.01}),
    "bsrgan": Bsrgan(),
    # KAIR fc1732f: its training JSON and loader
    "bsrgan_plus": BsrganPlus(),
    # BSRGAN 5ce1a9c: the function's defaults
    "bsrgan_plus_sharp": BsrganPlus(shuffle=0.5, sharpen=True),
    "bicubic": Bicubic(),
}


def load_preset(name: str) -> DegradationConfig:
    """The published recipe called `name`; ConfigError if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"there is no degradation preset {name!r}",
            where="degradation preset",
            todo=f"{hint}presets: {', '.join(PRESETS)}",
        )
    return PRESETS[name]
