"""What restoring costs: beside the bare network calls, and in memory for a large image.

python benchmarks/restore.py [--preset tiny] [--runs 10] [--rounds 5]      # latents to decoded tensors, on a CPU
python benchmarks/restore.py --memory 4096                                 # one output of 4096 x 4096 px
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
from training.config import ModelConfig, SamplingConfig
from training.models import CcsrModel, build_model
from training.restore.restore import PreparedImage, decode_rows, prepare_image, restore_batch, sample_latents
from training.sampling import ccsr_v2_timesteps

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["tiny", "sd21"])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--side", type=int, default=256, help="px of the output of the speed comparison")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, help="px of a side of the output whose memory is measured")
    options = parser.parse_args()
    print(
        f"{date.today()}  {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options}"
    )
    model = build_model(ModelConfig(preset=options.preset), seed=0)
    for network in model.networks.values():
        network.eval()
    if options.memory:
        measure_memory(model, options.memory)
    else:
        compare_speed(model, options)


@torch.inference_mode()
def compare_speed(model: CcsrModel, options: argparse.Namespace) -> None:
    """`restore_batch`'s two halves against a loop of the same calls of ControlNet, UNet and decoder."""
    config = SamplingConfig(num_steps=options.steps, t_min=0.5)
    lr = rng_for(0, "lr").integers(0, 256, (options.side // 4, options.side // 4, 3), dtype=np.uint8)
    image = prepare_image(model, lr, (options.side, options.side), config, key="x")
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
