"""Losses of stage 1: noise prediction, plus CCSR's terms that make x0 at T and at t_max accurate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.sampling import Denoise, add_noise, predict_x0


def eps_loss(denoise: Denoise, z: Tensor, *, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, a float32 scalar (Ho et al. 2020, eq. 14).

    `z`, `noise` (B, C, H, W); `t` int64 (B,) in 0..999. v2's stage 0, StableSR, the uniform ablation, and the first
    term of both stage-1 losses.
    """
    return F.mse_loss(denoise(add_noise(z, noise, t), t).float(), noise.float())


def stage1_loss_v1(
    denoise: Denoise,
    z_hq: Tensor,
    *,
    t: Tensor,
    noise_t: Tensor,
    noise_T: Tensor,
    noise_tmax: Tensor,
    x_start: Tensor | None = None,
    T: int = 999,
    t_max: int = 667,
) -> dict[str, Tensor]:
    """`stage1_loss_v2` and "l_eps_tmax", the error of the noise predicted at t_max; all weights 1.

    The published code gives l_diff and the other three to two optimisers over the same parameters; here they are one
    sum for one optimiser.
    """
    terms, eps_tmax = _common_terms(denoise, z_hq, t, noise_t, noise_T, noise_tmax, x_start, T, t_max)
    return _summed(terms | {"l_eps_tmax": F.mse_loss(eps_tmax, noise_tmax.float())})


def stage1_loss_v2(
    denoise: Denoise,
    z_hq: Tensor,
    *,
    t: Tensor,
    noise_t: Tensor,
    noise_T: Tensor,
    noise_tmax: Tensor,
    x_start: Tensor | None = None,
    T: int = 999,
    t_max: int = 667,
) -> dict[str, Tensor]:
    """Float32 scalars "l_diff", "l_T", "l_tmax" and their sum "loss" (Sun et al. 2024, as their published code has it).

    l_diff: `eps_loss` at `t`, drawn from 0..t_max-1. l_T: x0 predicted at `T` against `z_hq`. l_tmax: that x0, not
    detached, noised to `t_max` and predicted again. `z_hq` and the noises (B, C, H, W), `t` int64 (B,). `x_start` is
    the latent that is noised to T, `z_hq` unless given (v2's "start from LR" gives z_lr).
    """
    terms, _ = _common_terms(denoise, z_hq, t, noise_t, noise_T, noise_tmax, x_start, T, t_max)
    return _summed(terms)


def _common_terms(
    denoise: Denoise,
    z_hq: Tensor,
    t: Tensor,
    noise_t: Tensor,
    noise_T: Tensor,
    noise_tmax: Tensor,
    x_start: Tensor | None,
    T: int,
    t_max: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """The three terms that both versions share, and the noise predicted at t_max."""
    z_hq = z_hq.float()
    l_diff = eps_loss(denoise, z_hq, t=t, noise=noise_t)
    at_T, at_tmax = torch.full_like(t, T), torch.full_like(t, t_max)
    x_T = add_noise(z_hq if x_start is None else x_start, noise_T, at_T)
    eps_T = denoise(x_T, at_T).float()
    # v2's published special case: with T = 1 the network is read as a one-step residual, not as a noise predictor.
    x0_T = x_T - eps_T if T == 1 else predict_x0(x_T, eps_T, at_T)
    x_tmax = add_noise(x0_T, noise_tmax, at_tmax)
    eps_tmax = denoise(x_tmax, at_tmax).float()
    terms = {
        "l_diff": l_diff,
        "l_T": F.mse_loss(x0_T, z_hq),
        "l_tmax": F.mse_loss(predict_x0(x_tmax, eps_tmax, at_tmax), z_hq),
    }
    return terms, eps_tmax


def _summed(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return terms | {"loss": torch.stack(list(terms.values())).sum()}
