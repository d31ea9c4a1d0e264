"""Losses: noise prediction, CCSR's terms that make x0 at T and at t_max accurate, adversarial ones, distillation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import ConfigError
from training.sampling import Denoise, DrawNoise, add_noise, predict_x0
from training.sampling.schedules import NUM_TIMESTEPS


def eps_loss(denoise: Denoise, z: Tensor, *, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, a float32 scalar (Ho et al. 2020, eq. 14).

    `z`, `noise` (B, C, H, W); `t` int64 (B,) in 0..999. v2's stage 0, StableSR, the uniform ablation, and the first
    term of both stage-1 losses.
    """
    return F.mse_loss(denoise(add_noise(z, noise, t), t).float(), noise.float())


Timesteps = Callable[[int], Tensor]  # n -> int64 (B,) from 0 to n - 1


def eps_terms(denoise: Denoise, z: Tensor, t: Timesteps, noise: DrawNoise) -> dict[str, Tensor]:
    """`eps_loss` at any timestep, as "l_diff" and "loss"."""
    loss = eps_loss(denoise, z, t=t(NUM_TIMESTEPS), noise=noise(z.shape))
    return {"l_diff": loss, "loss": loss}


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
    join_passes: bool = False,
) -> dict[str, Tensor]:
    """`stage1_loss_v2` and "l_eps_tmax", the error of the noise predicted at t_max; all weights 1.

    The published code gives l_diff and the other three to two optimisers over the same parameters; here they are one
    sum for one optimiser.
    """
    terms, eps_tmax = _common_terms(denoise, z_hq, t, noise_t, noise_T, noise_tmax, x_start, T, t_max, join_passes)
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
    join_passes: bool = False,
) -> dict[str, Tensor]:
    """Float32 scalars "l_diff", "l_T", "l_tmax" and their sum "loss" (Sun et al. 2024, as their published code has it).

    l_diff: `eps_loss` at `t`, drawn from 0..t_max-1. l_T: x0 predicted at `T` against `z_hq`. l_tmax: that x0, not
    detached, noised to `t_max` and predicted again. `z_hq` and the noises (B, C, H, W), `t` int64 (B,). `x_start` is
    the latent that is noised to T, `z_hq` unless given (v2's "start from LR" gives z_lr). `join_passes`: `denoise` gets
    the latents at `t` and at `T` in one batch, (2B, C, H, W).
    """
    terms, _ = _common_terms(denoise, z_hq, t, noise_t, noise_T, noise_tmax, x_start, T, t_max, join_passes)
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
    join_passes: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """The three terms that both versions share, and the noise predicted at t_max."""
    z_hq = z_hq.float()
    at_T, at_tmax = torch.full_like(t, T), torch.full_like(t, t_max)
    x_t, x_T = add_noise(z_hq, noise_t, t), add_noise(z_hq if x_start is None else x_start, noise_T, at_T)
    if join_passes:
        eps_t, eps_T = denoise(torch.cat([x_t, x_T]), torch.cat([t, at_T])).float().chunk(2)
    else:
        eps_t, eps_T = denoise(x_t, t).float(), denoise(x_T, at_T).float()
    # v2's published special case: with T = 1 the network is read as a one-step residual, not as a noise predictor.
    x0_T = x_T - eps_T if T == 1 else predict_x0(x_T, eps_T, at_T)
    x_tmax = add_noise(x0_T, noise_tmax, at_tmax)
    eps_tmax = denoise(x_tmax, at_tmax).float()
    terms = {
        "l_diff": F.mse_loss(eps_t, noise_t.float()),
        "l_T": F.mse_loss(x0_T, z_hq),
        "l_tmax": F.mse_loss(predict_x0(x_tmax, eps_tmax, at_tmax), z_hq),
    }
    return terms, eps_tmax


def _summed(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return terms | {"loss": torch.stack(list(terms.values())).sum()}


def generator_loss(
    decoded: Tensor,
    target: Tensor,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    discriminator: Callable[[Tensor], Tensor] | None,
    last_layer: Tensor | None,
    gan_weight: float,
    adaptive: bool,
    divide_by_batch: bool,
    reconstruction: str = "l1",
    perceptual_weight: float = 1.0,
) -> dict[str, Tensor]:
    """The decoder's loss: reconstruction + perceptual + GAN, as named float32 scalars and their sum "loss".

    `decoded`, `target` (N, 3, H, W) in [-1, 1] (v2 clamps `decoded` first, v1 does not). "reconstruction": mean "l1"
    or "l2" error; "perceptual": mean of perceptual(target, decoded), (N, 1, 1, 1) or a scalar, times
    `perceptual_weight`; "nll": their sum, with `divide_by_batch` over N; "gan": -mean(discriminator(decoded));
    "gan_weight": its factor, `gan_weight`, with `adaptive` times the ratio of the gradients of nll and gan at
    `last_layer` (the decoder's last weight; Esser et al., "Taming Transformers", 2021, eq. 7; at most 1e4). Without a
    perceptual or discriminator, or with gan_weight = 0, the term is left out: that is how the GAN is switched off for
    the first updates.
    v1: l1, gan_weight=0.5, adaptive, divide_by_batch. v2: l2, gan_weight=0.05, neither. StableSR: l1, 0.025, divided.
    ConfigError if `adaptive` lacks `last_layer` or `reconstruction` is unknown.
    """
    if reconstruction not in ("l1", "l2"):
        raise ConfigError(f"unknown reconstruction {reconstruction!r}", where="reconstruction", todo='use "l1" or "l2"')
    decoded, target = decoded.float(), target.float()
    error = F.l1_loss if reconstruction == "l1" else F.mse_loss
    terms = {"reconstruction": error(decoded, target)}
    if perceptual is not None:
        terms["perceptual"] = perceptual_weight * perceptual(target, decoded).float().mean()
    terms["nll"] = torch.stack(list(terms.values())).sum() / (len(decoded) if divide_by_batch else 1)
    if discriminator is None or gan_weight == 0:
        return terms | {"loss": terms["nll"]}
    gan = -discriminator(decoded).float().mean()
    weight = torch.as_tensor(gan_weight, dtype=torch.float32, device=decoded.device)
    if adaptive:
        weight = weight * _gradient_ratio(terms["nll"], gan, last_layer)
    return terms | {"gan": gan, "gan_weight": weight, "loss": terms["nll"] + weight * gan}


def _gradient_ratio(nll: Tensor, gan: Tensor, last_layer: Tensor | None) -> Tensor:
    if last_layer is None:
        raise ConfigError(
            "the adaptive GAN weight needs the decoder's last layer",
            where="last_layer=None",
            todo="give the weight of the decoder's conv_out, or set adaptive=False",
        )
    nll_norm, gan_norm = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (nll, gan))
    return (nll_norm / (gan_norm + 1e-4)).clamp(0, 1e4).detach()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss, a float32 scalar; logits of any shape, the fake ones of a detached image (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def vsd_loss(x0: Tensor, learned: Denoise, frozen: Denoise, *, t: Tensor, noise: Tensor) -> Tensor:
    """Variational score distillation, a float32 scalar (Wang et al., "ProlificDreamer", 2023; OSEDiff's own form).

    `x0` (B, C, h, w): generated latents, noised to `t` int64 (B,) by `noise`. `learned`: the denoiser trained on such
    latents, `frozen`: the diffusion model's own under guidance; neither gets a gradient. The gradient on x0 is, as
    published, 2 / numel (x0 of learned - x0 of frozen) / mean |x0 - x0 of frozen|, the mean over each sample.
    """
    with torch.no_grad():
        x_t = add_noise(x0, noise, t)
        x0_learned, x0_frozen = (predict_x0(x_t, denoise(x_t, t), t) for denoise in (learned, frozen))
        weight = (x0 - x0_frozen).abs().mean(dim=(1, 2, 3), keepdim=True)
        target = x0 - (x0_learned - x0_frozen) / weight
    return F.mse_loss(x0.float(), target)
