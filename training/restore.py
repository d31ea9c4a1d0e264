"""Restore one LR image N times with recorded seeds: plain PyTorch, all runs of an image together."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from infra.config import Config
from infra.errors import DataError
from infra.images import resize_bicubic
from infra.seeding import Noise, noise_for
from training.models import CcsrModel
from training.sampling import color_fix, sample_ccsr_v1, sample_ccsr_v2, sample_uniform


class SamplingConfig(Config):
    """How a model restores. `ccsr`: the truncated chain of the model's family; `uniform`: conventional DDPM."""

    sampler: Literal["ccsr", "uniform"] = "ccsr"
    num_steps: int = Field(45, ge=1, description="steps of the whole chain")
    t_max: float = Field(0.6667, gt=0, le=1)
    t_min: float = Field(0.3333, ge=0, lt=1)
    start: Literal["lr", "noise"] = Field("lr", description="v2's start point; v1 starts from noise")
    color_fix: Literal["adain", "wavelet", "none"] = "adain"

    @model_validator(mode="after")
    def _ordered(self) -> "SamplingConfig":
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self


@torch.inference_mode()
def restore_runs(
    model: CcsrModel,
    lr: np.ndarray,
    size: tuple[int, int],
    config: SamplingConfig,
    *,
    seed: int,
    key: str,
    runs: Sequence[int],
    runs_at_once: int = 8,
) -> Iterator[np.ndarray]:
    """Yield one uint8 (H, W, 3) RGB image of `size` = (H, W) per run.

    `lr` is uint8 (h, w, 3) RGB. Run r's noise depends on (seed, key, r) alone. The LR is enlarged bicubically,
    padded by reflection to what the networks need, encoded once, and cut back at the end.
    DataError for an output under 2 px.
    """
    height, width = size
    if min(height, width) < 2:
        raise DataError(
            f"{lr.shape[1]}x{lr.shape[0]} px to {width}x{height} px is too small to restore",
            where=key,
            todo="use a larger image",
        )
    device = next(model.vae.parameters()).device
    enlarged = torch.from_numpy(resize_bicubic(lr, width, height).copy()).to(device).permute(2, 0, 1)[None] / 255
    unit = model.factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    padded = _reflect(enlarged, -height % unit, -width % unit)
    mean, std = model.encode_condition(padded)
    for first in range(0, len(runs), runs_at_once):
        group = runs[first : first + runs_at_once]
        noise = noise_for(seed, [(key, run) for run in group], device, torch.float32)
        latents = _sample(model, mean, std, config, noise, len(group))
        images = ((model.decode(latents) + 1) / 2)[..., :height, :width]
        images = color_fix(images, enlarged.expand(len(group), -1, -1, -1), config.color_fix)
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        yield from pixels.permute(0, 2, 3, 1).cpu().numpy()


def _sample(model: CcsrModel, mean: Tensor, std: Tensor, config: SamplingConfig, noise: Noise, num_runs: int) -> Tensor:
    shape = (num_runs, *mean.shape[1:])
    z_lr = mean.expand(shape)
    if model.config.family == "v2":
        z_lr = z_lr + std * noise(shape)  # a fresh posterior sample per run: it is part of the method's randomness
    denoise = model.denoiser(z_lr)
    if config.sampler == "uniform":
        return sample_uniform(denoise, noise(shape), num_steps=config.num_steps, noise=noise)
    chain: dict[str, Any] = {
        "num_steps": config.num_steps,
        "t_max": config.t_max,
        "t_min": config.t_min,
        "noise": noise,
    }
    if model.config.family == "v1":
        return sample_ccsr_v1(denoise, noise(shape), **chain)
    return sample_ccsr_v2(denoise, z_lr, start=config.start, **chain)


def _reflect(image: Tensor, bottom: int, right: int) -> Tensor:
    """Pad at bottom and right by reflection, repeatedly where the image is smaller than the padding."""
    while bottom or right:
        step_h, step_w = min(bottom, image.shape[-2] - 1), min(right, image.shape[-1] - 1)
        image = pad(image, (0, step_w, 0, step_h), mode="reflect")
        bottom, right = bottom - step_h, right - step_w
    return image
