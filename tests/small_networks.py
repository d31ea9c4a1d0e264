"""Small frozen networks with seeded weights, in place of the published weight files of stage 2's losses."""

import torch

from training.models import Lpips
from training.models.networks import seeded_init
from training.models.vit import VisionTransformer


def small_dino(name: str) -> VisionTransformer:
    """Stands in for training.models.load_dino."""
    with seeded_init(1):
        vit = VisionTransformer(32, 8, layer_scale=name == "dinov2", width=16, num_heads=2)
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return vit.requires_grad_(False)


def seeded_lpips() -> Lpips:
    """Stands in for training.models.load_lpips: the real size, random."""
    with seeded_init(2):
        lpips = Lpips()
        for head in lpips.heads:
            torch.nn.init.ones_(head)
    return lpips.requires_grad_(False)
