"""Restore LR images with recorded seeds: plain PyTorch, runs and images of one size together in a batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from infra.errors import ConfigError, DataError
from infra.files.storage import join, read_json
from infra.process.memory import GIB, free_memory
from infra.seeding import Noise, noise_for
from training.config import FAMILIES, SamplingConfig
from training.method import METHODS
from training.models import CcsrModel
from training.restore.banded_vae import (
    VAE_BYTES,
    WHOLE_PLANES,
    check_space,
    decode_in_bands,
    encode_in_bands,
    images_per_pass,
    plane_bytes,
)
from training.restore.published_sizes import ColorFix, finish, network_input, reflect
from training.sampling import Denoise, color_fix, guided, predict_x0, tiled

IMAGE_BYTES = 60  # per pixel: five float32 RGB images live at once
ROWS_AT_ONCE = 8  # (image, run) pairs in a batch
UNET_MAPS = 32  # activations of the first level's size live at once in ControlNet and UNet


@dataclass(frozen=True)
class PreparedImage:
    """What all runs of an image share. `enlarged`: the LR at the networks' size (1, 3, H, W) in [0, 1]; `mean`, `std`:
    its scaled latent's moments (1, 4, h, w), of the padded image; `size`: the output's (H, W); `levels`: its white."""

    key: str
    size: tuple[int, int]
    enlarged: Tensor
    mean: Tensor
    std: Tensor
    levels: int = 255


def check_sampling(uri: str, config: SamplingConfig) -> None:
    """Before the model directory at `uri` is loaded: ConfigError where a field of `config` has no effect on it."""
    family = read_json(join(uri, "ccsr.json")).get("family")
    try:
        if family in FAMILIES:  # of another one `load_model` says what is wrong
            config.check_family(family)
    except ValueError as error:
        raise ConfigError(str(error), where=f"sampling of {uri}", todo="remove this field from `sampling`") from error


def rows_at_once_on(device: str, fitting: int = ROWS_AT_ONCE) -> int:
    """(image, run) pairs in a batch: `fitting` on a GPU. A CPU gains nothing from batches, and alone a row has the same
    bytes whatever else is restored."""
    return 1 if device == "cpu" else fitting


def restore_runs(
    model: CcsrModel,
    lr: np.ndarray,
    size: tuple[int, int],
    config: SamplingConfig,
    *,
    seed: int,
    key: str,
    runs: Sequence[int],
    rows_at_once: int = ROWS_AT_ONCE,
) -> Iterator[np.ndarray]:
    """Yield one uint8 (H, W, 3) RGB image of `size` = (H, W) per run.

    `lr` is uint8 (h, w, 3) RGB. Run r's noise depends on (seed, key, r) alone. Errors as of `prepare_image`.
    """
    image = prepare_image(model, lr, size, config, key=key, num_runs=min(rows_at_once, len(runs)))
    for first in range(0, len(runs), rows_at_once):
        yield from restore_batch(model, [(image, run) for run in runs[first : first + rows_at_once]], config, seed=seed)


@torch.inference_mode()
def prepare_image(
    model: CcsrModel,
    lr: np.ndarray,
    size: tuple[int, int],
    config: SamplingConfig,
    *,
    key: str,
    num_runs: int = 1,
    vae_bytes: int | None = None,
) -> PreparedImage:
    """Enlarge `lr`, uint8 or uint16 (h, w, 3) RGB, to `size` = (H, W), pad it by reflection, and encode it once.

    uint16 is never rounded to 8 bits; its restorations are uint16 too (only with `sizes: pad`, else DataError).
    `vae_bytes`: budget of the VAE's activations, default VAE_BYTES. DataError for an output under 2 px, and where
    `num_runs` runs together or the VAE's temporary files would not fit what is free.
    """
    height, width = size
    if min(height, width) < 2:
        raise DataError(
            f"{lr.shape[1]}x{lr.shape[0]} px to {width}x{height} px is too small to restore",
            where=key,
            todo="use a larger image",
        )
    device = next(model.vae.parameters()).device
    budget = VAE_BYTES[device.type] if vae_bytes is None else vae_bytes
    _check_memory(model, size, config, num_runs, budget, key)
    enlarged = network_input(lr, size, config, where=key).to(device)
    unit = model.factor * (latent_unit(model) if config.sizes == "pad" else 1)
    padded = reflect(enlarged, -enlarged.shape[-2] % unit, -enlarged.shape[-1] % unit)
    encoder = model.vae if model.condition_encoder is None else model.condition_encoder
    if images_per_pass(encoder, padded.shape[-2], padded.shape[-1], budget):
        mean, std = model.encode_condition(padded)
    else:
        mean, std = encode_in_bands(encoder, padded, budget)
    return PreparedImage(key, size, enlarged, mean, std, np.iinfo(lr.dtype).max)


@torch.inference_mode()
def restore_batch(
    model: CcsrModel,
    rows: Sequence[tuple[PreparedImage, int]],
    config: SamplingConfig,
    *,
    seed: int,
    vae_bytes: int | None = None,
    fix: ColorFix = color_fix,
) -> Iterator[np.ndarray]:
    """Yield one (H, W, 3) RGB image, uint8 or uint16 as its LR, per row = (image, run); all latents have one shape.

    The latents of all rows are computed together; they are decoded as many at a time as fit `vae_bytes`. `fix`: of the
    colours.
    """
    latents = sample_rows(model, rows, config, seed)
    yield from decode_images(model, latents, [image for image, _ in rows], config, vae_bytes, fix)


def sample_rows(
    model: CcsrModel,
    rows: Sequence[tuple[PreparedImage, int]],
    config: SamplingConfig,
    seed: int,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The latents of rows = (image, run), as in `restore_batch`; `watch` as in `sample_latents`."""
    images = [image for image, _ in rows]
    noise = noise_for(seed, [(image.key, run) for image, run in rows], images[0].mean.device, torch.float32)
    mean, std = (torch.cat(moments) for moments in zip(*((image.mean, image.std) for image in images), strict=True))
    return sample_latents(model, mean, std, config, noise, watch)


def decode_images(
    model: CcsrModel,
    latents: Tensor,
    images: Sequence[PreparedImage],
    config: SamplingConfig,
    vae_bytes: int | None = None,
    fix: ColorFix = color_fix,
) -> Iterator[np.ndarray]:
    """The images, (H, W, 3) RGB, uint8 or uint16 as their LR, of one latent each. DataError where one is not finite."""
    padded = torch.cat([_padded(model, image) for image in images]) if _wrapped(model, config) else None
    for image, pixels in zip(images, decode_rows(model, latents, vae_bytes, padded, config.wrapping), strict=True):
        epsilon = METHODS[model.config.family].color_epsilon
        yield finish(pixels, image.enlarged, image.size, config, epsilon, image.levels, fix)


def _padded(model: CcsrModel, image: PreparedImage) -> Tensor:
    """The enlarged LR (1, 3, H, W) at the size that was encoded."""
    (height, width), (h, w) = image.enlarged.shape[-2:], image.mean.shape[-2:]
    return reflect(image.enlarged, h * model.factor - height, w * model.factor - width)


def decode_rows(
    model: CcsrModel, latents: Tensor, vae_bytes: int | None = None, lr: Tensor | None = None, wrapping: float = 0.5
) -> Iterator[Tensor]:
    """Per latent (4, h, w) of a batch the image (1, 3, H, W) around [0, 1]; as many together as `vae_bytes` allow.

    `lr`: the enlarged LR images for StableSR's feature wrapping, which needs the VAE whole, at least image by image.
    """
    height, width = (side * model.factor for side in latents.shape[-2:])
    budget = VAE_BYTES[latents.device.type] if vae_bytes is None else vae_bytes
    together = images_per_pass(model.vae, height, width, budget)
    size = max(1, together)
    conditions = repeat(None) if lr is None else lr.split(size)
    for part, condition in zip(latents.split(size), conditions, strict=False):
        if together or condition is not None:
            decoded = model.decode(part, condition, wrapping)
        else:
            decoded = decode_in_bands(model.vae, part, budget)
        yield from decoded.add_(1).div_(2).split(1)


def _check_memory(
    model: CcsrModel, size: tuple[int, int], config: SamplingConfig, num_runs: int, budget: int, key: str
) -> None:
    """DataError where an estimate of what restoring takes exceeds the memory or disk that is free."""
    device = next(model.vae.parameters()).device
    height, width = (max(side, 512) for side in size) if config.sizes != "pad" else size
    sides = [side if config.tile is None else min(side, config.tile) for side in (height, width)]
    whole = WHOLE_PLANES * plane_bytes(model.vae, height, width)
    vae = min(budget, whole * max(1, num_runs))
    needed = {
        "images": IMAGE_BYTES * height * width,
        "VAE": max(vae, whole) if _wrapped(model, config) else vae,
        "UNet": UNET_MAPS
        * model.unet.config.block_out_channels[0]
        * (sides[0] * sides[1] // model.factor**2)
        * next(model.unet.parameters()).element_size()
        * max(1, num_runs),
    }
    free = free_memory(str(device))
    if sum(needed.values()) > free:
        parts = ", ".join(f"{name} {number / GIB:.1f}" for name, number in needed.items())
        raise DataError(
            f"an output of {width}x{height} px needs about {sum(needed.values()) / GIB:.1f} GiB ({parts}), "
            f"{free / GIB:.1f} are free",
            where=key,
            todo="use a smaller scale, a tile, or fewer runs at once",
        )
    check_space(model.vae, height, width, budget, where=key)


def _wrapped(model: CcsrModel, config: SamplingConfig) -> bool:
    return "wrapping" in model.networks and config.wrapping > 0


def sample_latents(
    model: CcsrModel,
    mean: Tensor,
    std: Tensor,
    config: SamplingConfig,
    noise: Noise,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Scaled latents (B, 4, h, w), float32, that `model` makes of the LR's moments; all randomness is in `noise`.

    `watch` receives each visited timestep and the x0 (B, 4, h, w) predicted there.
    """
    method = METHODS[model.config.family]
    z_lr = method.condition(mean, std, noise)  # where it is a sample, a fresh one per run: part of the randomness
    cond = _denoiser(model, z_lr, config, config.prompt)
    uncond = _denoiser(model, z_lr, config, config.negative_prompt) if config.guidance > 1 else cond
    denoise, first = guided(cond, uncond, config.guidance), uncond
    if watch is not None:
        denoise, first = _watched(denoise, watch), _watched(first, watch)
    return method.sample(denoise, first, z_lr, noise, config)


def _watched(denoise: Denoise, watch: Callable[[int, Tensor], None]) -> Denoise:
    def watched(x_t: Tensor, t: Tensor) -> Tensor:
        eps = denoise(x_t, t)
        watch(int(t[0]), predict_x0(x_t, eps, t))
        return eps

    return watched


def _denoiser(model: CcsrModel, z_lr: Tensor, config: SamplingConfig, text: str) -> Denoise:
    denoise = model.denoiser(z_lr, model.embedding(text))
    method = METHODS[model.config.family]
    height, width = z_lr.shape[-2:]
    if config.tile is None or method.fits(height, width, config.tile / model.factor):
        return denoise
    unit = latent_unit(model)
    tile = max(config.tile // (model.factor * unit), 2) * unit
    share, of = method.tile_stride
    return tiled(denoise, tile, tile * share // of)


def latent_unit(model: CcsrModel) -> int:
    """Latent pixels that the UNet's coarsest level sees as one."""
    return 2 ** (len(model.unet.config.block_out_channels) - 1)
