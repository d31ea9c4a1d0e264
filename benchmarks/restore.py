"""What restoring costs: beside the bare network calls, and in memory for a large image.

python benchmarks/restore.py [--preset tiny] [--runs 10] [--rounds 5]      # latents to decoded tensors, on a CPU
python benchmarks/restore.py --memory 4096                                 # one output of 4096 x 4096 px
python benchmarks/restore.py --table2 --preset sd21                        # the paper's Table 2; a GPU if there is one
python benchmarks/restore.py --table2 --preset sd21 --rounds 0 --steps 3 --side 64     # whether it runs at full size
"""

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import psutil
import torch

from infra import noise_for, rng_for
from infra.display.table import Table, cell, print_report
from training.config import ModelConfig, SamplingConfig
from training.models import CcsrModel, build_model
from training.restore.seeded_runs import (
    PreparedImage,
    decode_rows,
    prepare_image,
    restore_batch,
    restore_runs,
    sample_latents,
)
from training.sampling import ccsr_v2_timesteps

GIB = 2**30
# Table 2 of arXiv 2401.00877v1: seconds per 128 -> 512 px picture on a V100, millions of parameters.
TABLE2 = {
    "LDM-SR": (5.21, 168.95),
    "StableSR": (18.90, 1409.11),
    "ResShift": (1.12, 173.91),
    "DiffBIR": (5.85, 1716.71),
    "PASD": (6.11, 1883.70),
    "CCSR": (2.22, 1700.91),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["tiny", "sd21"])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="of the chain; default: 6, of --table2 the published 45 and 200")
    parser.add_argument(
        "--side", type=int, help="px of the output's sides; default: 256, of --table2 the published 512"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, help="px of a side of the output whose memory is measured")
    parser.add_argument("--table2", action="store_true", help="seconds per picture and parameters, beside the paper's")
    options = parser.parse_args()
    print(
        f"{date.today()}  {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options}"
    )
    if options.table2:
        print_report([table2(options.preset, options.rounds, options.steps, options.side or 512)])
        return
    model = build_model(ModelConfig(preset=options.preset), seed=0)
    for network in model.networks.values():
        network.eval()
    if options.memory:
        measure_memory(model, options.memory)
    else:
        compare_speed(model, options)


def table2(preset: str, rounds: int, num_steps: int | None, side: int) -> Table:
    """Seconds of one picture after another, enlarged 4 times to `side` px, in float32: CCSR v1 in 15 of 45 steps,
    StableSR in 200, or `num_steps` of each; the median of `rounds` after one that warms up, with 0 that one. On a CPU
    they are CPU seconds. Random weights: they cost what trained ones do. Parameters: of the networks that are loaded;
    `ccsr estimate --model sd21` adds the text encoder, which the cached prompt replaces here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    table = Table(
        ("method", "seconds", "million parameters", "paper: seconds", "paper: parameters"),
        f"Table 2, {side} px, {device}",
    )
    lr = rng_for(0, "lr").integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    measured = {}
    for name, config, sampling in (
        ("CCSR", ModelConfig(preset=preset, family="v1"), SamplingConfig(num_steps=num_steps or 45)),
        (
            "StableSR",
            ModelConfig(preset=preset, family="stablesr"),
            SamplingConfig(sampler="uniform", num_steps=num_steps or 200),
        ),
    ):
        model = build_model(config, seed=0)
        for network in model.networks.values():
            network.eval().to(device)
        took = []
        for run in range(rounds + 1):  # the first warms up
            began = clock()
            list(restore_runs(model, lr, (side, side), sampling, seed=0, key="x", runs=[run]))  # ends on the CPU
            took.append(clock() - began)
            print(f"{name}, picture {run + 1}: {took[-1]:.2f} s", flush=True)
        parameters = sum(p.numel() for network in model.networks.values() for p in network.parameters()) / 1e6
        measured[name] = (statistics.median(took[1:] or took), parameters)
    for name, published in TABLE2.items():
        ours = measured.get(name, (None, None))
        table.add(name, cell(ours[0], ".2f"), cell(ours[1], ".2f"), *(cell(value, ".2f") for value in published))
    return table


@torch.inference_mode()
def compare_speed(model: CcsrModel, options: argparse.Namespace) -> None:
    """`restore_batch`'s two halves against a loop of the same calls of ControlNet, UNet and decoder."""
    config, side = SamplingConfig(num_steps=options.steps or 6, t_min=0.5), options.side or 256
    lr = rng_for(0, "lr").integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    image = prepare_image(model, lr, (side, side), config, key="x")
    num_calls = 1 if config.num_steps == 1 else len(ccsr_v2_timesteps(config.num_steps, config.t_max, config.t_min))
    rows = (options.runs, 1, 1, 1)
    mean, std = image.mean.repeat(rows), image.std.repeat(rows)
    x, t, states = mean.clone(), torch.full((options.runs,), 999), model.prompt.expand(options.runs, -1, -1)

    def ours() -> None:
        noise = noise_for(0, [("x", run) for run in range(options.runs)], "cpu", torch.float32)
        latents = sample_latents(model, mean, std, config, noise)
        assert sum(1 for _ in decode_rows(model, latents)) == options.runs

    def bare() -> None:
        for _ in range(num_calls):
            down, middle = model.controlnet(x, t, states, controlnet_cond=mean, return_dict=False)
            model.unet(
                x,
                t,
                states,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )
        for part in mean.split(options.runs if options.preset == "tiny" else 1):
            model.vae.decode(part / model.vae.config.scaling_factor, return_dict=False)

    ratios = []
    for number in range(options.rounds + 1):  # in turn; the first round warms up
        first, second = (seconds(call) for call in (bare, ours))
        if number:
            ratios.append(second / first)
            print(f"bare {first:.3f} s, ours {second:.3f} s, ratio {second / first:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} ({num_calls} network calls, {options.runs} runs)")


def measure_memory(model: CcsrModel, side: int) -> None:
    """Peak resident memory of this process above what it holds with the model loaded; run it in a fresh process."""
    config = SamplingConfig(num_steps=1, tile=512)
    lr = rng_for(0, "lr").integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    image: PreparedImage = prepare_image(model, lr, (side, side), config, key="x")
    encoded = time.perf_counter()
    (picture,) = restore_batch(model, [(image, 0)], config, seed=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert picture.shape == (side, side, 3)
    print(f"encode {encoded - began:.0f} s, denoise and decode {time.perf_counter() - encoded:.0f} s")
    print(f"with the model {before / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB, above it {(peak - before) / GIB:.2f} GiB")


def seconds(call: Callable[[], None]) -> float:
    """CPU seconds of this process: what else runs on the machine does not count."""
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
