"""What a model and a training step cost, counted without weights, data or a GPU: parameters, memory, FLOPs, ingest."""

import os
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from degradation.pipeline import degrade
from degradation.presets import load_preset
from infra.errors import ConfigError
from infra.imaging.images import decode_image, encode_png
from infra.process.memory import GIB, free_memory
from infra.seeding import rng_for
from training.config import ModelConfig, SamplingConfig, TrainConfig
from training.data.batches import Batch, enlarge
from training.data.samples import SAMPLED
from training.method import METHODS
from training.models import CcsrModel, build_model
from training.run.agreement import WorkerContext
from training.run.cost.parameters import count
from training.run.monitoring.meter import flop_counter
from training.run.step.stages import build_stage
from training.sampling import guided

INGEST_SAMPLES = 12
COUNTED_PX = 512
TEXT_TOWER_BYTES = 4 * 340_387_840  # of Stable Diffusion 2.1, float32


def memory_needed(num_trained: int, num_frozen: int, config: TrainConfig, world_size: int) -> dict[str, int]:
    """Bytes per worker by kind. Without activations and discriminator, hence less than a run really takes.

    fp32 masters, two moments (with `kind: adamw8bit` a byte each, and a scale for 256) and, with `ema`, an average per
    trained parameter are shared out from ZeRO 1 on, fp32 gradients from ZeRO 2 on; bf16 gradients, which are added to
    those after each micro-batch, come on top. With `offload_optimizer` masters, moments and average are in the host's
    memory, which is not counted.
    """
    size = 2 if config.precision == "bf16" else 4
    zero = config.runtime.zero_stage
    share = world_size if zero else 1
    held = 0 if config.runtime.offload_optimizer else 1
    masters = 4 * num_trained // share if zero else 0
    moments = 8 * num_trained if config.optimizer.kind == "adamw" else 2 * (num_trained + 4 * num_trained // 256)
    average = 0 if config.ema is None else 4 * num_trained
    rounded = 2 * num_trained if size == 2 else 0
    captions = {"text tower": TEXT_TOWER_BYTES} if config.prompt == "caption" else {}
    return captions | {
        "weights": size * (num_trained + num_frozen),
        "gradients": 4 * num_trained // (world_size if zero == 2 else 1) + rounded,
        "optimiser": held * (masters + (moments + average) // share),
    }


def check_memory(model: CcsrModel, config: TrainConfig, context: WorkerContext) -> None:
    """ConfigError with the numbers where this worker's share of the free memory cannot hold the run.

    `model` is still in fp32 in the host's memory. Memory limits of a container are not seen.
    """
    device, world_size = context.device, context.world_size
    num_trained = count(model.trained_part(config.stage))
    num_frozen = sum(map(count, model.networks.values())) - num_trained
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
    """Of one worker. `flops_per_sample` and `activation_bytes`, what the forward of one micro-batch keeps for its
    backward, are of the stage and its critic; `critic_bytes`: the critic's weights, gradients and moments."""

    num_trained: int
    num_frozen: int
    flops_per_sample: float
    activation_bytes: int
    critic_bytes: int = 0


def step_cost(config: TrainConfig) -> StepCost:
    """Run one micro-batch's forward and backward on tensors without memory, with the loop's own stage and critic.

    LPIPS, whose file may not be here, is left out, and a PatchGAN is counted in the place of DINO's discriminator.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    loss = config.decoder_loss
    perceptual = "none" if loss.perceptual == "lpips" else loss.perceptual
    light = loss.model_copy(update={"perceptual": perceptual, "discriminator": "patch"})
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
        networks = [*model.networks.values(), *([stage.critic.network] if stage.critic else [])]
        ours = {weight.untyped_storage()._cdata for network in networks for weight in network.parameters()}
        batch = empty_batch(config, model.factor)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in ours:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with flop_counter() as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                terms = stage(batch, config.num_updates)
                own = stage.critic.loss() if stage.critic else None  # while what the stage keeps is still there
            activation_bytes = sum(kept.values())
            for one in (terms["loss"],) if own is None else (own, terms["loss"]):
                one.backward()
        num_trained, num_all = count(stage.trained), count(*model.networks.values())
        critic_bytes = 16 * count(stage.critic.trained) if stage.critic else 0  # float32, with two moments
    flops = counter.get_total_flops() / config.runtime.micro_batch_size
    return StepCost(num_trained, num_all - num_trained, flops, activation_bytes, critic_bytes)


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


def empty_batch(config: TrainConfig, factor: int = 8) -> Batch:
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
