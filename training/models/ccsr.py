"""CcsrModel: the three networks and the prompt that samplers, losses and the training loop work with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from infra.errors import ConfigError
from training.models.networks import PROMPT_TOKENS, ModelConfig, build_networks, seeded_init
from training.sampling.schedules import velocity_to_eps


@dataclass
class CcsrModel:
    """VAE, UNet, ControlNet and cached prompt embeddings, {text: float32 (1, L, C)}; "" is always among them.

    `condition_encoder` encodes the LR image where that is not the VAE's own encoder's work; its decoder is not used.
    A network may be replaced by anything that is called alike (a DeepSpeed engine, a DDP wrapper).
    """

    config: ModelConfig
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    prompts: dict[str, Tensor] = field(repr=False)
    condition_encoder: AutoencoderKL | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by name, `condition_encoder` only where there is one."""
        networks = {"vae": self.vae, "unet": self.unet, "controlnet": self.controlnet}
        return networks if self.condition_encoder is None else networks | {"condition_encoder": self.condition_encoder}

    @property
    def prompt(self) -> Tensor:
        """The empty prompt's embedding, float32 (1, L, C)."""
        return self.prompts[""]

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move and cast the networks in place; the prompts move too and stay float32."""
        for network in self.networks.values():
            nn.Module.to(network, device=device, dtype=dtype)  # diffusers' own method warns about a list that is empty
        self.prompts = {text: embedding.to(device=device) for text, embedding in self.prompts.items()}
        return self

    def encode_moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latent, float32 (B, 4, H / factor, W / factor).

        `image`: float (B, 3, H, W), RGB in [0, 1]; H and W multiples of `factor`. It enters the VAE as 2x - 1.
        """
        return _moments(self.vae, image)

    def encode_condition(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """`encode_moments` of an LR image enlarged to the HR's size, by the encoder that conditions the ControlNet.

        v1 takes the mean, v2 a sample.
        """
        return _moments(self.vae if self.condition_encoder is None else self.condition_encoder, lr)

    def encoder_id(self) -> str:
        """Identifies what the two methods above compute: 16 hex digits of a SHA-256 over the encoders' float32 weights.

        The decoder, which stage 2 trains, does not enter.
        """
        digest = hashlib.sha256()
        for vae in (self.vae, self.condition_encoder or self.vae):
            digest.update(f"{vae.config.scaling_factor}".encode())
            for name, weight in vae.state_dict().items():
                if name.startswith(("encoder.", "quant_conv.")):
                    digest.update(f"{name} {tuple(weight.shape)}".encode())
                    digest.update(weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def decode(self, latents: Tensor) -> Tensor:
        """Image float32 (B, 3, H, W) around [-1, 1], un-clamped, from scaled latents (B, 4, h, w)."""
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(_dtype(self.vae))).sample.float()

    def denoiser(self, z_lr: Tensor, prompt: Tensor | None = None) -> Callable[..., Tensor]:
        """denoise(x_t (B, 4, h, w), t int64 (B,), at=None) -> eps, float32: the UNet under the ControlNet's residuals.

        `z_lr`: scaled condition latent (b, 4, H, W) with B a multiple of b; it is repeated whole, so row i of x_t
        sees row i % b. `at` = (y, x) cuts x_t's window out of a larger z_lr: for `training.sampling.tiled`.
        `prompt`: (1 or B, L, C), default the empty one.
        """
        text = self.prompt if prompt is None else prompt

        def denoise(x_t: Tensor, t: Tensor, at: tuple[int, int] | None = None) -> Tensor:
            batch, _, height, width = x_t.shape
            condition = z_lr
            if at is not None:
                condition = z_lr[..., at[0] : at[0] + height, at[1] : at[1] + width]
            if batch % len(z_lr) or condition.shape[-2:] != x_t.shape[-2:]:
                raise ValueError(f"x_t {tuple(x_t.shape)} does not fit z_lr {tuple(z_lr.shape)} at {at}")
            condition = condition.repeat(batch // len(z_lr), 1, 1, 1)
            states = text.expand(batch, -1, -1)
            dtype = _dtype(self.controlnet)
            down, middle = self.controlnet(
                x_t.to(dtype), t, states.to(dtype), controlnet_cond=condition.to(dtype), return_dict=False
            )
            dtype = _dtype(self.unet)
            found = self.unet(
                x_t.to(dtype),
                t,
                states.to(dtype),
                down_block_additional_residuals=tuple(residual.to(dtype) for residual in down),
                mid_block_additional_residual=middle.to(dtype),
                return_dict=False,
            )[0].float()
            return velocity_to_eps(x_t, found, t) if self.config.prediction == "v" else found

        return denoise


def _moments(vae: AutoencoderKL, image: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode((2 * image - 1).to(_dtype(vae))).latent_dist
    return posterior.mean.float() * vae.config.scaling_factor, posterior.std.float() * vae.config.scaling_factor


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def build_model(config: ModelConfig, seed: int) -> CcsrModel:
    """Random float32 weights on CPU, a function of `seed` alone; the prompt embedding is zero until it is converted.

    The ControlNet starts as a copy of the UNet's encoder whose output and condition convolutions are zero, so that the
    first prediction is the UNet's own. Networks are in train mode. Raises ConfigError for preset `custom`.
    """
    if config.preset == "custom":
        raise ConfigError(
            "preset 'custom' cannot be built", where="model.preset", todo="use 'tiny' or 'sd21', or load a directory"
        )
    with seeded_init(seed):
        vae, unet, controlnet = build_networks(config.preset)
    prompt = torch.zeros(1, PROMPT_TOKENS[config.preset], unet.config.cross_attention_dim)
    return CcsrModel(config, vae, unet, controlnet, {"": prompt})
