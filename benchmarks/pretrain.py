"""Pretrain the `tiny` base on real photographs: first the VAE, then UNet and ControlNet as one conditional denoiser.

Plain PyTorch: `python -m benchmarks.pretrain benchmarks/pretrain.yaml --out FOLDER`, or one process per core, which
average their gradients: `torchrun --nproc-per-node 2 -m benchmarks.pretrain ...`. The same command resumes from FOLDER;
`--set denoiser_updates=20000` trains on after that.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.pretrain_phase import Phase, rank, save_whole, wait_for_all, world_size
from degradation.pipeline import degrade
from degradation.presets import load_preset
from infra.config import Config, fingerprint_of, load_config
from infra.imaging.images import read_image
from infra.imaging.pictures import resized
from infra.imaging.pixels import gradient_energy, grey_levels
from infra.process.numerics import NumericsConfig, set_numerics
from infra.seeding import rng_for
from training.config import ModelConfig
from training.models import CcsrModel, build_model, load_model, save_model
from training.sampling import add_noise, predict_x0

NUM_TIMESTEPS = 1000
LATENT_PX, WINDOW, CHUNK = 24, 16, 50
VALIDATION_SIDES = (400, 720)  # fixed, so that curves of different runs can be compared


class PretrainConfig(Config):
    """What the base is trained on, for how long, and from what."""

    photos: str = Field(description="the folder that holds the packages' photographs")
    train: Annotated[tuple[str, ...], Field(min_length=1, description="paths below `photos`, or PACKAGE:PATH")]
    validation: Annotated[tuple[str, ...], Field(min_length=1)]
    init_from: str | None = Field(None, description="a tiny model directory to train on; without it, random weights")
    seed: int = 0
    device: str = "cpu"
    numerics: NumericsConfig = NumericsConfig()
    threads: int = Field(2, ge=1)
    vae_updates: int = Field(ge=0)
    decoder_updates: int = Field(ge=0)
    denoiser_updates: int = Field(ge=0)
    learning_rates: dict[Literal["vae", "decoder", "denoiser"], float] = Field(
        {"vae": 8e-4, "decoder": 2e-4, "denoiser": 3e-4}, description="constant; may be changed between two commands"
    )
    validate_every: int = Field(250, ge=1, description="updates between two validations and saved states")
    short_sides: tuple[int, ...] = Field((160, 256, 400, 720), description="training photographs have these sizes")
    num_crops: int = Field(2400, description="pairs that are encoded once for the denoiser")


def photos_id(config: PretrainConfig, part: str) -> str:
    """Names what `load_photos` returns, so that files made from other photographs or sizes are not taken for it."""
    sides = config.short_sides if part == "train" else VALIDATION_SIDES
    return fingerprint_of({"photos": getattr(config, part), "sides": sides})[:8]


def load_photos(config: PretrainConfig, part: str, out: Path) -> list[np.ndarray]:
    """Every photograph of `part` ("train", "validation") at every size it has, uint8 (H, W, 3); kept in the output."""
    cache = out / f"photos_{part}_{photos_id(config, part)}.safetensors"
    if not cache.exists() and rank() == 0:
        photos = {}
        for name in getattr(config, part):
            package, _, path = name.rpartition(":")
            image = read_image(str(Path(str(files(package))) / path if package else Path(config.photos) / path))
            for side in config.short_sides if part == "train" else VALIDATION_SIDES:
                height, width = (round(length * side / min(image.shape[:2])) for length in image.shape[:2])
                if height <= image.shape[0]:
                    photos[f"{name} {side}"] = torch.from_numpy(resized(image, (height, width)).copy())
        save_whole(photos, cache)
    wait_for_all()
    return [photo.numpy() for _, photo in sorted(load_file(cache).items())]


def draw_crop(photos: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (size, size, 3): of three places of one photograph the one with most detail, flipped and turned."""
    photo = photos[int(rng.integers(len(photos)))]
    places = [[int(rng.integers(side - size + 1)) for side in photo.shape[:2]] for _ in range(3)]
    crops = [photo[y : y + size, x : x + size] for y, x in places]
    crop = max(crops, key=lambda crop: gradient_energy(grey_levels(crop)))
    crop = np.rot90(crop, int(rng.integers(4)))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def as_tensor(images: Sequence[np.ndarray], device: str) -> Tensor:
    """float32 (B, 3, H, W) in [0, 1] from uint8 images."""
    stacked = torch.from_numpy(np.stack(images)).to(device)
    return (stacked.permute(0, 3, 1, 2) / 255).contiguous(memory_format=torch.channels_last)


def prepare_vae(vae: nn.Module) -> None:
    """Unit-gain convolutions, and a posterior that begins narrow: the default's noise would drown the latent."""
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d) and "quant" not in name:
                module.weight.mul_(3**0.5)
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -7.0


def train_vae(model: CcsrModel, config: PretrainConfig, out: Path) -> None:
    """L1, half the L1 of gradients, and a little KL; then the scale that gives latents unit deviation.

    The second phase is the decoder's alone: latents stay, so a denoiser that is trained on them stays valid.
    """
    train, held = (load_photos(config, part, out) for part in ("train", "validation"))
    if config.init_from is None:
        prepare_vae(model.vae)
    model.vae.to(memory_format=torch.channels_last)
    rng = rng_for(config.seed, "pretrain", "validation")
    fixed = as_tensor([draw_crop(held, 96, rng) for _ in range(8)], config.device)

    def loss(update: int) -> dict[str, Tensor]:
        rng = rng_for(config.seed, "pretrain", "vae", update * world_size() + rank())
        image = 2 * as_tensor([draw_crop(train, 48, rng) for _ in range(6)], config.device) - 1
        posterior = model.vae.encode(image).latent_dist
        latent = posterior.mean + posterior.std * draw_noise(rng, posterior.mean)
        difference = model.vae.decode(latent).sample - image
        l1, gradient = difference.abs().mean(), sum(d.abs().mean() for d in differences(difference))
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return {"l1": l1, "gradient": gradient, "kl": kl, "loss": l1 + 0.5 * gradient + 1e-4 * kl}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        mean = model.vae.encode(2 * fixed - 1).latent_dist.mean
        decoded = ((model.vae.decode(mean).sample + 1) / 2).clamp(0, 1)
        error = (decoded - fixed).square().mean((1, 2, 3))
        return {"psnr": float((-10 * error.log10()).mean()), "latent_std": float(mean.std())}

    every, rates = config.validate_every, config.learning_rates
    whole = Phase("vae", {"vae": model.vae}, rates["vae"], out)
    whole.run(config.vae_updates, every, loss, validate)
    if whole.update:
        with torch.no_grad():
            std = model.vae.encode(2 * fixed - 1).latent_dist.mean.std()
        model.vae.register_to_config(scaling_factor=round(1 / float(std), 4))
    for part in (model.vae.encoder, model.vae.quant_conv):
        part.requires_grad_(False)
    parts = {"decoder": model.vae.decoder, "post_quant_conv": model.vae.post_quant_conv}
    Phase("decoder", parts, rates["decoder"], out).run(config.decoder_updates, every, loss, validate)


def differences(image: Tensor) -> Iterator[Tensor]:
    yield image[..., 1:] - image[..., :-1]
    yield image[..., 1:, :] - image[..., :-1, :]


@torch.no_grad()
def encoded_pairs(
    model: CcsrModel, photos: Sequence[np.ndarray], part: str, count: int, config: PretrainConfig, out: Path
) -> Tensor:
    """float32 (2, count, 4, 24, 24): scaled latents of HR crops and of their LR enlarged, both posterior means.

    They are kept in files of CHUNK pairs, so that a larger count encodes only what is missing.
    """
    names = f"latents_{part}_{photos_id(config, part)}_{model.encoder_id()}"
    degradation, px = load_preset("ccsr"), LATENT_PX * model.factor
    caches = [out / f"{names}_{first:06d}.safetensors" for first in range(0, count, CHUNK)]
    for number, cache in enumerate(caches):
        if not cache.exists() and number % world_size() == rank():
            pairs = []
            for index in range(number * CHUNK, (number + 1) * CHUNK):
                rng = rng_for(config.seed, "pretrain", part, index)
                pair = degrade(np.ascontiguousarray(draw_crop(photos, px, rng)), degradation, rng)
                images = as_tensor([pair.hr, resized(pair.lr, (px, px))], config.device)
                pairs.append(model.encode_moments(images)[0].cpu())
            save_whole({"pairs": torch.stack(pairs, dim=1).contiguous()}, cache)
    wait_for_all()
    return torch.cat([load_file(cache)["pairs"] for cache in caches], dim=1)[:, :count].to(config.device)


def train_denoiser(model: CcsrModel, config: PretrainConfig, out: Path) -> None:
    """v-prediction over all timesteps (Salimans & Ho 2022), conditioned on z_lr; one row in eight sees no condition, so
    that the UNet alone stays a prior."""
    counts = {"train": config.num_crops, "validation": CHUNK}
    pairs, fixed = (
        encoded_pairs(model, load_photos(config, part, out), part, count, config, out) for part, count in counts.items()
    )
    if config.init_from is None:
        open_controlnet(model)
    networks: dict[str, nn.Module] = {"unet": model.unet, "controlnet": model.controlnet}
    for network in networks.values():
        network.to(memory_format=torch.channels_last)

    def loss(update: int) -> dict[str, Tensor]:
        rng, batch = rng_for(config.seed, "pretrain", "denoiser", update * world_size() + rank()), 16
        rows = torch.from_numpy(rng.integers(pairs.shape[1], size=batch))
        y, x = rng.integers(LATENT_PX - WINDOW + 1, size=2)
        z_hq, z_lr = pairs[:, rows, :, y : y + WINDOW, x : x + WINDOW]
        t = torch.from_numpy(rng.integers(NUM_TIMESTEPS, size=batch)).to(config.device)
        noise = draw_noise(rng, z_hq)
        x_t = add_noise(z_hq, noise, t)
        blind = torch.arange(batch, device=config.device) % 8 == 0
        # The velocity is sqrt(abar) noise - sqrt(1 - abar) z_hq: `add_noise` with the roles exchanged.
        error = (velocity(model, x_t, t, z_lr, blind) - add_noise(noise, -z_hq, t)).square().mean((1, 2, 3))
        return {"blind": error[blind].mean(), "seeing": error[~blind].mean(), "loss": error.mean()}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        z_hq, z_lr = fixed
        found = {"z_lr": F.mse_loss(z_lr, z_hq).item()}
        for timestep in (999, 833, 667, 333, 100):
            t = torch.full((len(z_hq),), timestep, device=config.device)
            rng = rng_for(config.seed, "pretrain", "denoiser", "validation", timestep)
            x_t = add_noise(z_hq, draw_noise(rng, z_hq), t)
            found[f"x0_{timestep}"] = F.mse_loss(predict_x0(x_t, model.denoiser(z_lr)(x_t, t), t), z_hq).item()
        return found

    phase = Phase("denoiser", networks, config.learning_rates["denoiser"], out)
    phase.run(config.denoiser_updates, config.validate_every, loss, validate)


def open_controlnet(model: CcsrModel) -> None:
    """Let the condition in at once: trained together with the UNet, a ControlNet has no prior to protect by zeros."""
    with torch.no_grad():
        model.controlnet.controlnet_cond_embedding.weight.copy_(model.unet.conv_in.weight)
        for layer in (*model.controlnet.controlnet_down_blocks, model.controlnet.controlnet_mid_block):
            layer.weight.copy_(torch.eye(len(layer.weight))[..., None, None])


def draw_noise(rng: np.random.Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(rng.standard_normal(like.shape, dtype=np.float32)).to(like.device)


def velocity(model: CcsrModel, x_t: Tensor, t: Tensor, z_lr: Tensor, blind: Tensor) -> Tensor:
    """The UNet's output under the ControlNet's residuals; rows of `blind` get none."""
    text = model.prompt.expand(len(x_t), -1, -1)
    seen = (~blind).float().view(-1, 1, 1, 1)
    down, middle = model.controlnet(x_t, t, text, controlnet_cond=z_lr, return_dict=False)
    residuals = tuple(residual * seen for residual in down)
    return model.unet(
        x_t,
        t,
        text,
        down_block_additional_residuals=residuals,
        mid_block_additional_residual=middle * seen,
        return_dict=False,
    )[0]


def pretrain(config: PretrainConfig, out: Path) -> None:
    """Run the phases' remaining updates and write `out`/model, in fp16."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(config.threads)
    set_numerics(config.numerics)
    out.mkdir(parents=True, exist_ok=True)
    if config.init_from is None:
        model = build_model(ModelConfig(preset="tiny", family="v1", prediction="v"), config.seed)
    else:
        model = load_model(config.init_from)
    model.to(config.device)
    train_vae(model, config, out)
    train_denoiser(model, config, out)
    if rank() == 0:
        save_model(model.to(dtype=torch.float16), out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True, help="states, logs and the model; resumed if it exists")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    pretrain(load_config(arguments.config, PretrainConfig, arguments.set), arguments.out)
