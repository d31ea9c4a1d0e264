"""Stage 1 at full size on one GPU: each of our switches alone and together against the published recipe's arithmetic.

    PYTHONPATH=. python benchmarks/gpu_step.py [--micro-batches 4 8]    # CPU: --preset tiny --crop-px 64

An update is `--accumulation` micro-batches and one optimiser step. All variants run the same losses
(training/losses.py), both VAE encodes and the copies of the batch. Blocks of a variant alternate with blocks of the
published one, so a card that warms up slows both. Plain PyTorch, random weights.
  published  fp16 autocast, fp32 ControlNet, fp16 UNet and VAE, loss scaling, unfused AdamW, micro-batch 4
  ours       bf16 networks with fp32 masters, and nothing else; then that with one switch each, and with all of them
"""

import argparse
import copy
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infra import noise_for
from infra.config import parse_config
from training.config import ModelConfig, TrainConfig
from training.data.batches import Batch
from training.models import CcsrModel, build_model
from training.run.monitoring.meter import flop_counter, peak_flops, peak_memory_bytes
from training.run.step.ahead import mover
from training.run.step.eight_bit import make_adamw8bit
from training.run.step.engine import prepare_networks
from training.run.step.stages import NoiseStage, build_stage

PUBLISHED_MICRO_BATCH = 4
LEARNING_RATE = 5e-5
SWITCHES: dict[str, dict[str, Any]] = {  # `runtime`'s, but for the optimiser's two
    "fused": {},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "join_passes": {"join_passes": True},
    "encode_ahead": {"encode_ahead": True},
    "adamw8bit": {},
}
VARIANTS = {"ours": (), **{f"ours, {name}": (name,) for name in SWITCHES}}
VARIANTS["ours, all"] = tuple(name for name in SWITCHES if name != "adamw8bit")


@dataclass
class Result:
    """One variant: `seconds` of an update in each block, `encode_share` of them for the two VAE encodes, `working_gib`
    above what both variants hold between updates (on a CPU: of the whole process)."""

    variant: str
    micro_batch: int
    samples_per_second: float
    seconds: list[float]
    encode_share: float
    tflops_per_second: float
    mfu: float | None
    working_gib: float
    skipped_updates: int


class Published:
    """The published recipe: mixed precision by autocast, fp32 masters are the ControlNet's own parameters."""

    def __init__(self, model: CcsrModel, options: argparse.Namespace, micro_batch: int) -> None:
        self.half = torch.float16 if options.device == "cuda" else torch.bfloat16  # CPUs convolve no fp16
        model.to(options.device)
        for frozen in (model.unet, model.vae):
            nn.Module.to(frozen, self.half)
        self.stage = make_stage(model, options, micro_batch, ())
        self.device, self.accumulation = options.device, options.accumulation
        self.parameters = list(self.stage.trained.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=1e-2)
        self.scaler = torch.amp.GradScaler(options.device, enabled=self.half == torch.float16)
        self.skipped = 0

    def forward(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device, self.half):
            return self.stage(batch)["loss"]

    def update(self, batch: Batch) -> None:
        for _ in range(self.accumulation):
            self.scaler.scale(self.forward(batch.to(self.device)) / self.accumulation).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale
        self.optimizer.zero_grad()


class Ours:
    """bf16 networks; AdamW on fp32 masters, as DeepSpeed's bf16 optimiser keeps them."""

    def __init__(
        self, model: CcsrModel, options: argparse.Namespace, micro_batch: int, switches: Sequence[str]
    ) -> None:
        model.to(options.device, torch.bfloat16)
        self.stage, self.accumulation = make_stage(model, options, micro_batch, switches), options.accumulation
        config = self.stage.config
        prepare_networks(self.stage, config)
        self.moved = mover(self.stage, config, options.device)
        self.parameters = list(self.stage.trained.parameters())
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        if "adamw8bit" in switches:
            self.optimizer = make_adamw8bit([{"params": self.masters}], config.optimizer)
        else:
            fused = True if "fused" in switches else None  # None: by lists of tensors, as the published one
            self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, weight_decay=1e-2, fused=fused)
        self.skipped = 0

    def forward(self, batch: Batch) -> Tensor:
        return self.stage(batch)["loss"]

    def update(self, batch: Batch) -> None:
        for micro in self.moved([batch] * self.accumulation):
            (self.forward(micro) / self.accumulation).backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def make_stage(model: CcsrModel, options: argparse.Namespace, micro_batch: int, switches: Sequence[str]) -> NoiseStage:
    runtime = {"micro_batch_size": micro_batch, "activation_checkpointing": options.activation_checkpointing}
    for name in switches:
        runtime |= SWITCHES[name]
    values = {
        "job": "train",
        "init_from": "random",
        "output": "out",
        "stage": 1,
        "data": ["none"],
        "model": {"preset": options.preset, "family": "v2"},
        "crop_px": options.crop_px,
        "global_batch_size": micro_batch,
        "num_updates": 1,
        "optimizer": {"learning_rate": LEARNING_RATE},
        "runtime": runtime,
    }
    stage = build_stage(model, parse_config(values, TrainConfig, where="benchmark"))
    assert isinstance(stage, NoiseStage)
    return stage


def make_batch(options: argparse.Namespace, micro_batch: int) -> Batch:
    """In the host's memory, 8-bit, as the ingest makes it."""
    keys = [("image", number) for number in range(micro_batch)]
    shape = (micro_batch, 3, options.crop_px, options.crop_px)
    hr = (255 * noise_for(0, keys, "cpu", torch.float32)(shape).sigmoid()).byte()
    return Batch([str(k) for k in keys], list(range(micro_batch)), hr, hr.flip(-1))


def timed(options: argparse.Namespace, call: Callable[[], Any]) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@cache
def base_model(preset: Literal["sd21", "tiny"]) -> CcsrModel:
    return build_model(ModelConfig(preset=preset), seed=0)


def make_variant(name: str, options: argparse.Namespace, micro_batch: int) -> Published | Ours:
    model = copy.deepcopy(base_model(options.preset))
    if name == "published":
        return Published(model, options, micro_batch)
    return Ours(model, options, micro_batch, VARIANTS[name])


def measure(cases: list[tuple[str, int]], options: argparse.Namespace) -> list[Result]:
    """Blocks of `--updates` updates of every case in turn, `--blocks` times; the medians."""
    variants, batches, seconds, memory = [], [], [[] for _ in cases], [0.0] * len(cases)
    for name, micro_batch in cases:
        variants.append(make_variant(name, options, micro_batch))
        batches.append(make_batch(options, micro_batch))
        print(f"{name}, micro-batch {micro_batch}: built", flush=True)
    flops = []
    for variant, batch in zip(variants, batches, strict=True):
        if flops:
            flops.append(flops[0])  # the same arithmetic per sample; the counter does not see into compiled code
        else:
            with flop_counter() as counter:
                variant.forward(batch.to(options.device)).backward()
            flops.append(counter.get_total_flops() / len(batch.keys))
        for parameter in variant.parameters:
            parameter.grad = None
        warm_up = timed(options, lambda v=variant, b=batch: [v.update(b) for _ in range(options.warm_up)])
        print(f"warm-up of {options.warm_up} updates: {warm_up:.1f} s", flush=True)
    skipped = [variant.skipped for variant in variants]
    for _ in range(options.blocks):
        for number, (variant, batch) in enumerate(zip(variants, batches, strict=True)):
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if options.device == "cuda" else 0
            block = timed(options, lambda v=variant, b=batch: [v.update(b) for _ in range(options.updates)])
            seconds[number].append(block / options.updates)
            memory[number] = max(memory[number], peak_memory_bytes(options.device) - held)
    peak = peak_flops(torch.cuda.get_device_name()) if options.device == "cuda" else None
    results = []
    for number, ((name, micro_batch), variant, batch) in enumerate(zip(cases, variants, batches, strict=True)):
        autocast = torch.autocast(options.device, variant.half) if isinstance(variant, Published) else nullcontext()
        there = batch.to(options.device)
        with autocast:
            encode = min(timed(options, lambda v=variant, b=there: v.stage.latents_of(b)) for _ in range(3))
        update = median(seconds[number])
        rate = micro_batch * options.accumulation / update
        results.append(
            Result(
                name,
                micro_batch,
                rate,
                seconds[number],
                encode * options.accumulation / update,
                flops[number] * rate / 1e12,
                flops[number] * rate / peak if peak else None,
                memory[number] / 2**30,
                variant.skipped - skipped[number],
            )
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="sd21", choices=["sd21", "tiny"])
    parser.add_argument("--crop-px", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4], help="of our variants")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all whose libraries are here")
    parser.add_argument("--accumulation", type=int, default=6, help="published: 6")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--activation-checkpointing", action="store_true", help="on both sides, as the published v1")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_step.json")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    ours = options.variants or [name for name in VARIANTS if "8bit" not in name or find_spec("bitsandbytes")]
    cases = [("published", PUBLISHED_MICRO_BATCH), *((name, micro) for micro in options.micro_batches for name in ours)]
    card = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    heading = f"{date.today()}, {card}, torch {torch.__version__}, diffusers {version('diffusers')}, {options.preset}, "
    print(heading + f"{options.crop_px} px, accumulation {options.accumulation}", flush=True)
    results: list[Result] = []
    # One of ours at a time beside the published one: all of them at once might not fit.
    for case in cases[1:]:
        try:
            results += measure([cases[0], case], options)
        except torch.OutOfMemoryError:
            print(f"{case[0]}, micro-batch {case[1]}: out of memory", flush=True)
        gc.collect()
        torch._dynamo.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(
        "\n| variant | micro-batch | samples/s | ratio | encodes | TFLOP/s | MFU | working GiB | skipped |\n"
        + "|---" * 9
        + "|"
    )
    for published, result in zip(results[::2], results[1::2], strict=True):
        for row in (published, result):
            mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
            print(
                f"| {row.variant} | {row.micro_batch} | {row.samples_per_second:.2f} "
                f"| {row.samples_per_second / published.samples_per_second:.2f} | {row.encode_share:.0%} "
                f"| {row.tflops_per_second:.1f} | {mfu} | {row.working_gib:.1f} | {row.skipped_updates} |"
            )
    record = {"heading": heading, "options": {k: str(v) for k, v in vars(options).items()}}
    options.out.write_text(json.dumps(record | {"results": [asdict(result) for result in results]}, indent=1))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
