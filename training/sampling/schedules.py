"""The noise schedule of Stable Diffusion 2.1-base and the timesteps that each sampler visits."""

from functools import cache
from itertools import accumulate, repeat

import torch
from torch import Tensor

from infra.errors import ConfigError

NUM_TIMESTEPS = 1000
LAST_TIMESTEP = NUM_TIMESTEPS - 1

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, dim=0)
ABARS: list[float] = ALPHAS_CUMPROD.tolist()
_SCALES = torch.stack([ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt()]).float()


@cache
def scales_on(device: torch.device) -> Tensor:
    """`_SCALES` on a GPU, copied once. Outside inference mode, or no later training could save it for its backward."""
    with torch.inference_mode(False):
        return _SCALES.to(device)


def _coefficients(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), float32 (B, 1, 1, 1) on the device of `like`."""
    scales = _SCALES if like.device.type == "cpu" else scales_on(like.device)
    signal, sigma = scales[:, t.to(like.device)].view(2, -1, 1, 1, 1)
    return signal, sigma


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """q(x_t | x0): float32 (B, C, H, W) from latents and standard normal noise of that shape, `t` int64 (B,) in 0..999.

    Ho et al., "Denoising Diffusion Probabilistic Models", 2020, eq. 4.
    """
    signal, sigma = _coefficients(t, x0)
    return signal * x0.float() + sigma * noise.float()


def predict_x0(x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x0 implied by a noise prediction, not clamped; shapes as in `add_noise`.

    Float32 even for half-precision `eps`: at t = 999 an error in eps is multiplied by 14.6.
    """
    signal, sigma = _coefficients(t, x_t)
    return (x_t.float() - sigma * eps.float()) / signal


def velocity_to_eps(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The noise implied by a predicted velocity, sqrt(abar) eps - sqrt(1 - abar) x0; shapes as in `add_noise`.

    Salimans & Ho, "Progressive Distillation", 2022, appendix D. x0 then is sqrt(abar) x_t - sqrt(1 - abar) velocity: an
    error of the network is not multiplied at t = 999, where it is by 14.6 if the network predicts the noise itself.
    """
    signal, sigma = _coefficients(t, x_t)
    return sigma * x_t.float() + signal * velocity.float()


def posterior(t: int, t_prev: int) -> tuple[float, float, float]:
    """Coefficients (of x0, of x_t) of the mean of q(x_prev | x_t, x0), and its standard deviation ("fixed small").

    Ho et al. 2020, eqs. 6 and 7, with beta and alpha of the jump from `t` to `t_prev` < `t`.
    """
    abar, abar_prev = ABARS[t], ABARS[t_prev]
    alpha = abar / abar_prev
    beta = 1 - alpha
    return (
        beta * abar_prev**0.5 / (1 - abar),
        (1 - abar_prev) * alpha**0.5 / (1 - abar),
        (beta * (1 - abar_prev) / (1 - abar)) ** 0.5,
    )


def respaced_grid(num_steps: int) -> list[int]:
    """`num_steps` timesteps from 0 to 999, ascending, evenly spaced; ConfigError outside 2..1000.

    Guided diffusion's respacing: the running sum decides the roundings (45 steps hold 499; i * 999 / 44 gives 500).
    """
    _check_num_steps(num_steps, 2, NUM_TIMESTEPS)
    stride = LAST_TIMESTEP / (num_steps - 1)
    return [round(position) for position in accumulate(repeat(stride, num_steps - 1), initial=0.0)]


def ccsr_v1_timesteps(num_steps: int, t_max: float, t_min: float) -> list[int]:
    """Timesteps at which CCSR v1 evaluates its network: 999, then the grid's part from t_max down to t_min.

    `t_max`, `t_min` are fractions of the chain (2/3 and 1/3 published). ConfigError where the published loop is
    empty: also when num_steps * t_min rounds to 0, so v1 never visits the grid's first point.
    """
    grid = respaced_grid(num_steps)
    first, last = _loop_bounds(num_steps, t_max, t_min)
    if last == 0:
        raise _empty_loop(num_steps, t_max, t_min)
    return [LAST_TIMESTEP, *reversed(grid[last:first])]


def ccsr_v2_timesteps(num_steps: int, t_max: float, t_min: float) -> list[int]:
    """Timesteps at which CCSR v2 evaluates its network; diffusers' "leading" spacing with offset 1.

    One step is [999] whatever t_min is. t_max = 1 leaves out the jump at 999; t_min = 0 ends at t = 1.
    ConfigError where the published loop is empty.
    """
    _check_num_steps(num_steps, 1, LAST_TIMESTEP)
    _check_fractions(t_max, t_min)
    jump = [LAST_TIMESTEP] if t_max < 1 else []
    if num_steps == 1 and jump:
        return jump
    first, last = _loop_bounds(num_steps, t_max, t_min)
    if num_steps == 1 or (last == 0 and t_min > 0):
        raise _empty_loop(num_steps, t_max, t_min)
    stride = NUM_TIMESTEPS // num_steps
    return jump + [i * stride + 1 for i in reversed(range(last, first))]


def _loop_bounds(num_steps: int, t_max: float, t_min: float) -> tuple[int, int]:
    """The loop visits the grid's points [last, first), from above."""
    _check_fractions(t_max, t_min)
    first, last = round(num_steps * t_max), round(num_steps * t_min)
    if first <= last:
        raise _empty_loop(num_steps, t_max, t_min)
    return first, last


def _check_num_steps(num_steps: int, lowest: int, highest: int) -> None:
    if not lowest <= num_steps <= highest:
        raise ConfigError(
            f"a sampler cannot take {num_steps} steps",
            where=f"num_steps={num_steps}",
            todo=f"choose num_steps from {lowest} to {highest}",
        )


def _check_fractions(t_max: float, t_min: float) -> None:
    if not 0 <= t_min < t_max <= 1:
        raise ConfigError(
            "t_max and t_min must satisfy 0 <= t_min < t_max <= 1",
            where=f"t_max={t_max}, t_min={t_min}",
            todo="give fractions of the chain, such as t_max=0.6667 and t_min=0.3333",
        )


def _empty_loop(num_steps: int, t_max: float, t_min: float) -> ConfigError:
    return ConfigError(
        f"{num_steps} steps leave no timestep between t_max and t_min",
        where=f"num_steps={num_steps}, t_max={t_max}, t_min={t_min}",
        todo="raise num_steps, or move t_max and t_min apart and t_min away from 0",
    )
