"""Time and peak memory of one full-size CCSR v2 step, 128 px -> 512 px, with random weights (speed, not quality).

OMP_NUM_THREADS=2 python benchmarks/full_size_forward.py [--device cuda --dtype bfloat16]
"""

import argparse
import platform
import resource
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor
from torch.nn import functional as F

from infra import noise_for
from training.config import ModelConfig
from training.models import build_model
from training.sampling import sample_ccsr_v2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    device = torch.device(options.device)

    def timed(name: str, call: Callable[[], Tensor]) -> Tensor:
        began = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{name:<28}{time.perf_counter() - began:8.2f} s")
        return result

    print(
        f"{date.today()}  {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options}"
    )
    began = time.perf_counter()
    model = build_model(ModelConfig(preset="sd21"), seed=0).to(device, getattr(torch, options.dtype))
    count = sum(p.numel() for part in (model.vae, model.unet, model.controlnet) for p in part.parameters())
    print(f"{'build, ' + format(count / 1e6, '.1f') + ' M parameters':<28}{time.perf_counter() - began:8.2f} s")
    noise = noise_for(0, [("benchmark",)], device, torch.float32)
    lr = noise((1, 3, 128, 128)).sigmoid()

    @torch.no_grad()
    def restore() -> Tensor:
        def condition() -> Tensor:
            mean, std = model.encode_condition(F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1))
            return mean + std * noise(mean.shape)

        z_lr = timed("encode LR at 512 px", condition)
        denoise = model.denoiser(z_lr)
        x0 = timed(
            "one step at t = 999",
            lambda: sample_ccsr_v2(denoise, z_lr, num_steps=1, t_max=2 / 3, t_min=0.5, start="lr", noise=noise),
        )
        return timed("decode to 512 px", lambda: model.decode(x0))

    image = timed("all", restore)
    assert image.shape == (1, 3, 512, 512)
    assert torch.isfinite(image).all()
    print(f"{'peak memory of the process':<28}{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:8.2f} GiB")
    if device.type == "cuda":
        print(f"{'peak memory on the device':<28}{torch.cuda.max_memory_allocated() / 2**30:8.2f} GiB")


if __name__ == "__main__":
    main()
