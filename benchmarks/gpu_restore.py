"""Runs per second on a GPU: the published call pattern against ours, step by step. Random weights: speed, not quality.

python benchmarks/gpu_restore.py [--family v1 v2] [--images 4 --runs 8 --side 512] [--memory]
python benchmarks/gpu_restore.py --preset tiny --device cpu --images 1 --runs 2 --side 64 --memory     # smoke test

The published pattern: one image and one seed at a time; the LR is encoded and the prompt's text tower is run for each;
v1 computes in float32 (45 steps, 16 network calls), v2 in float16 (6 steps, 2 calls). Each row below it adds one thing
and keeps what was added before. Every row takes the same number of steps. --memory: the peak of one 2048 px output.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel

from infra import rng_for
from training.config import ModelConfig, SamplingConfig
from training.models import CcsrModel, build_model, seeded_init
from training.restore.seeded_runs import prepare_image, restore_batch

CHAINS = {"v1": SamplingConfig(num_steps=45), "v2": SamplingConfig(num_steps=6, t_min=0.5)}
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="sd21", choices=["tiny", "sd21"])
    parser.add_argument("--family", nargs="+", default=["v1", "v2"], choices=["v1", "v2"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--published-rows", type=int, default=4, help="(image, run) pairs of the slow rows")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{date.today()}  {name}, torch {torch.__version__}, {options}", flush=True)
    torch.backends.cudnn.benchmark = True
    for family in options.family:
        compare(family, options)
        gc.collect()
    if options.memory:
        measure_memory(options)


def compare(family: str, options: argparse.Namespace) -> None:
    """Print rows of runs per second for one family."""
    model, tower = build(options.preset, family), text_tower(options.preset)
    lrs = [
        rng_for(number, "lr").integers(0, 256, (options.side // 4, options.side // 4, 3), dtype=np.uint8)
        for number in range(options.images)
    ]
    published = torch.float32 if family == "v1" or options.device == "cpu" else torch.float16
    half = torch.bfloat16
    few = max(1, options.published_rows)
    many = options.images * options.runs
    first = None

    def row(title: str, dtype: torch.dtype, num_rows: int, **how: Any) -> None:
        nonlocal first
        model.to(options.device, dtype)
        tower.to(options.device, dtype)
        with attention(model, plain=how.pop("plain", False)):
            speed = measure(lambda: restore_all(model, tower, lrs, num_rows, family, options, **how), num_rows, options)
        first = first or speed
        print(f"{family} {title:<44}{speed:9.3f} runs/s {speed / first:8.2f}x", flush=True)

    row(f"published pattern, {published}", published, few, each=True, batch=1)
    row("... with attention written out (no SDPA)", published, few, each=True, batch=1, plain=True)
    row("LR and prompt once per image", published, few, batch=1)
    row(f"{half}", half, many, batch=1)
    row(f"batches of {options.batch}", half, many, batch=options.batch)
    for network in model.networks.values():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    row("channels last (what `ccsr restore` does)", half, many, batch=options.batch)
    row("... with attention written out (no SDPA)", half, many, batch=options.batch, plain=True)
    if not options.no_compile:
        for network in (model.unet, model.controlnet, model.vae.decoder):
            network.compile()
        row("torch.compile", half, many, batch=options.batch)


@torch.inference_mode()
def restore_all(
    model: CcsrModel,
    tower: CLIPTextModel,
    lrs: list[np.ndarray],
    num_rows: int,
    family: str,
    options: argparse.Namespace,
    *,
    batch: int,
    each: bool = False,
) -> None:
    """Restore `num_rows` (image, run) pairs; `each`: encode the LR and run the text tower anew for every pair."""
    config, size = CHAINS[family], (options.side, options.side)
    pairs = [(number % len(lrs), number // len(lrs)) for number in range(num_rows)]
    pairs.sort()
    images: dict[int, Any] = {}
    rows = []
    for number, run in pairs:
        if each or number not in images:
            images[number] = prepare_image(model, lrs[number], size, config, key=f"{number}")
        if each:
            tokens = torch.zeros(1, tower.config.max_position_embeddings, dtype=torch.int64, device=options.device)
            model.prompts[""] = tower(input_ids=tokens).last_hidden_state.float()
        rows.append((images[number], run))
        if len(rows) == batch or (number, run) == pairs[-1]:
            for picture in restore_batch(model, rows, config, seed=SEED):
                assert picture.shape == (*size, 3)
            rows = []


def measure(call: Callable[[], None], num_rows: int, options: argparse.Namespace) -> float:
    """Runs per second of the second call; the first compiles, chooses kernels and warms up."""
    call()
    synchronise(options.device)
    began = time.perf_counter()
    call()
    synchronise(options.device)
    return num_rows / (time.perf_counter() - began)


def measure_memory(options: argparse.Namespace) -> None:
    """Peak of one 2048 px output at full size in bfloat16: tiles of 512 px, VAE in bands within 6.5 GiB."""
    side = 2048 if options.preset == "sd21" else 4 * options.side
    model = build(options.preset, "v2").to(options.device, torch.bfloat16)
    config = CHAINS["v2"].model_copy(update={"tile": 512 if options.preset == "sd21" else 64})
    lr = rng_for(0, "lr").integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    budget = int(6.5 * 2**30) if options.preset == "sd21" else 0
    image = prepare_image(model, lr, (side, side), config, key="x", vae_bytes=budget)
    (picture,) = restore_batch(model, [(image, 0)], config, seed=SEED, vae_bytes=budget)
    assert picture.shape == (side, side, 3)
    if options.device == "cuda":
        print(
            f"peak of one {side} px output: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated, "
            f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved"
        )
    else:
        print(f"one {side} px output in tiles and bands: done")


@contextmanager
def attention(model: CcsrModel, *, plain: bool) -> Iterator[None]:
    """Inside the block `plain` attention computes its whole score matrix."""
    for network in (model.unet, model.controlnet):
        network.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
    yield
    for network in (model.unet, model.controlnet):
        network.set_attn_processor(AttnProcessor2_0())


def build(preset: str, family: str) -> CcsrModel:
    model = build_model(ModelConfig(preset=preset, family=family), seed=SEED)
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    return model


def text_tower(preset: str) -> CLIPTextModel:
    """Stable Diffusion 2.1's text tower (23 blocks of OpenCLIP ViT-H/14), or one block for the tiny preset."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    if preset == "tiny":
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    length = 77 if preset == "sd21" else 1
    with seeded_init(SEED):
        return CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=length, **size)).eval()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
