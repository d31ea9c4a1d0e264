"""StableSR's controllable feature wrapping: the VAE decoder's features corrected by those of the LR image."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.models.hooks import Hook, before_norm, hooked
from training.models.library import AutoencoderKL, ConfigMixin, ModelMixin, ResnetBlock2D, register_to_config


class DenseBlock(nn.Module):
    """Five densely connected convolutions, a fifth of whose result is added (Wang et al., "ESRGAN", 2018)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        outs = [growth] * 4 + [channels]
        self.convs = nn.ModuleList(nn.Conv2d(channels + i * growth, out, 3, padding=1) for i, out in enumerate(outs))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in self.convs[:-1]:
            seen = torch.cat([seen, F.leaky_relu(conv(seen), 0.2)], dim=1)
        return x + 0.2 * self.convs[-1](seen)


class Rrdb(nn.Sequential):
    """Three dense blocks, a fifth of whose result is added."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__(*(DenseBlock(channels, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * super().forward(x)


class Fusion(nn.Module):
    """dec + w r(enc, dec) on one level."""

    def __init__(self, channels: int, growth: int, groups: int) -> None:
        super().__init__()
        block: dict[str, Any] = {"out_channels": channels, "temb_channels": None, "groups": groups, "eps": 1e-6}
        self.enter = ResnetBlock2D(in_channels=2 * channels, **block)
        self.dense = nn.Sequential(Rrdb(channels, growth), Rrdb(channels, growth))
        self.leave = ResnetBlock2D(in_channels=channels, **block)

    def forward(self, enc: Tensor, dec: Tensor, weight: float) -> Tensor:
        entered = self.enter(before_norm(torch.cat([enc, dec], dim=1)), None)
        return dec + weight * self.leave(self.dense(entered), None)


class FeatureWrapping(ModelMixin, ConfigMixin):
    """One `Fusion` on every level of a VAE but the finest and the coarsest."""

    @register_to_config
    def __init__(
        self, vae_channels: tuple[int, ...] = (128, 256, 512, 512), growth: int = 32, norm_num_groups: int = 32
    ) -> None:
        super().__init__()
        self.fusions = nn.ModuleDict(
            {
                str(level): Fusion(vae_channels[level], growth, norm_num_groups)
                for level in range(1, len(vae_channels) - 1)
            }
        )

    @classmethod
    def for_vae(cls, vae: AutoencoderKL) -> Self:
        """With random weights, for `vae`."""
        return cls(tuple(vae.config.block_out_channels), norm_num_groups=vae.config.norm_num_groups)

    def features(self, vae: AutoencoderKL, image: Tensor) -> dict[str, Tensor]:
        """What the encoder of `vae` makes of the enlarged LR image (B, 3, H, W) in [-1, 1] before each downsampler."""
        found: dict[str, Tensor] = {}

        def hook(level: str) -> Hook:
            block = vae.encoder.down_blocks[int(level)].resnets[-1]
            return block, lambda module, args, feature: found.update({level: feature})

        with hooked(vae, [hook(level) for level in self.fusions]):
            vae.encoder(image)
        return found

    @contextmanager
    def attached(self, vae: AutoencoderKL, features: Mapping[str, Tensor], weight: float) -> Iterator[None]:
        """Inside the block the decoder of `vae` is wrapped; `weight` w from 0 (its own image) to 1 (the LR's shapes).

        Levels are counted from the image on, so the decoder meets the coarser one first.
        """

        def hook(level: str) -> Hook:
            block = vae.decoder.up_blocks[-1 - int(level)].resnets[-1]
            fusion, feature = self.fusions[level], features[level]
            return block, lambda module, args, dec: fusion(feature, dec, weight)

        with hooked(vae, [hook(level) for level in self.fusions]):
            yield
