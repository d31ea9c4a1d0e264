"""Small networks: frozen ones with seeded weights in place of stage 2's weight files, and a tenth of `preset: tiny`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training.models import Lpips
from training.models.networks import UNET_CONFIGS, VAE_CONFIGS, seeded_init
from training.models.vit import VisionTransformer


@contextmanager
def smaller_tiny() -> Iterator[None]:
    """Inside the block `preset: tiny` is smaller still: bf16 costs twenty times fp32 on a CPU without it."""
    sizes = ((VAE_CONFIGS, (8, 8, 16)), (UNET_CONFIGS, (8, 16)))
    kept = [configs["tiny"] for configs, _ in sizes]
    for configs, channels in sizes:
        configs["tiny"] = configs["tiny"] | {"block_out_channels": channels}
    try:
        yield
    finally:
        for (configs, _), one in zip(sizes, kept, strict=True):
            configs["tiny"] = one


def small_dino(name: str) -> VisionTransformer:
    """Replaces training.models.load_dino."""
    with seeded_init(1):
        vit = VisionTransformer(32, 8, layer_scale=name == "dinov2", width=16, num_heads=2)
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return vit.requires_grad_(False)


def seeded_lpips() -> Lpips:
    """Replaces training.models.load_lpips: the real size, random."""
    with seeded_init(2):
        lpips = Lpips()
        for head in lpips.heads:
            torch.nn.init.ones_(head)
    return lpips.requires_grad_(False)
