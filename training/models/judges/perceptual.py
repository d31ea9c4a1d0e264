"""Perceptual distances: LPIPS and DISTS from their published weights, or features of the frozen VAE encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.files.weights import find_weights
from training.models.directory import fill, read_checkpoint
from training.models.judges.vit import VisionTransformer, build_vit
from training.models.library import AutoencoderKL


class _Convolution(NamedTuple):
    """One layer, by its number in torchvision's `features`; a ReLU follows it."""

    number: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


TrunkName = Literal["vgg16", "alexnet"]
# The slices whose outputs are compared: relu1_2 .. relu5_3 of VGG16, relu1 .. relu5 of AlexNet.
_SLICES: dict[str, tuple[tuple[_Convolution, ...], ...]] = {
    "vgg16": tuple(
        tuple(_Convolution(number, width) for number in numbers)
        for numbers, width in (
            ((0, 2), 64),
            ((5, 7), 128),
            ((10, 12, 14), 256),
            ((17, 19, 21), 512),
            ((24, 26, 28), 512),
        )
    ),
    "alexnet": (
        (_Convolution(0, 64, 11, 4, 2),),
        (_Convolution(3, 192, 5, 1, 2),),
        (_Convolution(6, 384),),
        (_Convolution(8, 256),),
        (_Convolution(10, 256),),
    ),
}
_MAX_POOLS = {
    "vgg16": (2, (1, 2, 3, 4)),
    "alexnet": (3, (1, 2)),
}  # kernel (the stride is 2), slices that begin with one


class _Trunk(nn.Module):
    """The convolutions of VGG16 or AlexNet under torchvision's names."""

    def __init__(self, trunk: TrunkName) -> None:
        super().__init__()
        self._trunk = trunk
        self.features, previous = nn.ModuleDict(), 3
        for layers in _SLICES[trunk]:
            for layer in layers:
                self.features[str(layer.number)] = nn.Conv2d(previous, *layer[1:])
                previous = layer.width

    def slices(self, x: Tensor, pool: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """The five slices' outputs for normalised images (B, 3, H, W); `pool` replaces the max-pools."""
        kernel, pooled = _MAX_POOLS[self._trunk]
        outputs = []
        for index, layers in enumerate(_SLICES[self._trunk]):
            if index in pooled:
                x = pool(x) if pool else F.max_pool2d(x, kernel, 2)
            for layer in layers:
                x = F.relu(self.features[str(layer.number)](x))
            outputs.append(x)
        return outputs

    @property
    def widths(self) -> list[int]:
        return [layers[-1].width for layers in _SLICES[self._trunk]]

    def _normalise_by(self, shift: tuple[float, ...], scale: tuple[float, ...]) -> None:
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)


class Lpips(_Trunk):
    """LPIPS v0.1 (Zhang et al., CVPR 2018): frozen, in eval mode, so without the published head's dropout."""

    def __init__(self, trunk: TrunkName = "vgg16") -> None:
        super().__init__(trunk)
        self.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in self.widths)
        self._normalise_by((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance float (B, 1, 1, 1) of images (B, 3, H, W) in [-1, 1]; gradients reach both."""
        total = a.new_zeros(len(a), 1, 1, 1)
        x, y = (self.slices((image - self.shift) / self.scale) for image in (a, b))
        for head, of_a, of_b in zip(self.heads, x, y, strict=True):
            total = total + (head * (_unit(of_a) - _unit(of_b)) ** 2).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total


class Dists(_Trunk):
    """DISTS (Ding et al., TPAMI 2020, doi:10.1109/TPAMI.2020.3045810) on VGG16 with L2 pooling; frozen."""

    def __init__(self) -> None:
        super().__init__("vgg16")
        num_channels = 3 + sum(self.widths)  # the image itself is the first stage
        self.alpha = nn.Parameter(torch.zeros(1, num_channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, num_channels, 1, 1))
        self._normalise_by((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        hanning = torch.tensor([0.5, 1.0, 0.5])  # a Hanning window of 5 without its zeros
        self.register_buffer("window", torch.outer(hanning, hanning) / 4, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance float (B, 1, 1, 1) of images (B, 3, H, W) in [0, 1], 0 for equal ones. No resizing."""
        x, y = ([image, *self.slices((image - self.shift) / self.scale, self._l2_pool)] for image in (a, b))
        similarity = []
        for of_a, of_b in zip(x, y, strict=True):
            mean_a, mean_b = of_a.mean((2, 3), keepdim=True), of_b.mean((2, 3), keepdim=True)
            var_a = (of_a - mean_a).square().mean((2, 3), keepdim=True)
            var_b = (of_b - mean_b).square().mean((2, 3), keepdim=True)
            covariance = (of_a * of_b).mean((2, 3), keepdim=True) - mean_a * mean_b
            texture = (2 * mean_a * mean_b + 1e-6) / (mean_a.square() + mean_b.square() + 1e-6)
            structure = (2 * covariance + 1e-6) / (var_a + var_b + 1e-6)
            similarity.append((texture, structure))
        textures, structures = (torch.cat(parts, 1) for parts in zip(*similarity, strict=True))
        weighted = (self.alpha * textures + self.beta * structures).sum(1, keepdim=True)
        return 1 - weighted / (self.alpha.sum() + self.beta.sum())

    def _l2_pool(self, x: Tensor) -> Tensor:
        kernel = self.window.to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


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


def load_lpips(folder: str | None = None, trunk: TrunkName = "vgg16") -> Lpips:
    """LPIPS from torchvision's trunk and the authors' heads (`ccsr weights fetch vgg16`, `... lpips-vgg`; or alexnet,
    lpips-alex).

    `folder` as in `infra.files.weights.find_weights`. Raises ModelError where a file is missing or another.
    """
    trunk_file = find_weights(trunk, folder)
    heads_file = find_weights("lpips-vgg" if trunk == "vgg16" else "lpips-alex", folder)
    heads = {
        f"heads.{key.split('.')[0].removeprefix('lin')}": value for key, value in read_checkpoint(heads_file).items()
    }
    return fill(Lpips(trunk), _convolutions(trunk_file) | heads, f"{trunk_file} and {heads_file}")


def load_dists(folder: str | None = None) -> Dists:
    """DISTS from torchvision's VGG16 and the authors' alpha and beta; arguments and errors as for `load_lpips`."""
    trunk_file, weights_file = find_weights("vgg16", folder), find_weights("dists", folder)
    return fill(Dists(), _convolutions(trunk_file) | read_checkpoint(weights_file), f"{trunk_file} and {weights_file}")


def _convolutions(trunk: Path) -> dict[str, Tensor]:
    return {key: value for key, value in read_checkpoint(trunk).items() if not key.startswith("classifier.")}


def load_dino(name: str, folder: str | None = None) -> VisionTransformer:
    """The frozen ViT called "dino" (S/16, 224 px) or "dinov2" (S/14, 518 px), from its published file.

    Raises ModelError where the file is missing or another.
    """
    path = find_weights(name, folder)
    state = {key: value for key, value in read_checkpoint(path).items() if key != "mask_token"}
    return fill(build_vit(name), state, path).requires_grad_(False)
