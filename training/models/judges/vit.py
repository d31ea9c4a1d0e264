"""A small frozen vision transformer that loads the published DINO and DINOv2 weight files under their own names."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VisionTransformer(nn.Module):
    """ViT-S with a class token and learned positions (Dosovitskiy et al., ICLR 2021).

    DINO (Caron et al., ICCV 2021): patch 16, 224 px. DINOv2 (Oquab et al., TMLR 2024): patch 14, 518 px, and
    `layer_scale`. Images of another size are refused: positions are not interpolated.
    """

    def __init__(
        self, image_px: int, patch_px: int, *, layer_scale: bool, width: int = 384, depth: int = 12, num_heads: int = 6
    ) -> None:
        super().__init__()
        self.image_px = image_px
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_px, stride=patch_px)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_px // patch_px) ** 2, width))
        self.blocks = nn.ModuleList(_Block(width, num_heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, image: Tensor, taps: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """The class token after the last norm, float (B, width), and the tokens (B, 1 + N, width) at `taps`.

        Tap i is block i's output; tap -1 the input of block 0, positions added. `image`: (B, 3, image_px, image_px),
        normalised as the weights expect.
        """
        if image.shape[-2:] != (self.image_px, self.image_px):
            raise ValueError(f"image {tuple(image.shape)} is not {self.image_px} px square")
        patches = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1) + self.pos_embed
        found = {-1: tokens}
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            found[index] = tokens
        return self.norm(tokens)[:, 0], {tap: found[tap] for tap in taps}


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, layer_scale: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1: Any = _Scale(width) if layer_scale else nn.Identity()
        self.ls2: Any = _Scale(width) if layer_scale else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        qkv = self.attn["qkv"](self.norm1(tokens)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(batch, length, width)
        tokens = tokens + self.ls1(self.attn["proj"](mixed))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(tokens)))
        return tokens + self.ls2(self.mlp["fc2"](hidden))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


def build_vit(name: str) -> VisionTransformer:
    """The ViT-S called "dino" (patch 16, 224 px) or "dinov2" (patch 14, 518 px), with zero and random weights."""
    if name == "dinov2":
        return VisionTransformer(518, 14, layer_scale=True)
    return VisionTransformer(224, 16, layer_scale=False)
