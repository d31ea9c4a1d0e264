"""What a training step costs, counted without weights, data or a GPU: FLOPs, activations, CPU time of ingest."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from degradation.pipeline import degrade
from degradation.presets import load_preset
from infra.images import decode_image, encode_png
from infra.seeding import rng_for
from training.config import TrainConfig
from training.ingest import Batch, enlarge
from training.measure import flop_counter
from training.models import build_model
from training.samples import SAMPLED
from training.steps import build_stage

INGEST_SAMPLES = 12


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
    config = config.model_copy(update={"decoder_loss": light})
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
                loss = (stage(batch, config.num_updates) if config.stage == 2 else stage(batch))["loss"]
            activation_bytes = sum(kept.values())
            loss.backward()
        num_trained = sum(weight.numel() for weight in stage.trained.parameters())
        num_all = sum(weight.numel() for weight in weights)
    flops = counter.get_total_flops() / config.runtime.micro_batch_size
    return StepCost(num_trained, num_all - num_trained, flops, activation_bytes)


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
