"""The methods, and all in which they differ: condition, stage 1's loss, chains, decoded range, colour epsilon."""

from typing import Any

import torch
from torch import Tensor

from training.config import SamplingConfig, TrainConfig
from training.losses import Timesteps, eps_terms, stage1_loss_v1, stage1_loss_v2
from training.sampling import (
    Denoise,
    DrawNoise,
    add_noise,
    predict_x0,
    sample_ccsr_v1,
    sample_ccsr_v2,
    sample_uniform,
    starting_point,
)
from training.sampling.schedules import LAST_TIMESTEP, NUM_TIMESTEPS


class CcsrV2:
    """CCSR as its second version has it. Latents are scaled, float32 (B, 4, h, w)."""

    color_epsilon = 1e-5  # AdaIN's, on images in [0, 1]
    tile_stride = (1, 2)  # numerator and denominator, of a tile's side
    stage1_loss = staticmethod(stage1_loss_v2)

    def condition(self, mean: Tensor, std: Tensor, noise: DrawNoise) -> Tensor:
        """The condition latent z_lr, from the moments of the LR image's posterior."""
        return mean + std * noise(mean.shape)

    def noise_terms(
        self, denoise: Denoise, z_hr: Tensor, z_lr: Tensor, t: Timesteps, noise: DrawNoise, config: TrainConfig
    ) -> dict[str, Tensor]:
        """Stage 1's terms and their sum "loss". `t(n)`: each sample's timestep, int64 (B,), from 0 to n - 1."""
        t_max = round(config.t_max * NUM_TIMESTEPS)
        return self.stage1_loss(
            denoise,
            z_hr,
            t=t(t_max),
            noise_t=noise(z_hr.shape),
            noise_T=noise(z_hr.shape),
            noise_tmax=noise(z_hr.shape),
            x_start=z_lr if config.start_from == "lr" else None,
            t_max=t_max,
            join_passes=config.runtime.join_passes,
        )

    def stage2_latents(
        self, denoise: Denoise, z_hr: Tensor, z_lr: Tensor, noise: DrawNoise, config: TrainConfig
    ) -> Tensor:
        """What stage 2's decoder learns to decode: the chain's x0 (published: one step, x0 at 999)."""
        start = z_lr if config.start_from == "lr" else z_hr
        return sample_ccsr_v2(denoise, start, start="lr", noise=noise, **_chain(config))

    def in_range(self, decoded: Tensor) -> Tensor:
        """The decoded image (B, 3, H, W) as stage 2's loss takes it."""
        return decoded.clamp(-1, 1)

    def sample(
        self, denoise: Denoise, first: Denoise, z_lr: Tensor, noise: DrawNoise, config: SamplingConfig
    ) -> Tensor:
        """x0 of a restoration; `first` takes the step at 999 where the published code never guides it."""
        if config.sampler == "uniform":
            return sample_uniform(denoise, noise(z_lr.shape), num_steps=config.num_steps, noise=noise)
        return sample_ccsr_v2(denoise, z_lr, start=config.start, denoise_first=first, noise=noise, **_chain(config))

    def fits(self, height: int, width: int, tile: float) -> bool:
        """Whether a latent is denoised whole where tiles have this side."""
        return max(height, width) <= tile


class CcsrV1(CcsrV2):
    """CCSR's first version: the posterior's mean as condition, one more term in stage 1, the chain from pure noise."""

    stage1_loss = staticmethod(stage1_loss_v1)

    def condition(self, mean: Tensor, std: Tensor, noise: DrawNoise) -> Tensor:
        return mean

    def stage2_latents(
        self, denoise: Denoise, z_hr: Tensor, z_lr: Tensor, noise: DrawNoise, config: TrainConfig
    ) -> Tensor:
        """From the noised HR latent. As published, one draw serves the start at 999 and the re-noising at t_max."""
        first = noise(z_hr.shape)
        reused = [first]
        x_T = add_noise(z_hr, first, torch.full((len(z_hr),), LAST_TIMESTEP, device=z_hr.device))
        return sample_ccsr_v1(
            denoise, x_T, noise=lambda shape: reused.pop() if reused else noise(shape), **_chain(config)
        )

    def in_range(self, decoded: Tensor) -> Tensor:
        return decoded

    def sample(
        self, denoise: Denoise, first: Denoise, z_lr: Tensor, noise: DrawNoise, config: SamplingConfig
    ) -> Tensor:
        if config.sampler == "uniform":
            return super().sample(denoise, first, z_lr, noise, config)
        return sample_ccsr_v1(denoise, noise(z_lr.shape), noise=noise, **_chain(config))


class StableSr(CcsrV2):
    """StableSR: plain noise prediction, and the whole chain from the noised LR latent (published: 200 steps)."""

    color_epsilon = 2.5e-6  # the published 1e-5 is on [-1, 1]

    def noise_terms(
        self, denoise: Denoise, z_hr: Tensor, z_lr: Tensor, t: Timesteps, noise: DrawNoise, config: TrainConfig
    ) -> dict[str, Tensor]:
        return eps_terms(denoise, z_hr, t, noise)

    def stage2_latents(
        self, denoise: Denoise, z_hr: Tensor, z_lr: Tensor, noise: DrawNoise, config: TrainConfig
    ) -> Tensor:
        return sample_uniform(denoise, starting_point(z_lr, "lr", noise), num_steps=config.num_steps, noise=noise)

    def in_range(self, decoded: Tensor) -> Tensor:
        return decoded

    def sample(
        self, denoise: Denoise, first: Denoise, z_lr: Tensor, noise: DrawNoise, config: SamplingConfig
    ) -> Tensor:
        start = starting_point(z_lr, config.start, noise)
        return sample_uniform(denoise, start, num_steps=config.num_steps, noise=noise)


class OneStep(CcsrV2):
    """OSEDiff: x0 predicted at 999 from the LR latent itself, to which no noise is added.

    The published code takes a sample of the LR's posterior, as training does here; a restoration takes the mean, so
    that all seeds give one picture.
    """

    tile_stride = (2, 3)  # published: 96 latent pixels that overlap by 32

    def condition(self, mean: Tensor, std: Tensor, noise: DrawNoise) -> Tensor:
        return mean

    def sample(
        self, denoise: Denoise, first: Denoise, z_lr: Tensor, noise: DrawNoise, config: SamplingConfig
    ) -> Tensor:
        t = torch.full((len(z_lr),), LAST_TIMESTEP, device=z_lr.device)
        return predict_x0(z_lr, denoise(z_lr, t), t)

    def fits(self, height: int, width: int, tile: float) -> bool:
        return height * width <= tile * tile


METHODS: dict[str, CcsrV2] = {"v1": CcsrV1(), "v2": CcsrV2(), "stablesr": StableSr(), "onestep": OneStep()}
"""By `model.family`."""


def _chain(config: TrainConfig | SamplingConfig) -> dict[str, Any]:
    return {"num_steps": config.num_steps, "t_max": config.t_max, "t_min": config.t_min}
