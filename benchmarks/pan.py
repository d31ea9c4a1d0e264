"""Flicker on a pan over a photograph: one noise field for all frames against one per frame, CCSR and uniform sampling,
and AdaIN of each frame against AdaIN smoothed over time.

PYTHONPATH=. python benchmarks/pan.py [--photos coffee.png] [--steps-px 1 4] [--noise shared] [--jpeg 40]
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from torch import Tensor

from evaluation.metrics.image import sharpness
from evaluation.metrics.stability import temporal_std
from infra.imaging.pixels import psnr_y
from training.config import SamplingConfig
from training.models import CcsrModel, load_model
from training.restore.seeded_runs import prepare_image, restore_batch
from training.sampling import SmoothedColorFix, color_fix

SCALE, SIDE = 4, 192
MODEL = Path(__file__).parents[1] / "training" / "models" / "tiny_base"


def pan(photo: str, step_px: int, num_frames: int) -> np.ndarray:
    """uint8 (num_frames, SIDE, SIDE, 3): windows of a photograph, each `step_px` right of the one before."""
    image = np.asarray(Image.open(Path(skimage.__file__).parent / "data" / photo).convert("RGB"))
    top, left = image.shape[0] // 4, image.shape[1] // 6
    return np.stack([image[top:, left + n * step_px :][:SIDE, :SIDE] for n in range(num_frames)])


def scaled(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def compressed(image: np.ndarray, quality: int | None) -> np.ndarray:
    if quality is None:
        return image
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", nargs="+", default=["coffee.png", "chelsea.png"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps-px", nargs="+", type=int, default=[0, 1, 4])  # HR px; at 4 the LR moves by a pixel
    parser.add_argument("--noise", nargs="+", default=["image", "shared"])
    parser.add_argument("--jpeg", type=int, help="quality at which the LR frames are compressed, each alone")
    parser.add_argument("--model", default=str(MODEL))
    options = parser.parse_args(arguments)
    model = load_model(options.model)
    samplings = {
        "ccsr, 15 steps": SamplingConfig(num_steps=15),
        "uniform, 15 steps": SamplingConfig(num_steps=15, sampler="uniform"),
    }
    columns = ("photo", "px a frame", "sampling", "noise", "colours", "temporal_std", "sharpness", "PSNR-Y")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for photo in options.photos:
        for step in options.steps_px:
            truth = pan(photo, step, options.frames)
            lrs = [compressed(scaled(image, SIDE // SCALE), options.jpeg) for image in truth]
            inputs = [scaled(lr, SIDE) for lr in lrs]
            for name, config in samplings.items():
                for noise in options.noise:
                    keys = ["frames" if noise == "shared" else f"{n:04d}" for n in range(len(lrs))]
                    decoded = [decode(model, lr, config, key) for lr, key in zip(lrs, keys, strict=True)]
                    for colours, fix in (("each frame", color_fix), ("smoothed", SmoothedColorFix())):
                        frames = [as_bytes(fix(*pair, "adain")) for pair in decoded]
                        sharp = np.mean([sharpness(*pair) for pair in zip(frames, truth, strict=True)])
                        psnr = np.mean([psnr_y(*pair) for pair in zip(frames, truth, strict=True)])
                        flicker = temporal_std(frames, inputs)
                        row = (photo, step, name, noise, colours, f"{flicker:.4f}", f"{sharp:.3f}", f"{psnr:.2f}")
                        print(f"| {' | '.join(map(str, row))} |", flush=True)


def decode(model: CcsrModel, lr: np.ndarray, config: SamplingConfig, key: str) -> tuple[Tensor, Tensor]:
    """The decoded frame and its enlarged LR before the colours are fixed, (1, 3, SIDE, SIDE)."""
    pair: list[tuple[Tensor, Tensor]] = []

    def keep(image: Tensor, reference: Tensor, method: str, epsilon: float) -> Tensor:
        pair.append((image, reference))
        return image

    image = prepare_image(model, lr, (SIDE, SIDE), config, key=key)
    list(restore_batch(model, [(image, 0)], config, seed=0, fix=keep))
    return pair[0]


def as_bytes(image: Tensor) -> np.ndarray:
    return image[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main()
