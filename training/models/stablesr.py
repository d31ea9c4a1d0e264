"""StableSR: a time-aware encoder whose features modulate the residual blocks of a frozen UNet.

Wang et al., "Exploiting Diffusion Prior for Real-World Image Super-Resolution", IJCV 2024; numbers of the published
code, which differ from the paper's formula by a GroupNorm.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.models.ccsr import CcsrModel, dtype_of
from training.models.hooks import Hook, before_norm, hooked
from training.models.library import (
    AttnDownBlock2D,
    AutoencoderKL,
    ConfigMixin,
    DownBlock2D,
    ModelMixin,
    ResnetBlock2D,
    TimestepEmbedding,
    Timesteps,
    UNet2DConditionModel,
    UNetMidBlock2D,
    register_to_config,
)
from training.models.networks import seeded_init
from training.models.wrapping import FeatureWrapping

EPS = 1e-5
MULTIPLES = (1, 1, 2, 2)  # of the encoder's width, level by level
TINY_ADAPTER = {"width": 32, "hidden": 32}


class Sft(nn.Module):
    """h -> GroupNorm(h) * (1 + scale) + shift; both from the feature by one hidden convolution ("SPADE" there)."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=EPS)
        self.shared = nn.Conv2d(feature_channels, hidden, 3, padding=1)
        self.scale = nn.Conv2d(hidden, channels, 3, padding=1)
        self.shift = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, h: Tensor, feature: Tensor) -> Tensor:
        shared = F.relu(self.shared(feature))
        return self.norm(before_norm(h)) * (1 + self.scale(shared)) + self.shift(shared)


class TimeAwareEncoder(nn.Module):
    """The contracting half of a UNet over the LR latent and the timestep; one feature map per level.

    Attention on all levels but the coarsest. Residual branches and attention outputs start at zero, as published.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], layers: int, num_heads: int) -> None:
        super().__init__()
        first, temb = widths[0], 4 * widths[0]
        common: dict[str, Any] = {"temb_channels": temb, "resnet_eps": EPS, "num_layers": layers}
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, temb)
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        blocks: list[nn.Module] = [
            AttnDownBlock2D(before, width, attention_head_dim=width // num_heads, **common)
            for before, width in zip([first, *widths], widths[:-1], strict=False)
        ]
        blocks.append(DownBlock2D(widths[max(len(widths) - 2, 0)], widths[-1], add_downsample=False, **common))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = UNetMidBlock2D(widths[-1], temb, resnet_eps=EPS, attention_head_dim=widths[-1] // num_heads)
        self.out_blocks = nn.ModuleList(
            ResnetBlock2D(in_channels=width, out_channels=first, temb_channels=temb, eps=EPS) for width in widths
        )
        for name, parameter in self.named_parameters():
            if ".conv2." in name or ".to_out.0." in name:
                nn.init.zeros_(parameter)

    def forward(self, z_lr: Tensor, t: Tensor) -> list[Tensor]:
        """Features (B, widths[0], h / 2^l, w / 2^l) of scaled LR latents (B, 4, h, w) at `t` int64 (B,)."""
        temb = self.time_embedding(self.time_proj(t).to(z_lr.dtype))
        x, seen = self.conv_in(z_lr), []
        for block in self.down_blocks:
            x, states = block(x, temb)
            if block.downsamplers is not None:
                seen.append(states[-2])
        seen.append(self.mid_block(x, temb))
        return [block(feature, temb) for block, feature in zip(self.out_blocks, seen, strict=True)]


class StableSrAdapter(ModelMixin, ConfigMixin):
    """The time-aware encoder and one `Sft` for every residual block of a UNet; all that stage 1 trains.

    `unet_channels`, `unet_layers`: the UNet's block_out_channels and layers_per_block. Levels are identified by index,
    so any latent whose sides the UNet can halve will do.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        unet_channels: Sequence[int] = (320, 640, 1280, 1280),
        unet_layers: int = 2,
        in_channels: int = 4,
        width: int = 256,
        hidden: int = 128,
        encoder_layers: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        widths = [width * multiple for multiple in MULTIPLES[: len(unet_channels)]]
        self.encoder = TimeAwareEncoder(in_channels, widths, encoder_layers, num_heads)
        self.levels = {}
        self.sft = nn.ModuleDict()
        for place, level, channels in sft_places(unet_channels, unet_layers):
            self.levels[place] = level
            self.sft[place.replace(".", "-")] = Sft(channels, width, hidden)

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, **sizes: int) -> Self:
        """With random weights, for the residual blocks of `unet`."""
        config = unet.config
        return cls(tuple(config.block_out_channels), config.layers_per_block, config.in_channels, **sizes)

    def forward(self, z_lr: Tensor, t: Tensor) -> list[Tensor]:
        """The encoder's features; they depend on `t`, so every sampling step needs its own."""
        return self.encoder(z_lr, t)

    @contextmanager
    def attached(self, unet: UNet2DConditionModel, features: Sequence[Tensor]) -> Iterator[None]:
        """Inside the block every residual branch of `unet` passes through its `Sft` before the skip is added."""

        def hook(place: str) -> Hook:
            sft, feature = self.sft[place.replace(".", "-")], features[self.levels[place]]
            return unet.get_submodule(f"{place}.conv2"), lambda module, args, h: sft(h, feature)

        with hooked(unet, [hook(place) for place in self.levels]):
            yield


def sft_places(channels: Sequence[int], layers: int) -> Iterator[tuple[str, int, int]]:
    """(name, level, output channels) of each residual block of a diffusers UNet."""
    last = len(channels) - 1
    for level, width in enumerate(channels):
        for layer in range(layers):
            yield f"down_blocks.{level}.resnets.{layer}", level, width
    for layer in range(2):
        yield f"mid_block.resnets.{layer}", last, channels[-1]
    for block, width in enumerate(reversed(channels)):
        for layer in range(layers + 1):
            yield f"up_blocks.{block}.resnets.{layer}", last - block, width


@dataclass
class StableSrModel(CcsrModel):
    """The adapter is a `StableSrAdapter`; `wrapping`, the decoder's, is what stage 2 adds."""

    wrapping: FeatureWrapping | None = None

    @staticmethod
    def fresh_adapter(unet: UNet2DConditionModel, vae: AutoencoderKL, preset: str) -> nn.Module:
        return StableSrAdapter.for_unet(unet, **(TINY_ADAPTER if preset == "tiny" else {}))

    @property
    def adapter_parts(self) -> dict[str, nn.Module]:
        return {"time-aware encoder": self.adapter.encoder, "feature modulation": self.adapter.sft}

    @property
    def networks(self) -> dict[str, nn.Module]:
        networks = super().networks
        return networks if self.wrapping is None else networks | {"wrapping": self.wrapping}

    def trained_part(self, stage: int) -> nn.Module:
        """The adapter; in stage 2 the wrapping, which `prepare_stage2` makes."""
        return nn.ModuleDict({"wrapping": self.wrapping}) if stage == 2 else self.adapter

    def prepare_stage2(self, seed: int) -> None:
        if self.wrapping is None:
            with seeded_init(seed):
                self.wrapping = FeatureWrapping.for_vae(self.vae)

    def decode(self, latents: Tensor, lr: Tensor | None = None, weight: float = 1.0) -> Tensor:
        if self.wrapping is None or lr is None or weight == 0:
            return super().decode(latents)
        with torch.no_grad():
            features = self.wrapping.features(self.vae, (2 * lr - 1).to(dtype_of(self.vae)))
        with self.wrapping.attached(self.vae, features, weight):
            return super().decode(latents)

    def _predict(self, x_t: Tensor, t: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        features = self.adapter(condition.to(dtype_of(self.adapter)), t)
        dtype = dtype_of(self.unet)
        with self.adapter.attached(self.unet, [feature.to(dtype) for feature in features]):
            return self.unet(x_t.to(dtype), t, text.to(dtype), return_dict=False)[0]
