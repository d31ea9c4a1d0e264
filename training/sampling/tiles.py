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
    rows, columns = (sorted({*range(0, length - tile, stride), length - tile}) for length in (height, width))
    return [(y, x) for y in rows for x in columns]


def tile_weights(tile: int) -> Tensor:
    """Gaussian weights of a tile, float64 (tile, tile); variance 0.01 in units of the tile's side.

    As published (the same in CCSR, StableSR, DiffBIR), the centre is tile / 2 in y and (tile - 1) / 2 in x. The least
    of 64's weights, 3e-10, underflows in float16.
    """
    k = torch.arange(tile, dtype=torch.float64)
    y, x = (
        torch.exp(-((k - centre) ** 2) / tile**2 / 0.02) / (2 * torch.pi * 0.01) ** 0.5
        for centre in (tile / 2, (tile - 1) / 2)
    )
    return torch.outer(y, x)


def tiled(denoise: Denoise, tile: int, stride: int) -> Denoise:
    """A denoiser of whole latents that calls `denoise(x_tile, t, (y, x))` on each tile (sides in latent pixels).

    The position lets `denoise` cut its condition; one that takes two arguments is called without it. The average is
    float32, weighted; errors are those of `tile_grid`.
    """
    weights = tile_weights(tile).float()

    def denoise_whole(x_t: Tensor, t: Tensor) -> Tensor:
        weight = weights.to(x_t.device)
        total = torch.zeros_like(x_t, dtype=torch.float32)
        norm = torch.zeros(x_t.shape[-2:], dtype=torch.float32, device=x_t.device)
        for y, x in tile_grid(x_t.shape[-2], x_t.shape[-1], tile, stride):
            window = (..., slice(y, y + tile), slice(x, x + tile))
            total[window] += weight * at_tile(denoise, x_t[window], t, (y, x)).float()
            norm[window] += weight
        return total / norm

    return denoise_whole
