"""The networks of CCSR, as configurations of diffusers classes: VAE, UNet, and a ControlNet that sees the LR latent."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import ModelError
from training.models.library import AutoencoderKL, ControlNetModel, UNet2DConditionModel

# tiny: 4.36 M parameters, a 4-fold VAE and no text.  sd21: Stable Diffusion 2.1-base (Rombach et al., CVPR 2022).
VAE_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (32, 48, 96),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
    "sd21": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
}
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (64, 96),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    },
    "sd21": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),  # diffusers' name; the numbers are head counts, every head is 64 wide
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
CONDITION = "controlnet_cond_embedding"
PROMPT_TOKENS = {"tiny": 1, "sd21": 77}


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Let torch's CPU initialisers draw from `seed` inside the block; the caller's generator is as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def latent_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet for `unet` whose condition is a latent: sample = conv_in(x_t) + conv(z_lr), no RGB hint encoder.

    Encoder and middle start as copies of the UNet's; the output convolutions and the condition's are zero. One
    convolution over concat([x_t, z_lr]), as in CCSR v1, is the same map with its weight split in two; v2 calls the
    second half `condition_conv_in`. Here it takes diffusers' name for the place, `controlnet_cond_embedding`.
    """
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_channels=unet.config.in_channels, conditioning_embedding_out_channels=(16,)
    )
    return with_latent_condition(controlnet)


def with_latent_condition(controlnet: ControlNetModel) -> ControlNetModel:
    """Replace the RGB hint encoder by one zero 3x3 convolution over a latent."""
    channels = controlnet.config.conditioning_channels, controlnet.config.block_out_channels[0]
    condition = nn.Conv2d(*channels, kernel_size=3, padding=1)
    nn.init.zeros_(condition.weight)
    nn.init.zeros_(condition.bias)
    controlnet.controlnet_cond_embedding = condition
    controlnet.register_to_config(conditioning_embedding_out_channels=(2 * channels[0],))  # see `to_stock_condition`
    return controlnet


def to_stock_condition(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet's tensors in the form that an unchanged diffusers ControlNetModel computes the same map with.

    Its hint encoder is conv_out(silu(conv_in(z))). With conv_in(z) = (z, -z) and conv_out = (W, -W) that is W z,
    because silu(z) - silu(-z) = z.
    """
    state = dict(state)
    weight = state.pop(f"{CONDITION}.weight")
    state[f"{CONDITION}.conv_out.weight"] = torch.cat([weight, -weight], dim=1)
    state[f"{CONDITION}.conv_out.bias"] = state.pop(f"{CONDITION}.bias")
    state[f"{CONDITION}.conv_in.weight"] = _copy_and_negation(weight)
    state[f"{CONDITION}.conv_in.bias"] = weight.new_zeros(2 * weight.shape[1])
    return state


def from_stock_condition(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The inverse of `to_stock_condition`; tensors without a hint encoder stay. ModelError where it is another one."""
    state = dict(state)
    names = [f"{CONDITION}.{layer}.{leaf}" for layer in ("conv_in", "conv_out") for leaf in ("weight", "bias")]
    if not set(names) <= set(state):
        return state
    enter, enter_bias, leave, bias = (state.pop(name) for name in names)
    weight, negated = leave.chunk(2, dim=1)
    expected = _copy_and_negation(weight)
    if enter.shape != expected.shape or enter_bias.any() or not torch.equal(enter, expected):
        raise ModelError(
            f"tensor {names[0]} is of an RGB hint encoder, not of one that passes the LR latent on",
            where=where,
            todo="give a CCSR ControlNet",
        )
    if not torch.equal(weight, -negated):
        raise ModelError(
            f"tensor {names[2]} does not hold a convolution and its negation: it was trained in another form",
            where=where,
            todo="train with ccsr train, which keeps one convolution",
        )
    return state | {f"{CONDITION}.weight": weight.contiguous(), f"{CONDITION}.bias": bias}


def _copy_and_negation(weight: Tensor) -> Tensor:
    """The kernel of z -> (z, -z) for a condition convolution's weight (C, channels, 3, 3)."""
    channels = weight.shape[1]
    kernel = weight.new_zeros(2 * channels, channels, 3, 3)
    kernel[:channels, :, 1, 1] = torch.eye(channels)
    kernel[channels:, :, 1, 1] = -torch.eye(channels)
    return kernel


def build_networks(preset: str) -> tuple[AutoencoderKL, UNet2DConditionModel]:
    """VAE and UNet of a preset, initialised by torch's defaults on the current default device."""
    return AutoencoderKL(**VAE_CONFIGS[preset]), UNet2DConditionModel(**UNET_CONFIGS[preset])
