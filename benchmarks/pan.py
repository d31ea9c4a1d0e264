"""Flicker on a pan over a photograph: one noise field for all frames against one per frame, CCSR and uniform sampling.

PYTHONPATH=. python benchmarks/pan.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from evaluation.metrics.image import sharpness
from evaluation.metrics.stability import temporal_std
from infra.pixels import psnr_y
from training.config import SamplingConfig
from training.models import load_model
from training.restore.restore import restore_runs

SCALE, SIDE = 4, 192
MODEL = Path(__file__).parents[1] / "training" / "models" / "tiny_base"


def pan(photo: str, step_px: int, num_frames: int) -> np.ndarray:
    """uint8 (num_frames, SIDE, SIDE, 3): windows of a photograph, each `step_px` right of the one before."""
    image = np.asarray(Image.open(Path(skimage.__file__).parent / "data" / photo).convert("RGB"))
    top, left = image.shape[0] // 4, image.shape[1] // 6
    return np.stack([image[top:, left + n * step_px :][:SIDE, :SIDE] for n in range(num_frames)])


def scaled(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", nargs="+", default=["coffee.png", "chelsea.png"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--model", default=str(MODEL))
    options = parser.parse_args(arguments)
    model = load_model(options.model)
    samplings = {
        "ccsr, 15 steps": SamplingConfig(num_steps=15),
        "uniform, 15 steps": SamplingConfig(num_steps=15, sampler="uniform"),
    }
    print(
        "| photo | px a frame | sampling | noise | temporal_std | sharpness | PSNR-Y |\n|---|---|---|---|---|---|---|"
    )
    for photo in options.photos:
        for step in (0, 1, 4):  # HR px; at 4 the LR frame moves by a whole pixel
            truth = pan(photo, step, options.frames)
            lrs = [scaled(image, SIDE // SCALE) for image in truth]
            inputs = [scaled(lr, SIDE) for lr in lrs]
            for name, config in samplings.items():
                for noise in ("image", "shared"):
                    keys = ["frames" if noise == "shared" else f"{n:04d}" for n in range(len(lrs))]
                    frames = [
                        next(restore_runs(model, lr, (SIDE, SIDE), config, seed=0, key=key, runs=[0]))
                        for lr, key in zip(lrs, keys, strict=True)
                    ]
                    sharp = np.mean([sharpness(*pair) for pair in zip(frames, truth, strict=True)])
                    psnr = np.mean([psnr_y(*pair) for pair in zip(frames, truth, strict=True)])
                    flicker = temporal_std(frames, inputs)
                    print(
                        f"| {photo} | {step} | {name} | {noise} | {flicker:.4f} | {sharp:.3f} | {psnr:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
