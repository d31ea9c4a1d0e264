"""Large latents in overlapping tiles whose noise predictions are averaged with gaussian weights."""

import torch
from torch import Tensor

from infra.errors import ConfigError, DataError
from training.sampling.samplers import Denoise, at_tile


def tile_grid(height: int, width: int, tile: int, stride: int) -> list[tuple[int, int]]:
    """Top left corners (y, x) of square tiles that cover height x width, row-major; the last ones are moved inside.

    ConfigError unless 1 <= stride <= tile; DataError if a side is shorter than the tile.
    """
    if not 1 <= stride <= tile:
        raise ConfigError(
            "tiles must overlap or touch",
            where=f"tile={tile}, stride={stride}",
            todo="choose a stride from 1 to the tile's side",
        )
    if min(height, width) < tile:
        raise DataError(
            f"{height} x {width} latent pixels are smaller than a tile of {tile}",
            where=f"tile={tile}",
            todo=f"use a tile of at most {min(height, width)}, or enlarge the image first",
        )
    rows, columns = (_starts(length, tile, stride) for length in (height, width))
    return [(y, x) for y in rows for x in columns]


def _starts(length: int, tile: int, stride: int) -> list[int]:
    return sorted({*range(0, length - tile, stride), length - tile})


def tile_weights(tile: int) -> Tensor:
    """Gaussian weights of a tile, float64 (tile, tile); variance 0.01 in units of the tile's side.

    As published (the same in CCSR, StableSR, DiffBIR), the centre is tile / 2 in y and (tile - 1) / 2 in x. The least
    of 64's weights, 3e-10, underflows in float16.
    """
    return _weights(tile, tile)


def _weights(height: int, width: int) -> Tensor:
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
        weight = _weights(height, width).float().to(x_t.device)
        total = torch.zeros_like(x_t, dtype=torch.float32)
        norm = torch.zeros(x_t.shape[-2:], dtype=torch.float32, device=x_t.device)
        for y in _starts(x_t.shape[-2], height, stride):
            for x in _starts(x_t.shape[-1], width, stride):
                window = (..., slice(y, y + height), slice(x, x + width))
                total[window] += weight * at_tile(denoise, x_t[window], t, (y, x)).float()
                norm[window] += weight
        return total / norm

    return denoise_whole
