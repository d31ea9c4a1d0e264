"""Encode and decode images of any size in little memory, with the numbers of the VAE applied to the whole image.

Every layer runs over horizontal bands of rows. A band is read with the rows beside it that a 3x3 convolution sees, and
each activation's GroupNorm statistics are pooled over all its bands before the next layer starts, so nothing is
approximated or computed twice. Activations that exceed a budget are kept in unnamed temporary files.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.errors import DataError
from infra.process.memory import GIB
from training.models.library import AutoencoderKL
from training.models.onestep import full_weight

# What a VAE's activations may take. Constants: whole and bands round differently, and a picture must not depend on what
# else is in memory. 6.5 GiB hold the three largest of a 2048 px output in bfloat16, or 13 outputs of 512 px whole.
VAE_BYTES = {"cpu": GIB, "cuda": 13 * GIB // 2}
BAND_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
WHOLE_PLANES = 4  # live at once in diffusers' own decoder: input, normalised, activated, output
SPILLED_PLANES = 3  # live at once here: a residual block's input, hidden activation and output
SCORES = 2**26  # attention scores at a time


def plane_bytes(vae: AutoencoderKL, height: int, width: int) -> int:
    """Size of the largest activation for an image of `height` x `width` px."""
    channels = vae.config.block_out_channels
    wide = max(count / 4 ** max(0, level - 1) for level, count in enumerate(channels))
    return int(wide * height * width) * next(vae.parameters()).element_size()


def images_per_pass(vae: AutoencoderKL, height: int, width: int, budget: int) -> int:
    """How many images of this size plain diffusers may take at once within `budget` bytes; 0: use the bands."""
    return budget // (WHOLE_PLANES * plane_bytes(vae, height, width))


def check_space(vae: AutoencoderKL, height: int, width: int, budget: int, *, where: str) -> None:
    """DataError where the temporary files of an image of this size would not fit."""
    needed = SPILLED_PLANES * plane_bytes(vae, height, width) - budget
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise DataError(
            f"{width}x{height} px need {needed / GIB:.1f} GiB of temporary files, {free / GIB:.1f} are free",
            where=f"{where} ({tempfile.gettempdir()})",
            todo="set TMPDIR to a larger disk, or use a smaller scale",
        )


@torch.inference_mode()
def encode_in_bands(vae: AutoencoderKL, image: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """`CcsrModel.encode_moments` of one image (1, 3, H, W); `budget`: bytes of activations outside temporary files."""
    bands = _Bands(vae, budget)
    encoder = vae.encoder
    x = bands.conv(encoder.conv_in, Plane.of(2 * image[0] - 1, vae))
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = bands.resnet(resnet, x)
        for sampler in block.downsamplers or ():
            x = bands.conv(sampler.conv, x, down=True)
    x = bands.middle(encoder.mid_block, x)
    x = bands.conv(encoder.conv_out, x, norm=encoder.conv_norm_out, pooled=False)
    moments = vae.quant_conv(x.rows(0, x.height)[None]).float()
    mean, log_variance = moments.chunk(2, dim=1)
    scale = vae.config.scaling_factor
    return mean * scale, (0.5 * log_variance.clamp(-30, 20)).exp() * scale


@torch.inference_mode()
def decode_in_bands(vae: AutoencoderKL, latents: Tensor, budget: int) -> Tensor:
    """`CcsrModel.decode` of one scaled latent (1, 4, h, w); `budget` as in `encode_in_bands`."""
    bands = _Bands(vae, budget)
    decoder = vae.decoder
    entered = vae.post_quant_conv((latents / vae.config.scaling_factor).to(bands.dtype))
    x = bands.middle(decoder.mid_block, bands.conv(decoder.conv_in, Plane.of(entered[0], vae)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = bands.resnet(resnet, x)
        for sampler in block.upsamplers or ():
            x = bands.conv(sampler.conv, x, up=True)
    image = torch.empty(1, 3, x.height, x.width, device=latents.device)
    for first, band in bands.conv_bands(decoder.conv_out, x, norm=decoder.conv_norm_out):
        image[0, :, first : first + band.shape[1]] = band.float()
    return image


class Plane:
    """An activation (C, H, W) as a tensor, or row by row in an unnamed file; with each group's pooled statistics."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *, in_memory: bool):
        self.channels, self.height, self.width = shape
        self.dtype, self.device = dtype, device
        self.tensor = torch.empty(shape, dtype=dtype, device=device) if in_memory else None
        self._file: Any = None if in_memory else tempfile.TemporaryFile(prefix="ccsr-vae-")  # noqa: SIM115
        self._count = 0
        self.mean = self.squares = torch.zeros(())  # squares: summed squared distances from the mean

    @classmethod
    def of(cls, tensor: Tensor, vae: AutoencoderKL) -> "Plane":
        plane = cls((0, 0, 0), next(vae.parameters()).dtype, tensor.device, in_memory=True)
        plane.tensor = tensor.to(plane.dtype)
        plane.channels, plane.height, plane.width = tensor.shape
        return plane

    @property
    def num_bytes(self) -> int:
        return self.channels * self.height * self.width * self.dtype.itemsize

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first to last, (C, last - first, W)."""
        if self.tensor is not None:
            return self.tensor[:, first:last]
        rows = torch.empty(last - first, self.channels, self.width, dtype=self.dtype)
        self._file.seek(first * self.channels * self.width * self.dtype.itemsize)
        self._file.readinto(rows.view(torch.uint8).numpy())
        return rows.to(self.device).transpose(0, 1)

    def write(self, first: int, band: Tensor, num_groups: int) -> None:
        if self.tensor is not None:
            self.tensor[:, first : first + band.shape[1]] = band
        else:
            rows = band.transpose(0, 1).contiguous().cpu()
            self._file.seek(first * self.channels * self.width * self.dtype.itemsize)
            self._file.write(rows.view(torch.uint8).numpy())
        if num_groups:
            self._pool(band.reshape(num_groups, -1))

    def _pool(self, groups: Tensor) -> None:
        """Chan, Golub and LeVeque's update of mean and squared distances, in float64."""
        count = groups.shape[1]
        variance, mean = torch.var_mean(groups.to(_at_least_float(groups.dtype)), dim=1, correction=0)
        mean, squares = mean.double(), variance.double() * count
        total = self._count + count
        distance = mean - self.mean.to(mean.device)
        self.squares = self.squares.to(mean.device) + squares + distance**2 * (self._count * count / total)
        self.mean = self.mean.to(mean.device) + distance * (count / total)
        self._count = total

    def normaliser(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Scale and shift per channel, (C, 1, 1), that the pooled statistics give."""
        repeats = self.channels // norm.num_groups
        inverse = (self.squares / self._count + norm.eps).rsqrt().repeat_interleave(repeats)
        scale = norm.weight.double() * inverse
        shift = norm.bias.double() - self.mean.repeat_interleave(repeats) * scale
        dtype = _at_least_float(self.dtype)
        return scale.to(dtype)[:, None, None], shift.to(dtype)[:, None, None]

    def close(self) -> None:
        self.tensor = None
        if self._file is not None:
            self._file.close()


class _Bands:
    """The VAE's layers over bands; a method closes the planes that it takes once they are not needed."""

    def __init__(self, vae: AutoencoderKL, budget: int) -> None:
        parameter = next(vae.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self._num_groups = vae.config.norm_num_groups
        # On a host the page cache makes files cheap, and the bands need the rest.
        self._free = budget if self.device.type == "cuda" else budget // 2

    def conv(
        self, layer: nn.Conv2d, x: Plane, *, norm: nn.GroupNorm | None = None, keep: bool = False, **how: Any
    ) -> Plane:
        """A convolution of `x`; `norm`: of silu(norm(x)); `up`: of x enlarged twice; `down`: with stride 2."""
        pooled = how.pop("pooled", True)
        factor = 2 if how.get("up") else 0.5 if how.get("down") else 1
        shape = (len(layer.weight), math.floor(x.height * factor), math.floor(x.width * factor))
        out = self._plane(shape)
        for first, band in self.conv_bands(layer, x, norm=norm, **how):
            out.write(first, band, self._num_groups if pooled else 0)
        if not keep:
            self._close(x)
        return out

    def conv_bands(
        self,
        layer: nn.Conv2d,
        x: Plane,
        *,
        norm: nn.GroupNorm | None = None,
        up: bool = False,
        down: bool = False,
        shortcut: tuple[nn.Conv2d | None, Plane] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, band (C, rows, W)) of the convolution, plus `shortcut`'s plane (through its layer) there."""
        affine = x.normaliser(norm) if norm is not None else None
        weight = full_weight(layer)
        height = x.height * 2 if up else x.height // 2 if down else x.height
        width = x.width * 2 if up else x.width
        for first, last in self._split(height, max(weight.shape[:2]) * width * (4 if down else 1)):
            above, below = (first * 2, last * 2 + 1) if down else (first - 1, last + 1)
            if up:  # rows of the enlarged plane come from row // 2
                source = (max(above, 0) // 2, (min(below, height) + 1) // 2)
                band = x.rows(*source).repeat_interleave(2, 1).repeat_interleave(2, 2)
                band = band[:, max(above, 0) - 2 * source[0] : min(below, height) - 2 * source[0]]
            else:
                band = x.rows(max(above, 0), min(below, x.height))
                if affine is not None:
                    band = F.silu(_affine(band, affine), inplace=True).to(self.dtype)
            limit = height if up else x.height
            edges = (0, 1 if down else 0, max(0, -above), max(0, below - limit))
            if any(edges):  # zeros come after norm and activation, as in a padded convolution
                band = F.pad(band, edges)
            padding = (0, 0) if down else (0, 1)
            result = F.conv2d(band[None], weight, layer.bias, 2 if down else 1, padding)[0]
            if shortcut is not None:
                through, plane = shortcut
                beside = plane.rows(first, last)
                result += beside if through is None else through(beside[None])[0]
            yield first, result

    def resnet(self, block: Any, x: Plane) -> Plane:
        hidden = self.conv(block.conv1, x, norm=block.norm1, keep=True)
        out = self.conv(block.conv2, hidden, norm=block.norm2, shortcut=(block.conv_shortcut, x))
        self._close(x)
        return out

    def middle(self, block: Any, x: Plane) -> Plane:
        x = self.resnet(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                x = self._attend(attention, x)
            x = self.resnet(resnet, x)
        return x

    def _attend(self, attention: Any, x: Plane) -> Plane:
        """Attention over the whole latent: keys and values of all bands, queries a few at a time."""
        affine = x.normaliser(attention.group_norm)

        def tokens(first: int, last: int) -> Tensor:
            return _affine(x.rows(first, last), affine).to(self.dtype).flatten(1).t()

        def heads(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (attention.heads, -1)).transpose(0, 1)[None]

        bands = list(self._split(x.height, x.channels * x.width))
        keys = heads(torch.cat([attention.to_k(tokens(*band)) for band in bands]))
        values = heads(torch.cat([attention.to_v(tokens(*band)) for band in bands]))
        out = self._plane((x.channels, x.height, x.width))
        for first, last in bands:
            queries = attention.to_q(tokens(first, last))
            parts = queries.split(max(1, SCORES // (x.height * x.width)))
            seen = torch.cat([F.scaled_dot_product_attention(heads(part), keys, values)[0] for part in parts], dim=1)
            result = attention.to_out[0](seen.transpose(0, 1).flatten(1)).t()
            band = result.reshape(x.channels, last - first, x.width) + x.rows(first, last)
            out.write(first, band / attention.rescale_output_factor, self._num_groups)
        self._close(x)
        return out

    def _split(self, height: int, numbers_per_row: int) -> Iterator[tuple[int, int]]:
        size = torch.empty(0, dtype=_at_least_float(self.dtype)).element_size()
        rows = max(1, BAND_BYTES[self.device.type] // (numbers_per_row * size))
        return ((first, min(first + rows, height)) for first in range(0, height, rows))

    def _plane(self, shape: tuple[int, int, int]) -> Plane:
        in_memory = math.prod(shape) * self.dtype.itemsize <= self._free
        plane = Plane(shape, self.dtype, self.device, in_memory=in_memory)
        self._free -= plane.num_bytes if in_memory else 0
        return plane

    def _close(self, plane: Plane) -> None:
        self._free += plane.num_bytes if plane.tensor is not None else 0
        plane.close()


def _affine(band: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
    scale, shift = affine
    return torch.addcmul(shift, band.to(scale.dtype), scale)


def _at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
