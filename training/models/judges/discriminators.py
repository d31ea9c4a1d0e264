"""Discriminators of stage 2: PatchGAN (v1), and heads on frozen DINO features (v2)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import ParametrizationList

from training.models.judges.vit import VisionTransformer
from training.models.networks import seeded_init

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TAPS = (2, 5, 8, 11, -1)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., CVPR 2017), as CCSR v1 uses it: 4x4 convolutions, BatchNorm, LeakyReLU 0.2.

    `n_layers` halvings (the first without norm), one more layer at stride 1, then one logit per patch. Convolutions are
    drawn from N(0, 0.02), norm weights from N(1, 0.02), all from `seed`. BatchNorm always takes the statistics of the
    batch it is given and keeps no running ones: nothing reads them, and each rank would have its own.
    """

    def __init__(self, ndf: int = 64, n_layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        with seeded_init(seed):
            layers: list[nn.Module] = [nn.Conv2d(3, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            width = ndf
            for index in range(1, n_layers + 1):
                previous, width = width, ndf * min(2**index, 8)
                stride = 2 if index < n_layers else 1
                layers += [
                    nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(width, track_running_stats=False),
                    nn.LeakyReLU(0.2),
                ]
            layers.append(nn.Conv2d(width, 1, 4, padding=1))
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, 0.0, 0.02)
                elif isinstance(layer, nn.BatchNorm2d):
                    nn.init.normal_(layer.weight, 1.0, 0.02)
        self.main = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Logits float (B, 1, h, w) for images (B, 3, H, W) in [-1, 1]; with 3 layers h = H / 8 - 2."""
        return self.main(image)


class ProjectedDiscriminator(nn.Module):
    """Five trained heads on features of a frozen DINO ViT-S/16, conditioned on a DINOv2 embedding of the LR image.

    The discriminator of StyleGAN-T (Sauer et al., ICML 2023), as CCSR v2 uses it. `dino` and `dinov2` come from
    `training.models.load_dino`; their weights are frozen and left out of `state_dict`'s trained part, `heads`.
    The heads' spectral norms change in `power_iteration` alone, never in a forward pass.
    """

    def __init__(self, dino: VisionTransformer, dinov2: VisionTransformer, seed: int = 0) -> None:
        super().__init__()
        self.dino = dino.requires_grad_(False)
        self.dinov2 = dinov2.requires_grad_(False)
        width, condition = dino.cls_token.shape[-1], dinov2.cls_token.shape[-1]
        with seeded_init(seed):
            self.heads = nn.ModuleList(DiscriminatorHead(width, condition) for _ in TAPS)
        self.eval()

    def train(self, mode: bool = True) -> "ProjectedDiscriminator":
        """Stays in eval mode: in train mode a spectral norm would iterate in each of a rank's forward passes."""
        return super().train(False)

    @torch.no_grad()
    def condition(self, lr: Tensor) -> Tensor:
        """DINOv2's class token, float (B, 384), of LR images (B, 3, h, w) in [0, 1]: bilinear to 518 px, and, as
        published, without ImageNet's normalisation."""
        size = (self.dinov2.image_px, self.dinov2.image_px)
        return self.dinov2(F.interpolate(lr, size, mode="bilinear", align_corners=False))[0]

    def forward(self, image: Tensor, condition: Tensor, rngs: Sequence[np.random.Generator] | None = None) -> Tensor:
        """Logits float (B, 5 * N) for images (B, 3, H, W) in [-1, 1] and `condition(lr)`; N patches of a 224 px view.

        `rngs`, one generator per row, draw that row's augmentation (translation, cutout) and its view: a random 224 px
        crop or the whole image, even odds. None: the whole image as it is. Gradients reach the image.
        """
        size = self.dino.image_px
        if rngs is None:
            views = F.interpolate((image + 1) / 2, (size, size), mode="area")
        else:
            rows = (_random_view(augment(row, rng), size, rng) for row, rng in zip(image, rngs, strict=True))
            views = torch.stack(list(rows))
        mean, std = (
            torch.tensor(value, device=image.device).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD)
        )
        _, taps = self.dino((views - mean) / std, TAPS)
        logits = []
        for head, tap in zip(self.heads, TAPS, strict=True):
            tokens = taps[tap]
            features = (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2)
            logits.append(head(features, condition).flatten(1))
        return torch.cat(logits, dim=1)


@torch.no_grad()
def power_iteration(module: nn.Module) -> None:
    """One power iteration of each spectral norm in `module`, which is in eval mode: for after each update."""
    for part in module.modules():
        if isinstance(part, ParametrizationList):
            part.train()
            part()  # computes the weight, in train mode after an iteration
            part.eval()


class DiscriminatorHead(nn.Module):
    """One head: (B, width, N) features and (B, condition) -> (B, 1, N) logits, a projection onto the condition."""

    def __init__(self, width: int, condition: int, projection: int = 64) -> None:
        super().__init__()
        self.enter = _head_block(width, 1)
        self.mix = _head_block(width, 9)
        self.classify = spectral_norm(nn.Conv1d(width, projection, 1))
        # Equalised learning rate (Karras et al., ICLR 2018): N(0, 1) weights, scaled where they are used.
        self.map_weight = nn.Parameter(torch.randn(projection, condition))
        self.map_bias = nn.Parameter(torch.zeros(projection))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        hidden = self.enter(features)
        hidden = (self.mix(hidden) + hidden) / 2**0.5
        weight, bias = self.map_weight, self.map_bias
        target = F.linear(condition, weight / weight.shape[1] ** 0.5, bias)
        return (self.classify(hidden) * target[..., None]).sum(1, keepdim=True) / weight.shape[0] ** 0.5


def _head_block(width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(convolution), nn.GroupNorm(4, width), nn.LeakyReLU(0.2))


def augment(image: Tensor, rng: np.random.Generator) -> Tensor:
    """DiffAugment (Zhao et al., NeurIPS 2020) of one image (3, H, W): shift by up to 1/8, cut out a square of 1/5.

    Both leave zeros; differentiable. Draws: shift y, x; then the square's centre y, x.
    """
    _, height, width = image.shape
    shifts = [int(side * 0.125 + 0.5) for side in (height, width)]
    dy, dx = (int(rng.integers(-shift, shift + 1)) for shift in shifts)
    image = F.pad(image, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)))
    image = image[:, max(-dy, 0) : max(-dy, 0) + height, max(-dx, 0) : max(-dx, 0) + width]
    mask = torch.ones_like(image[:1])
    starts = []
    sides = [int(side * 0.2 + 0.5) for side in (height, width)]
    for length, side in zip((height, width), sides, strict=True):
        starts.append(int(rng.integers(0, length + 1 - side % 2)) - side // 2)
    (y, x), (tall, wide) = starts, sides
    mask[:, max(y, 0) : max(y + tall, 0), max(x, 0) : max(x + wide, 0)] = 0
    return image * mask


def _random_view(image: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """(3, size, size) in [0, 1] of an image (3, H, W) in [-1, 1]: by even odds a crop at full resolution, or all."""
    image = (image + 1) / 2
    crop = rng.random() < 0.5
    _, height, width = image.shape
    if crop and min(height, width) > size:
        y, x = (int(rng.integers(0, side - size + 1)) for side in (height, width))
        return image[:, y : y + size, x : x + size]
    return F.interpolate(image[None], (size, size), mode="area")[0]
