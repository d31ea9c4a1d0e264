"""Stage 2, the decoder's adversarial fine-tuning: its input latents and its losses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import ConfigError
from training.sampling import (
    Denoise,
    DrawNoise,
    add_noise,
    sample_ccsr_v1,
    sample_ccsr_v2,
    sample_uniform,
    starting_point,
)
from training.sampling.schedules import LAST_TIMESTEP


@torch.no_grad()
def stage2_latents_v1(
    denoise: Denoise, z_hq: Tensor, *, noise: DrawNoise, num_steps: int, t_max: float, t_min: float
) -> Tensor:
    """v1's truncated chain from the noised HQ latent: x0 at t_min, float32 (B, C, H, W), without gradients.

    As published, one draw serves both the start at 999 and the re-noising at t_max; the rest as in `sample_ccsr_v1`.
    """
    first = noise(z_hq.shape)
    reused = [first]
    x_T = add_noise(z_hq, first, torch.full((len(z_hq),), LAST_TIMESTEP, device=z_hq.device))
    return sample_ccsr_v1(
        denoise,
        x_T,
        num_steps=num_steps,
        t_max=t_max,
        t_min=t_min,
        noise=lambda shape: reused.pop() if reused else noise(shape),
    )


@torch.no_grad()
def stage2_latents_v2(
    denoise: Denoise, z_lr: Tensor, *, noise: DrawNoise, num_steps: int, t_max: float, t_min: float
) -> Tensor:
    """v2's chain from the noised LR latent (published: one step, x0 at 999), float32 (B, C, H, W), without gradients.

    Draws are those of `sample_ccsr_v2`. Give z_hq in place of z_lr to start from the HQ latent.
    """
    return sample_ccsr_v2(denoise, z_lr, num_steps=num_steps, t_max=t_max, t_min=t_min, start="lr", noise=noise)


@torch.no_grad()
def stage2_latents_stablesr(denoise: Denoise, z_lr: Tensor, *, noise: DrawNoise, num_steps: int) -> Tensor:
    """StableSR's whole chain (published: 200 steps) from the noised LR latent, float32 (B, C, H, W), no gradients."""
    return sample_uniform(denoise, starting_point(z_lr, "lr", noise), num_steps=num_steps, noise=noise)


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
) -> dict[str, Tensor]:
    """The decoder's loss: reconstruction + perceptual + GAN, as named float32 scalars and their sum "loss".

    `decoded`, `target` (N, 3, H, W) in [-1, 1] (v2 clamps `decoded` first, v1 does not). "reconstruction": mean "l1"
    or "l2" error; "perceptual": mean of perceptual(target, decoded), (N, 1, 1, 1) or a scalar; "nll": their sum, with
    `divide_by_batch` over N; "gan": -mean(discriminator(decoded)); "gan_weight": its factor, `gan_weight`, with
    `adaptive` times the ratio of the gradients of nll and gan at `last_layer` (the decoder's last weight; Esser et al.,
    "Taming Transformers", 2021, eq. 7; at most 1e4). Without a perceptual or discriminator, or with gan_weight = 0,
    the term is left out: that is how the GAN is switched off for the first updates.
    v1: l1, gan_weight=0.5, adaptive, divide_by_batch. v2: l2, gan_weight=0.05, neither. StableSR: l1, 0.025, divided.
    ConfigError if `adaptive` lacks `last_layer` or `reconstruction` is unknown.
    """
    if reconstruction not in ("l1", "l2"):
        raise ConfigError(f"unknown reconstruction {reconstruction!r}", where="reconstruction", todo='use "l1" or "l2"')
    decoded, target = decoded.float(), target.float()
    error = F.l1_loss if reconstruction == "l1" else F.mse_loss
    terms = {"reconstruction": error(decoded, target)}
    if perceptual is not None:
        terms["perceptual"] = perceptual(target, decoded).float().mean()
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
