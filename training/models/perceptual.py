"""Perceptual distances for stage 2: LPIPS-VGG with the published weights, or features of the frozen VAE encoder."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from infra.weights import find_weights
from training.models.directory import fill, read_checkpoint
from training.models.vit import VisionTransformer

# Convolutions of VGG16 in torchvision's numbering, by the five slices whose outputs LPIPS compares.
_SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_WIDTHS = (64, 128, 256, 512, 512)


class Lpips(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al., CVPR 2018): frozen, in eval mode, so without the published head's dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features, previous = nn.ModuleDict(), 3
        for layers, width in zip(_SLICES, _WIDTHS, strict=True):
            for layer in layers:
                self.features[str(layer)] = nn.Conv2d(previous, width, 3, padding=1)
                previous = width
        self.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in _WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance float (B, 1, 1, 1) of images (B, 3, H, W) in [-1, 1]; gradients reach both."""
        total = a.new_zeros(len(a), 1, 1, 1)
        x, y = (a - self.shift) / self.scale, (b - self.shift) / self.scale
        for index, (layers, head) in enumerate(zip(_SLICES, self.heads, strict=True)):
            if index:
                x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
            for layer in layers:
                convolution = self.features[str(layer)]
                x, y = F.relu(convolution(x)), F.relu(convolution(y))
            total = total + (head * (_unit(x) - _unit(y)) ** 2).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total


class EncoderFeatures(nn.Module):
    """Distance of the frozen VAE encoder's features: for runs that have no LPIPS weights at hand. It is not LPIPS.

    After the first convolution and after each level the features are scaled to unit length over channels, as LPIPS
    does; the squared differences are averaged over levels and places, without learned weights. Freezes the encoder.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self._encoder = (vae.encoder.requires_grad_(False),)  # in a tuple: it stays the VAE's, not a submodule here

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance float32 (B, 1, 1, 1) of images (B, 3, H, W) in [-1, 1]; gradients reach the images alone."""
        encoder = self._encoder[0]
        dtype = encoder.conv_in.weight.dtype
        x, y = encoder.conv_in(a.to(dtype)), encoder.conv_in(b.to(dtype))
        distances = [_distance(x, y)]
        for block in encoder.down_blocks:
            x, y = block(x), block(y)
            distances.append(_distance(x, y))
        return torch.stack(distances).mean(0)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (_unit(x.float()) - _unit(y.float())).square().sum(1, keepdim=True).mean((2, 3), keepdim=True)


def load_lpips(folder: str | None = None) -> Lpips:
    """LPIPS-VGG from torchvision's VGG16 and the authors' heads (`ccsr weights fetch vgg16`, `... lpips-vgg`).

    `folder` as in `infra.weights.find_weights`. Raises ModelError where a file is missing or another.
    """
    trunk, heads = find_weights("vgg16", folder), find_weights("lpips-vgg", folder)
    state = read_checkpoint(trunk)
    found = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    found |= {f"heads.{key.split('.')[0].removeprefix('lin')}": value for key, value in read_checkpoint(heads).items()}
    return fill(Lpips(), found, f"{trunk} and {heads}")


def load_dino(name: str, folder: str | None = None) -> VisionTransformer:
    """The frozen ViT called "dino" (S/16, 224 px) or "dinov2" (S/14, 518 px), from its published file.

    Raises ModelError where the file is missing or another.
    """
    path = find_weights(name, folder)
    state = {key: value for key, value in read_checkpoint(path).items() if key != "mask_token"}
    network = VisionTransformer(224, 16, layer_scale=False)
    if name == "dinov2":
        network = VisionTransformer(518, 14, layer_scale=True)
    return fill(network, state, path).requires_grad_(False)
