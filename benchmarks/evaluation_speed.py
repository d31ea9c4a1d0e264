"""PSNR-Y + SSIM-Y + L-STD of saved runs: ours against the published way, in one process, image by image in turn.

Published way (CCSR's cal_iqa scripts on pyiqa): each of three scripts reads every PNG again; PSNR and SSIM go through
torch on the CPU, L-STD stacks float32 runs. It is written here from its description, not run from its source. Its SSIM
is in float64, in which torch's convolution is slow; `--ssim float32` is kinder to it and several times quicker.

    python benchmarks/evaluation_speed.py [--images 50] [--runs 10] [--side 512] [--threads 1] [--ssim float32]
"""

import argparse
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from evaluation import StabilityAccumulator, psnr_y, ssim_y
from infra.imaging.images import encode_png, read_image
from infra.seeding import rng_for

BORDER = 4
GAUSS = torch.from_numpy(cv2.getGaussianKernel(11, 1.5)).double()
WINDOW = (GAUSS @ GAUSS.T)[None, None]
LUMA = torch.tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)


def photograph(key: str, side: int) -> np.ndarray:
    """A smooth picture with texture: PNG decoding takes about as long as for a photograph."""
    rng = rng_for(0, "picture", key)
    coarse = cv2.resize(rng.uniform(40, 210, (12, 12, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
    texture = cv2.GaussianBlur(rng.normal(0, 30, (side, side, 3)), (0, 0), 1.2)
    return np.clip(np.rint(coarse + texture), 0, 255).astype(np.uint8)


def open_tensor(path: Path) -> torch.Tensor:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None, :, BORDER:-BORDER, BORDER:-BORDER]


def published_psnr(sr: torch.Tensor, gt: torch.Tensor) -> float:
    x, y = (((image * LUMA).sum(1, keepdim=True) + 16) / 255 for image in (sr, gt))
    return float(10 * torch.log10(1 / ((x - y).square().mean() + 1e-8)))


def published_ssim(sr: torch.Tensor, gt: torch.Tensor, dtype: torch.dtype) -> float:
    x, y = (((image * LUMA).sum(1, keepdim=True) + 16).round().to(dtype) for image in (sr, gt))
    window = WINDOW.to(dtype)
    mean_x, mean_y, xx, yy, xy = (F.conv2d(plane, window) for plane in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast = F.relu((2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2))
    return float(((2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * contrast).mean())


def published_l_std(runs: list[Path]) -> float:
    stack = np.stack([np.asarray(Image.open(run).convert("RGB"), dtype=np.float32) / 255 for run in runs])
    return float(stack[:, BORDER:-BORDER, BORDER:-BORDER].std(axis=0).mean())


def ours(runs: list[np.ndarray], gt: np.ndarray) -> tuple[list[float], list[float], float]:
    stability = StabilityAccumulator(crop_border=BORDER)
    for run in runs:
        stability.add(run)
    return [psnr_y(run, gt) for run in runs], [ssim_y(run, gt) for run in runs], stability.l_std()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("images", 50), ("runs", 10), ("side", 512), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ssim", choices=("float32", "float64"), default="float64")
    options = parser.parse_args()
    kind = getattr(torch, options.ssim)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - began

    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.images):
            hr = photograph(str(number), options.side)
            gt = Path(scratch) / "gt.png"
            gt.write_bytes(encode_png(hr))
            paths, arrays = [], []
            for run in range(options.runs):
                noise = cv2.GaussianBlur(rng_for(0, "noise", number, run).normal(0, 15, hr.shape), (0, 0), 0.8)
                arrays.append(np.clip(np.rint(hr + noise), 0, 255).astype(np.uint8))
                paths.append(Path(scratch) / f"{run}.png")
                paths[-1].write_bytes(encode_png(arrays[-1]))
            with clock("PSNR"):
                psnr = [published_psnr(open_tensor(path), open_tensor(gt)) for path in paths]
            with clock("SSIM"):
                ssim = [published_ssim(open_tensor(path), open_tensor(gt), kind) for path in paths]
            with clock("L-STD"):
                stability = published_l_std(paths)
            with clock("once"):
                read_once = ours([read_image(str(path)) for path in paths], read_image(str(gt)))
            with clock("memory"):
                in_memory = ours(arrays, hr)
            assert read_once == in_memory
            np.testing.assert_allclose(psnr, in_memory[0], atol=1e-4)
            # float32 itself is 1.5e-5 off
            np.testing.assert_allclose(ssim, in_memory[1], atol=1e-5 if options.ssim == "float64" else 1e-4)
            np.testing.assert_allclose(stability, in_memory[2], atol=1e-6)
    print(
        f"{platform.machine()}, {options.threads} thread(s), torch {version('torch')}, numpy {version('numpy')}, ",
        end="",
    )
    print(f"opencv {version('opencv-python-headless')}, Python {platform.python_version()}")
    print(f"{options.images} images x {options.runs} runs at {options.side} x {options.side} px; the numbers agree")
    rows = {
        f"published way, SSIM in {options.ssim}": seconds["PSNR"] + seconds["SSIM"] + seconds["L-STD"],
        "ours, every PNG read once": seconds["once"],
        "ours, in memory as in the job": seconds["memory"],
    }
    outputs, reference = options.images * options.runs, next(iter(rows.values()))
    for name, total in rows.items():
        print(f"{name:<32}{outputs / total:8.1f} outputs/s {reference / total:7.1f} x")


if __name__ == "__main__":
    main()
