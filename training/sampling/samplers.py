"""CCSR's samplers, v1 and v2, and conventional uniform sampling; every random number arrives through `noise`."""

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from infra.errors import ConfigError
from training.sampling.schedules import (
    LAST_TIMESTEP,
    add_noise,
    ccsr_v1_timesteps,
    ccsr_v2_timesteps,
    posterior,
    predict_x0,
    respaced_grid,
)

# (x_t float32 (B, C, H, W), t int64 (B,)) -> eps of x_t's shape; `tiled` adds the tile's (y, x) where it is taken.
Denoise = Callable[..., Tensor]
DrawNoise = Callable[[Sequence[int]], Tensor]


def sample_ccsr_v1(
    denoise: Denoise,
    x_T: Tensor,
    *,
    num_steps: int,
    t_max: float,
    t_min: float,
    noise: DrawNoise,
    published_renoise: bool = False,
) -> Tensor:
    """x0 float32 (B, C, H, W) of the truncated chain: x0 at 999, re-noised at t_max, DDPM steps, x0 at t_min.

    `x_T` standard normal (B, C, H, W). Draws: the re-noising, then one per loop step but the last, whose x0 is the
    result. The published code re-noises at its own rounding of t_max, at times one grid point above the loop's first
    timestep (5 steps: to 749, then t = 500); `published_renoise=True` does so too. ConfigError on an empty loop.
    Sun et al., "Improving the Stability of Diffusion Models for Content Consistent Super-Resolution", 2024.
    """
    timesteps = ccsr_v1_timesteps(num_steps, t_max, t_min)[1:]
    renoise_at = respaced_grid(num_steps)[round((num_steps - 1) * t_max)] if published_renoise else timesteps[0]
    x0 = _denoise_to_x0(denoise, x_T.float(), LAST_TIMESTEP)
    x = add_noise(x0, noise(x0.shape), _batch_of(renoise_at, x0))
    return _ddpm(denoise, x, timesteps, noise)


def sample_ccsr_v2(
    denoise: Denoise,
    z_lr: Tensor,
    *,
    num_steps: int,
    t_max: float,
    t_min: float,
    start: str,
    noise: DrawNoise,
    denoise_first: Denoise | None = None,
) -> Tensor:
    """x0 float32 (B, C, H, W); one step is x0 at 999, more re-noise it at t_max and continue as v1 does.

    `start`: "lr", `z_lr` (B, C, H, W) noised to 999, or "noise", pure noise. Draws: the start, the re-noising (not with
    one step, nor with t_max = 1, which skips the jump at 999), then one per loop step but the last.
    `denoise_first` replaces `denoise` at 999: the published code never guides there and, when it guides the rest, takes
    the *negative* prompt; `denoise_first=uncond` gives its numbers, `denoise_first=cond` corrects them.
    ConfigError on an unknown start or an empty loop. Source: CCSR v2, published code of December 2024.
    """
    timesteps = ccsr_v2_timesteps(num_steps, t_max, t_min)
    x = starting_point(z_lr, start, noise)
    if t_max < 1:
        x = _denoise_to_x0(denoise_first or denoise, x, timesteps.pop(0))
        if not timesteps:
            return x
        x = add_noise(x, noise(x.shape), _batch_of(timesteps[0], x))
    return _ddpm(denoise, x, timesteps, noise)


def sample_uniform(denoise: Denoise, x_T: Tensor, *, num_steps: int, noise: DrawNoise) -> Tensor:
    """x0 float32 (B, C, H, W) of ancestral DDPM over the whole respaced chain, 999 to 0; StableSR's sampler.

    `x_T` (B, C, H, W). One draw per step but the last, which adds no noise. ConfigError unless 2 <= num_steps <= 1000.
    """
    return _ddpm(denoise, x_T.float(), respaced_grid(num_steps)[::-1], noise)


def starting_point(z_lr: Tensor, start: str, noise: DrawNoise) -> Tensor:
    """x_T, float32 of z_lr's shape, from one draw: pure "noise", or "lr", the LR latent noised to 999.

    ConfigError on an unknown start.
    """
    if start not in ("lr", "noise"):
        raise ConfigError(f"unknown start {start!r}", where="start", todo='choose "lr" or "noise"')
    x = noise(z_lr.shape).float()
    return add_noise(z_lr, x, _batch_of(LAST_TIMESTEP, z_lr)) if start == "lr" else x


def guided(cond: Denoise, uncond: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance, eps = uncond + scale (cond - uncond) (Ho & Salimans 2022); `cond` itself at scale 1."""
    if scale == 1:
        return cond

    def denoise(x_t: Tensor, t: Tensor, *tile: tuple[int, int]) -> Tensor:
        eps_uncond = at_tile(uncond, x_t, t, *tile)
        return eps_uncond + scale * (at_tile(cond, x_t, t, *tile) - eps_uncond)

    return denoise


def at_tile(denoise: Denoise, x_t: Tensor, t: Tensor, *tile: tuple[int, int]) -> Tensor:
    """denoise(x_t, t, (y, x)), or denoise(x_t, t) where it takes no third argument or there is no tile."""
    try:
        inspect.signature(denoise).bind(x_t, t, *tile)
    except TypeError:
        return denoise(x_t, t)
    return denoise(x_t, t, *tile)


def _ddpm(denoise: Denoise, x: Tensor, timesteps: Sequence[int], noise: DrawNoise) -> Tensor:
    """Posterior steps along falling `timesteps`; the result is the x0 predicted at the last of them."""
    for t, t_prev in pairwise(timesteps):
        x0 = _denoise_to_x0(denoise, x, t)
        of_x0, of_x, std = posterior(t, t_prev)
        x = of_x0 * x0 + of_x * x + std * noise(x0.shape).float()
    return _denoise_to_x0(denoise, x, timesteps[-1])


def _denoise_to_x0(denoise: Denoise, x: Tensor, t: int) -> Tensor:
    batch = _batch_of(t, x)
    return predict_x0(x, denoise(x, batch), batch)


def _batch_of(t: int, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), t, dtype=torch.int64, device=like.device)
