"""CcsrModel: the networks and the prompt that samplers, losses and the training loop work with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from infra.errors import ModelError
from training.config import ModelConfig
from training.models.library import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from training.models.networks import latent_controlnet
from training.sampling.schedules import velocity_to_eps

# CCSR v2's inference defaults (its README); they act only where the guidance scale is above 1.
V2_PROMPT = "clean, high-resolution, 8k"
V2_NEGATIVE_PROMPT = "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed"


@dataclass
class CcsrModel:
    """VAE, UNet, adapter and cached prompt embeddings, {text: float32 (1, L, C)}; "" is always among them.

    The adapter shows the UNet the LR latent: here a ControlNet. Another method's model is a subclass with another
    adapter (`fresh_adapter`, `adapter_parts`, `_predict`), decoder (`decode`) and `trained_part`.
    `condition_encoder` encodes the LR image where that is not the VAE's own encoder's work; its decoder is not used.
    A network may be replaced by anything that is called alike (a DeepSpeed engine, a DDP wrapper).
    """

    config: ModelConfig
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    adapter: Any
    prompts: dict[str, Tensor] = field(repr=False)
    condition_encoder: AutoencoderKL | None = None
    cached_prompts: ClassVar[tuple[str, ...]] = ("", V2_PROMPT, V2_NEGATIVE_PROMPT)  # of a fresh model

    @staticmethod
    def fresh_adapter(unet: UNet2DConditionModel, vae: AutoencoderKL, preset: str) -> nn.Module:
        """An untrained adapter of a `preset`'s networks; random weights are drawn from torch's generator."""
        return latent_controlnet(unet)

    @property
    def adapter_parts(self) -> dict[str, nn.Module]:
        """The adapter's parts by the names under which `ccsr estimate` counts them."""
        return {"ControlNet": self.adapter}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by name, `condition_encoder` only where there is one."""
        networks = {"vae": self.vae, "unet": self.unet, self.config.facts.adapter: self.adapter}
        return networks if self.condition_encoder is None else networks | {"condition_encoder": self.condition_encoder}

    @property
    def computing(self) -> list[Any]:
        """The networks whose passes a training step computes gradients through."""
        return [self.adapter, self.unet, self.vae]

    @property
    def controlnet(self) -> ControlNetModel:
        """The adapter of a CCSR model."""
        return self.adapter

    @property
    def prompt(self) -> Tensor:
        """The empty prompt's embedding, float32 (1, L, C)."""
        return self.prompts[""]

    def embedding(self, text: str) -> Tensor:
        """A cached prompt's embedding, float32 (1, L, C); ModelError for another text."""
        if text not in self.prompts:
            raise ModelError(
                f"the model directory caches no embedding of the prompt {text!r}",
                where="prompt",
                todo=f"use one of {sorted(self.prompts)}, or convert the model again with its text encoder",
            )
        return self.prompts[text]

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

        v1 takes the mean, v2 and StableSR a sample.
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

    def trained_part(self, stage: int) -> nn.Module:
        """What a training stage's optimiser sees: the adapter; in stage 2 what turns latents into the image.

        v1 trains post_quant_conv too, v2 only what is called "decoder".
        """
        if stage != 2:
            return self.adapter
        return nn.ModuleDict({name: getattr(self.vae, name) for name in self.config.facts.decoder_parts})

    def prepare_stage2(self, seed: int) -> None:
        """Make what stage 2 trains, where stage 1's model lacks it; random weights depend on `seed`."""

    def decode(self, latents: Tensor, lr: Tensor | None = None, weight: float = 1.0) -> Tensor:
        """Image float32 (B, 3, H, W) around [-1, 1], un-clamped, from scaled latents (B, 4, h, w).

        `lr`: the enlarged LR images (B, 3, H, W) in [0, 1], which StableSR's feature wrapping follows with `weight`
        from 0 (not at all) to 1; CCSR has no use for them.
        """
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(dtype_of(self.vae))).sample.float()

    def denoiser(self, z_lr: Tensor, prompt: Tensor | None = None) -> Callable[..., Tensor]:
        """denoise(x_t (B, 4, h, w), t int64 (B,), at=None) -> eps, float32: the UNet under the adapter.

        `z_lr`: scaled condition latent (b, 4, H, W) with B a multiple of b; it is repeated whole, so row i of x_t
        sees row i % b. `at` = (y, x) cuts x_t's window out of a larger z_lr: for `training.sampling.tiled`.
        `prompt`: (1 or b, L, C), default the empty one.
        """
        text = self.prompt if prompt is None else prompt.to(z_lr.device)

        def denoise(x_t: Tensor, t: Tensor, at: tuple[int, int] | None = None) -> Tensor:
            batch, _, height, width = x_t.shape
            condition = z_lr
            if at is not None:
                condition = z_lr[..., at[0] : at[0] + height, at[1] : at[1] + width]
            if batch % len(z_lr) or condition.shape[-2:] != x_t.shape[-2:]:
                raise ValueError(f"x_t {tuple(x_t.shape)} does not fit z_lr {tuple(z_lr.shape)} at {at}")
            condition = condition.repeat(batch // len(z_lr), 1, 1, 1)
            found = self._predict(x_t, t, text.repeat(batch // len(text), 1, 1), condition).float()
            return velocity_to_eps(x_t, found, t) if self.config.prediction == "v" else found

        return denoise

    def _predict(self, x_t: Tensor, t: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        """What the UNet puts out for x_t under the condition latent; all have B rows."""
        dtype = dtype_of(self.controlnet)
        down, middle = self.controlnet(
            x_t.to(dtype), t, text.to(dtype), controlnet_cond=condition.to(dtype), return_dict=False
        )
        dtype = dtype_of(self.unet)
        return self.unet(
            x_t.to(dtype),
            t,
            text.to(dtype),
            down_block_additional_residuals=tuple(residual.to(dtype) for residual in down),
            mid_block_additional_residual=middle.to(dtype),
            return_dict=False,
        )[0]


def _moments(vae: AutoencoderKL, image: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode((2 * image - 1).to(dtype_of(vae))).latent_dist
    return posterior.mean.float() * vae.config.scaling_factor, posterior.std.float() * vae.config.scaling_factor


def dtype_of(network: nn.Module) -> torch.dtype:
    """The dtype of a network's weights."""
    return next(network.parameters()).dtype
