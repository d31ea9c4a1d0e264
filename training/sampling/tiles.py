"""Large latents in overlapping tiles whose noise predictions are averaged with gaussian weights."""

import torch
from torch import Tensor

from infra.errors import ConfigError, DataError
from training.sampling.samplers import Denoise, at_tile


def tile_grid(height: int, width: int, tile: int | tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """Top left corners (y, x) of tiles that cover height x width, row-major; the last ones are moved inside.

    `tile`: its side, or its height and width. ConfigError unless stride is at least 1 and, where a side takes several
    tiles, at most theirs; DataError if a side is shorter than the tile.
    """
    sides = list(zip((height, width), (tile, tile) if isinstance(tile, int) else tile, strict=True))
    if stride < 1 or any(side < min(length, stride) for length, side in sides):
        raise ConfigError(
            "tiles must overlap or touch",
            where=f"tile={tile}, stride={stride}",
            todo="choose a stride from 1 to the tile's side",
        )
    if any(length < side for length, side in sides):
        raise DataError(
            f"{height} x {width} latent pixels are smaller than a tile of {tile}",
            where=f"tile={tile}",
            todo=f"use a tile of at most {min(height, width)}, or enlarge the image first",
        )
    rows, columns = (sorted({*range(0, length - side, stride), length - side}) for length, side in sides)
    return [(y, x) for y in rows for x in columns]


def tile_weights(tile: int | tuple[int, int]) -> Tensor:
    """Gaussian weights of a tile, given as in `tile_grid`: float64, of its height and width; variance 0.01 in units of
    the tile's side.

    As published (the same in CCSR, StableSR, DiffBIR), the centre is height / 2 in y and (width - 1) / 2 in x. The
    least of 64's weights, 3e-10, underflows in float16.
    """
    height, width = (tile, tile) if isinstance(tile, int) else tile
    y, x = (
        torch.exp(-((torch.arange(side, dtype=torch.float64) - centre) ** 2) / side**2 / 0.02)
        / (2 * torch.pi * 0.01) ** 0.5
        for side, centre in ((height, height / 2), (width, (width - 1) / 2))
    )
    return torch.outer(y, x)


def tiled(denoise: Denoise, tile: int, stride: int) -> Denoise:
    """A denoiser of whole latents that calls `denoise(x_tile, t, (y, x))` on each tile (sides in latent pixels).

    The position lets `denoise` cut its condition; one that takes two arguments is called without it. The average is
    float32, weighted. Tiles are square, but only as high or wide as latents that are smaller than `tile`.
    """

    def denoise_whole(x_t: Tensor, t: Tensor) -> Tensor:
        height, width = (min(tile, side) for side in x_t.shape[-2:])
        weight = tile_weights((height, width)).float().to(x_t.device)
        total = torch.zeros_like(x_t, dtype=torch.float32)
        norm = torch.zeros(x_t.shape[-2:], dtype=torch.float32, device=x_t.device)
        for y, x in tile_grid(x_t.shape[-2], x_t.shape[-1], (height, width), stride):
            window = (..., slice(y, y + height), slice(x, x + width))
            total[window] += weight * at_tile(denoise, x_t[window], t, (y, x)).float()
            norm[window] += weight
        return total / norm

    return denoise_whole
