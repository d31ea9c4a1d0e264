"""Pretrain the `tiny` base on real photographs: first the VAE, then UNet and ControlNet as one conditional denoiser.

Plain PyTorch on one device: `python -m benchmarks.pretrain benchmarks/pretrain.yaml --set vae_minutes=25`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from degradation.pipeline import degrade
from degradation.presets import load_preset
from infra.config import Config, load_config
from infra.images import gradient_energy, read_image, resize_bicubic
from infra.process.numerics import NumericsConfig, set_numerics
from infra.seeding import rng_for
from training.config import ModelConfig
from training.models import CcsrModel, build_model, save_model
from training.sampling import add_noise, predict_x0

NUM_TIMESTEPS = 1000
LATENT_PX = 16


class PretrainConfig(Config):
    """What the base is trained on, for how long, and where."""

    photos: str = Field(description="the folder below which the packages' photographs lie")
    train: Annotated[tuple[str, ...], Field(min_length=1, description="paths below `photos`, or PACKAGE:PATH")]
    validation: Annotated[tuple[str, ...], Field(min_length=1)]
    output: str
    seed: int = 0
    device: str = "cpu"
    numerics: NumericsConfig = NumericsConfig()
    threads: int = Field(2, ge=1)
    vae_minutes: float = Field(ge=0)
    decoder_minutes: float = Field(ge=0)
    denoiser_minutes: float = Field(ge=0)
    short_sides: tuple[int, ...] = Field((400, 720), description="each photograph is reduced to these sizes")
    num_crops: int = Field(2400, description="pairs that are encoded once for the denoiser")


def load_photos(config: PretrainConfig, part: str) -> list[np.ndarray]:
    """Every photograph of `part` ("train", "validation") at every size it has, uint8 (H, W, 3); kept in the output."""
    cache = Path(config.output) / f"photos_{part}.safetensors"
    if not cache.exists():
        photos = {}
        for name in getattr(config, part):
            package, _, path = name.rpartition(":")
            image = read_image(str(Path(str(files(package))) / path if package else Path(config.photos) / path))
            for side in config.short_sides:
                height, width = (round(length * side / min(image.shape[:2])) for length in image.shape[:2])
                if height <= image.shape[0]:
                    photos[f"{name} {side}"] = torch.from_numpy(resize_bicubic(image, width, height).copy())
        save_file(photos, cache)
    return [photo.numpy() for _, photo in sorted(load_file(cache).items())]


def draw_crop(photos: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (size, size, 3): of three places of one photograph the one with most detail, flipped and turned."""
    photo = photos[int(rng.integers(len(photos)))]
    places = [[int(rng.integers(side - size + 1)) for side in photo.shape[:2]] for _ in range(3)]
    crops = [photo[y : y + size, x : x + size] for y, x in places]
    crop = max(crops, key=gradient_energy)
    crop = np.rot90(crop, int(rng.integers(4)))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def as_tensor(images: Sequence[np.ndarray], device: str) -> Tensor:
    """float32 (B, 3, H, W) in [0, 1] from uint8 images."""
    stacked = torch.from_numpy(np.stack(images)).to(device)
    return (stacked.permute(0, 3, 1, 2) / 255).contiguous(memory_format=torch.channels_last)


class Phase:
    """A loop over updates for a number of minutes, with a cosine schedule over them, that goes on where it stopped."""

    def __init__(self, name: str, networks: dict[str, nn.Module], minutes: float, learning_rate: float, out: Path):
        self.name, self.seconds, self.rate = name, minutes * 60, learning_rate
        self.networks = nn.ModuleDict(networks)
        self.optimizer = torch.optim.AdamW(self.networks.parameters(), learning_rate, (0.9, 0.99), weight_decay=0.0)
        self.file, self.log = out / f"{name}.safetensors", out / f"{name}.jsonl"
        self.update, self.elapsed = 0, 0.0
        if self.file.exists():
            self._load()

    @property
    def progress(self) -> float:
        return min(self.elapsed / self.seconds, 1) if self.seconds else 1

    def run(self, loss: Callable[[int, float], dict[str, Tensor]], validate: Callable[[], dict[str, float]]) -> None:
        """Call `loss(update, progress)` until the minutes are used up; keep the state and a log line every minute."""
        means: dict[str, float] = {}
        last, saved = time.monotonic(), self.elapsed
        while self.progress < 1:
            warm = min((self.update + 1) / 50, 1)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * self.progress)))
            self.optimizer.zero_grad(set_to_none=True)
            terms = loss(self.update, self.progress)
            terms["loss"].backward()
            nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
            self.optimizer.step()
            self.update += 1
            for key, value in terms.items():
                means[key] = 0.98 * means.get(key, value.item()) + 0.02 * value.item()
            now = time.monotonic()
            self.elapsed, last = self.elapsed + now - last, now
            if self.elapsed - saved > 60 or self.progress == 1:
                saved = self.elapsed
                self._save()
                line = {"update": self.update, "seconds": round(self.elapsed), **means, **validate()}
                with self.log.open("a") as log:
                    log.write(json.dumps({key: round(value, 5) for key, value in line.items()}) + "\n")
                last = time.monotonic()  # validation is not training

    def _save(self) -> None:
        tensors = {f"networks.{name}": tensor.contiguous() for name, tensor in self.networks.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in moments.items()}
        partial = self.file.with_suffix(".partial")
        save_file(tensors, partial, {"update": str(self.update), "elapsed": str(self.elapsed)})
        partial.rename(self.file)

    def _load(self) -> None:
        with safe_open(self.file, "pt") as stored:
            names, facts = stored.keys(), stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in names}
        self.update, self.elapsed = int(facts["update"]), float(facts["elapsed"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if first != "networks":
                moments.setdefault(int(first), {})[rest] = tensor
        networks = {name[9:]: tensor for name, tensor in tensors.items() if name.startswith("networks.")}
        self.networks.load_state_dict(networks)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


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

    The second phase is the decoder's alone, so that it may run beside the denoiser's.
    """
    train, held = (load_photos(config, part) for part in ("train", "validation"))
    prepare_vae(model.vae)
    model.vae.to(memory_format=torch.channels_last)
    rng = rng_for(config.seed, "pretrain", "validation")
    fixed = as_tensor([draw_crop(held, 96, rng) for _ in range(8)], config.device)

    def loss(update: int, progress: float) -> dict[str, Tensor]:
        rng = rng_for(config.seed, "pretrain", "vae", update)
        size, batch = (40, 4) if progress < 0.8 else (64, 3)
        image = 2 * as_tensor([draw_crop(train, size, rng) for _ in range(batch)], config.device) - 1
        with torch.autocast(config.device, torch.bfloat16):
            posterior = model.vae.encode(image).latent_dist
            latent = posterior.mean + posterior.std * draw_noise(rng, posterior.mean)
            difference = model.vae.decode(latent).sample.float() - image
        l1, gradient = difference.abs().mean(), sum(d.abs().mean() for d in differences(difference))
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return {"l1": l1, "gradient": gradient, "kl": kl, "loss": l1 + 0.5 * gradient + 1e-4 * kl}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        mean = model.vae.encode(2 * fixed - 1).latent_dist.mean
        decoded = ((model.vae.decode(mean).sample + 1) / 2).clamp(0, 1)
        error = (decoded - fixed).square().mean((1, 2, 3))
        return {"psnr": float((-10 * error.log10()).mean()), "latent_std": float(mean.std())}

    Phase("vae", {"vae": model.vae}, config.vae_minutes, 1.2e-3, out).run(loss, validate)
    for part in (model.vae.encoder, model.vae.quant_conv):
        part.requires_grad_(False)
    parts = {"decoder": model.vae.decoder, "post_quant_conv": model.vae.post_quant_conv}
    Phase("decoder", parts, config.decoder_minutes, 8e-4, out).run(loss, validate)
    with torch.no_grad():
        std = model.vae.encode(2 * fixed - 1).latent_dist.mean.std()
    model.vae.register_to_config(scaling_factor=round(1 / float(std), 4))


def differences(image: Tensor) -> Iterator[Tensor]:
    yield image[..., 1:] - image[..., :-1]
    yield image[..., 1:, :] - image[..., :-1, :]


@torch.no_grad()
def encoded_pairs(model: CcsrModel, photos: Sequence[np.ndarray], count: int, seed: int, device: str) -> Tensor:
    """float32 (2, count, 4, 16, 16): scaled latents of HR crops and of their LR enlarged, both posterior means."""
    degradation, px = load_preset("ccsr"), LATENT_PX * model.factor
    found = []
    for first in range(0, count, 16):
        pairs = []
        for index in range(first, min(first + 16, count)):
            rng = rng_for(seed, "pretrain", "pair", index)
            pairs.append(degrade(np.ascontiguousarray(draw_crop(photos, px, rng)), degradation, rng))
        images = [pair.hr for pair in pairs] + [resize_bicubic(pair.lr, px, px) for pair in pairs]
        mean, _ = model.encode_moments(as_tensor(images, device))
        found.append(mean.unflatten(0, (2, len(pairs))))
    return torch.cat(found, dim=1)


def train_denoiser(model: CcsrModel, config: PretrainConfig, out: Path) -> None:
    """v-prediction over all timesteps (Salimans & Ho 2022), conditioned on z_lr; one row in eight sees no condition, so
    that the UNet alone stays a prior."""
    cache = out / "latents.safetensors"
    if not cache.exists():
        train, held = (load_photos(config, part) for part in ("train", "validation"))
        pairs = encoded_pairs(model, train, config.num_crops, config.seed, config.device)
        fixed = encoded_pairs(model, held, 48, config.seed + 1, config.device)
        save_file({"train": pairs.contiguous(), "validation": fixed.contiguous()}, cache)
    pairs, fixed = (load_file(cache)[name].to(config.device) for name in ("train", "validation"))
    open_controlnet(model)
    networks: dict[str, nn.Module] = {"unet": model.unet, "controlnet": model.controlnet}
    for network in networks.values():
        network.to(memory_format=torch.channels_last)
    phase = Phase("denoiser", networks, config.denoiser_minutes, 1.5e-3, out)

    def loss(update: int, progress: float) -> dict[str, Tensor]:
        rng = rng_for(config.seed, "pretrain", "denoiser", update)
        size, batch = (12, 16) if progress < 0.7 else (LATENT_PX, 9)
        rows = torch.from_numpy(rng.integers(pairs.shape[1], size=batch))
        y, x = rng.integers(LATENT_PX - size + 1, size=2)
        z_hq, z_lr = pairs[:, rows, :, y : y + size, x : x + size]
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

    phase.run(loss, validate)


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


def pretrain(config: PretrainConfig) -> None:
    """Run both phases' remaining minutes and write OUT/model, in fp16."""
    torch.set_num_threads(config.threads)
    set_numerics(config.numerics)
    out = Path(config.output)
    out.mkdir(parents=True, exist_ok=True)
    model = build_model(ModelConfig(preset="tiny", family="v1", prediction="v"), config.seed).to(config.device)
    train_vae(model, config, out)
    train_denoiser(model, config, out)
    save_model(model.to(dtype=torch.float16), out / "model")


if __name__ == "__main__":
    path, *overrides = [argument for argument in sys.argv[1:] if argument != "--set"]
    pretrain(load_config(path, PretrainConfig, overrides))
