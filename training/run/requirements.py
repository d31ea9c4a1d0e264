"""What a model and a training step cost, counted without weights, data or a GPU: parameters, memory, FLOPs, ingest."""

import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from degradation.pipeline import degrade
from degradation.presets import load_preset
from infra.errors import ConfigError
from infra.images import decode_image, encode_png
from infra.process.memory import free_memory
from infra.seeding import rng_for
from training.config import ModelConfig, SamplingConfig, TrainConfig
from training.data.batches import Batch, enlarge
from training.data.samples import SAMPLED
from training.method import METHODS
from training.models import (
    CcsrModel,
    FeatureWrapping,
    OneStepAdapter,
    PatchDiscriminator,
    ProjectedDiscriminator,
    build_model,
)
from training.models.build import build_adapter
from training.models.networks import build_networks
from training.models.vit import build_vit
from training.run.agreement import WorkerContext
from training.run.meter import flop_counter
from training.run.stages import build_stage
from training.sampling import guided

INGEST_SAMPLES = 12
COUNTED_PX = 512
GIB = 2**30
PAPER_MILLIONS = 1700.91  # CCSR in Table 2 of Sun et al., arXiv 2401.00877: all rows of "sd21"


def parameter_table(preset: str, family: str = "v1") -> list[dict[str, str | int | bool]]:
    """Rows of name, parameters, and whether stage 1 and stage 2 train them.

    For CCSR's "sd21" two more rows hold what v1's checkpoint carries beside the networks and a model directory does
    not: a copy of the VAE's encoder and the OpenCLIP-H text tower with all 24 blocks. All rows sum to the paper's
    1700.91 M.
    Building transformers' text tower takes some seconds of import. Raises ConfigError for an unknown preset.
    """
    if preset not in ("tiny", "sd21"):
        raise ConfigError(f"no preset is called {preset!r}", where="model.preset", todo="choose 'tiny' or 'sd21'")
    with torch.device("meta"):
        vae, unet = build_networks(preset)
        adapter: Any = build_adapter(ModelConfig.model_validate({"preset": preset, "family": family}), unet, vae)
        wrapping = FeatureWrapping.for_vae(vae)
    encoder, decoder = _count(vae.encoder, vae.quant_conv), _count(vae.decoder, vae.post_quant_conv)
    if family == "stablesr":
        return [
            _row("UNet", _count(unet)),
            _row("time-aware encoder", _count(adapter.encoder), stage1=True),
            _row("feature modulation", _count(adapter.sft), stage1=True),
            _row("VAE encoder", encoder),
            _row("VAE decoder", decoder),
            _row("feature wrapping", _count(wrapping), stage2=True),
        ]
    if family == "onestep":
        return [
            _row("UNet", _count(unet)),
            _row("LoRA of the UNet, and its first convolution", _count(adapter.unet), stage1=True),
            _row("VAE encoder", encoder),
            _row("LoRA of the VAE encoder", _count(adapter.vae), stage1=True),
            _row("VAE decoder", decoder),
        ]
    rows = [
        _row("UNet", _count(unet)),
        _row("ControlNet", _count(adapter), stage1=True),
        _row("VAE encoder", encoder),
        _row("VAE decoder", decoder, stage2=True),
    ]
    if preset == "sd21":
        rows += [_row("v1 only: condition encoder, a copy of the VAE's", encoder), _row("v1 only: text tower", _text())]
    return rows


def discriminator_table(width: int = 64) -> list[dict[str, str | int | bool]]:
    """Rows as in `parameter_table` of both discriminators, `width` the PatchGAN's; no model directory holds them."""
    with torch.device("meta"):
        patch = PatchDiscriminator(width)
        projected = ProjectedDiscriminator(build_vit("dino"), build_vit("dinov2"))
    return [
        _row("v1: PatchGAN", _count(patch), stage2=True),
        _row("v2: discriminator's heads", _count(projected.heads), stage2=True),
        _row("v2: DINO ViT-S/16 below them", _count(projected.dino)),
        _row("v2: DINOv2 ViT-S/14, their condition", _count(projected.dinov2)),
    ]


def regulariser_row(preset: str) -> dict[str, str | int | bool]:
    """A row of OSEDiff's second LoRA, which no model directory holds."""
    with torch.device("meta"):
        adapter = OneStepAdapter.for_networks({"unet": build_networks(preset)[1]}, conv_in=False)
    return _row("OSEDiff: regulariser, a LoRA of the UNet", _count(adapter), stage1=True)


def _row(name: str, parameters: int, *, stage1: bool = False, stage2: bool = False) -> dict[str, str | int | bool]:
    return {"name": name, "parameters": parameters, "stage1": stage1, "stage2": stage2}


def _count(*networks: nn.Module) -> int:
    parameters: Iterable[nn.Parameter] = (parameter for network in networks for parameter in network.parameters())
    return sum(parameter.numel() for parameter in parameters)


def _text() -> int:
    """OpenCLIP ViT-H/14's text tower (Ilharco et al., 2021): 24 blocks, width 1024, with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=1024
    )
    with torch.device("meta"):
        return _count(CLIPTextModelWithProjection(config))


def memory_needed(num_trained: int, num_frozen: int, config: TrainConfig, world_size: int) -> dict[str, int]:
    """Bytes per worker by kind. Without activations and discriminator, hence less than a run really takes.

    fp32 masters, two moments and, with `ema`, an average per trained parameter are shared out from ZeRO 1 on, fp32
    gradients from ZeRO 2 on; bf16 gradients, which are added to those after each micro-batch, come on top. With
    `offload_optimizer` masters, moments and average are in the host's memory, which is not counted.
    """
    size = 2 if config.precision == "bf16" else 4
    zero = config.runtime.zero_stage
    share = world_size if zero else 1
    held = 0 if config.runtime.offload_optimizer else 1
    masters = 4 * num_trained // share if zero else 0
    rounded = 2 * num_trained if size == 2 else 0
    return {
        "weights": size * (num_trained + num_frozen),
        "gradients": 4 * num_trained // (world_size if zero == 2 else 1) + rounded,
        "optimiser": held * (masters + (8 if config.ema is None else 12) * num_trained // share),
    }


def check_memory(model: CcsrModel, config: TrainConfig, context: WorkerContext) -> None:
    """ConfigError with the numbers where this worker's share of the free memory cannot hold the run.

    `model` is still in fp32 in the host's memory. Memory limits of a container are not seen.
    """
    device, world_size = context.device, context.world_size
    num_trained = _count(model.trained_part(config.stage))
    num_frozen = sum(map(_count, model.networks.values())) - num_trained
    needed = memory_needed(num_trained, num_frozen, config, world_size)
    total = sum(needed.values())
    free = free_memory(device)
    if not device.startswith("cuda"):
        if config.precision == "fp32":
            total -= needed["weights"]  # they are there already
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if total > free:
        parts = ", ".join(f"{name} {number / GIB:.2f}" for name, number in needed.items())
        raise ConfigError(
            f"this run needs {total / GIB:.2f} GiB more on each worker ({parts}), {free / GIB:.2f} are free",
            where=f"runtime: {world_size} workers, zero_stage {config.runtime.zero_stage}, {config.precision}",
            todo="more workers with zero_stage 1 or 2, runtime.offload_optimizer, precision bf16, or a larger machine",
        )


@dataclass(frozen=True)
class StepCost:
    """Of one worker. `activation_bytes`: what the forward of one micro-batch keeps for its backward."""

    num_trained: int
    num_frozen: int
    flops_per_sample: float
    activation_bytes: int


def step_cost(config: TrainConfig) -> StepCost:
    """Run one micro-batch's forward and backward on tensors without memory, with the loop's own stage.

    Of stage 2 the perceptual network and the DINO backbones, whose files may not be here, are left out.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    light = config.decoder_loss.model_copy(update={"perceptual": "none", "discriminator": "patch"})
    vsd = config.vsd and config.vsd.model_copy(update={"prompt": "", "negative_prompt": ""})  # which all models have
    config = config.model_copy(update={"decoder_loss": light, "vsd": vsd, "prompt": "empty"})
    kept: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16 if config.precision == "bf16" else torch.float32)
        try:  # such tensors cannot be cast afterwards
            model = build_model(config.model, 0)
            if config.stage == 2:
                model.prepare_stage2(0)
        finally:
            torch.set_default_dtype(torch.float32)
        stage = build_stage(model, config)
        weights = [weight for network in model.networks.values() for weight in network.parameters()]
        ours = {weight.untyped_storage()._cdata for weight in weights}
        batch = _batch(config, model.factor)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in ours:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with flop_counter() as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = stage(batch, config.num_updates)["loss"]
            activation_bytes = sum(kept.values())
            loss.backward()
        num_trained = sum(weight.numel() for weight in stage.trained.parameters())
        num_all = sum(weight.numel() for weight in weights)
    flops = counter.get_total_flops() / config.runtime.micro_batch_size
    return StepCost(num_trained, num_all - num_trained, flops, activation_bytes)


def restore_flops(config: ModelConfig, sampling: SamplingConfig, pixels: int) -> float:
    """FLOPs of one picture of `pixels` by one run: the VAE and one denoiser call counted on a tile of
    COUNTED_PX."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    method, calls = METHODS[config.family], 0

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x_t

    method.sample(guided(denoise, denoise, sampling.guidance), denoise, torch.zeros(1, 4, 8, 8), torch.zeros, sampling)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = build_model(config, 0)
        image = torch.zeros(1, 3, COUNTED_PX, COUNTED_PX)
        with flop_counter() as vae:
            latents, _ = model.encode_condition(image)
            model.decode(latents, image)
        with flop_counter() as step:
            model.denoiser(latents)(latents, torch.zeros(1, dtype=torch.int64))
    return (vae.get_total_flops() + calls * step.get_total_flops()) * pixels / COUNTED_PX**2


def measured_flops(threads: int) -> float:
    """FLOPs per second of this machine in a convolution like the networks', float32, by `threads` threads."""
    image, weight = torch.zeros(1, 128, 64, 64), torch.zeros(128, 128, 3, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = []
        for _ in range(8):
            began = time.perf_counter()
            torch.nn.functional.conv2d(image, weight)
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * weight.numel() * 62 * 62 / statistics.median(seconds)


def _batch(config: TrainConfig, factor: int = 8) -> Batch:
    size, side = config.runtime.micro_batch_size, config.crop_px
    pixels = torch.zeros(size, 3, side, side)
    stored = torch.zeros(size, 4, side // factor, side // factor)
    moments = {SAMPLED: stored} if config.starts_from_stored_samples else {}
    return Batch(["estimate"] * size, list(range(size)), pixels, pixels.clone(), moments)


def ingest_seconds(config: TrainConfig) -> float:
    """CPU seconds of one core for a sample, measured here: decoding, degradation, enlarging; reading is left out."""
    import cv2

    side = config.crop_px
    rng = rng_for(config.seed, "estimate")
    rough = cv2.resize(rng.integers(0, 256, (side // 8, side // 8, 3)).astype(np.uint8), (side, side))
    png = encode_png(cv2.add(rough, rng.integers(0, 12, (side, side, 3)).astype(np.uint8)))
    small_png = encode_png(np.ascontiguousarray(rough[::4, ::4]))
    recipe = load_preset(config.degradation) if isinstance(config.degradation, str) else config.degradation
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        for number in range(INGEST_SAMPLES + 1):
            if number == 1:  # the first one pays for imports and tables
                began = time.process_time()
            hr = decode_image(png, where="estimate")
            if recipe is None:
                lr = decode_image(small_png, where="estimate")
            else:
                lr = degrade(hr, recipe, rng_for(config.seed, "estimate", number)).lr
            enlarge(lr, side, side)
        return (time.process_time() - began) / INGEST_SAMPLES
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])
