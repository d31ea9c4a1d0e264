"""A small evaluation result folder, written as the job writes it, from given photographs and synthetic methods."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evaluation import StabilityAccumulator, l_std_equal_sharpness, psnr_y, sharpness, ssim_y
from evaluation.results import image_row, images_schema, results_schema
from infra import rng_for
from infra.imaging.images import encode_png

METRICS = ["psnr_y", "ssim_y", "lpips"]  # lpips is an example of a metric whose weights are missing
Restore = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # bicubic image, generator -> output


def photographs(num_images: int = 3, side: int = 64) -> dict[str, np.ndarray]:
    """Smooth random uint8 pictures with some texture."""
    pictures = {}
    for i in range(num_images):
        rng = rng_for(0, "picture", i)
        coarse = cv2.resize(rng.uniform(40, 210, (6, 6, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
        fine = rng.normal(0, 12, (side, side, 3))
        pictures[f"img{i}"] = np.clip(np.rint(coarse + fine), 0, 255).astype(np.uint8)
    return pictures


def noisy(sigma: float, sharpen: float = 0.0) -> Restore:
    def restore(bicubic: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        base = bicubic + sharpen * (bicubic - cv2.GaussianBlur(bicubic, (0, 0), 2))
        return base + cv2.GaussianBlur(rng.normal(0, sigma, bicubic.shape), (0, 0), 0.7)

    return restore


def write_result(
    folder: Path,
    hr: dict[str, np.ndarray],
    methods: dict[str, tuple[int, Restore]],
    *,
    seed: int = 0,
    run: dict | None = None,
    method_config: dict | None = None,
    keys: Sequence[str] | None = None,
) -> Path:
    """`methods`: name -> (num_runs, restore); one run means deterministic."""
    results, images = [], []

    def save(*parts: str, picture: np.ndarray) -> None:
        path = folder.joinpath("images", *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".png").write_bytes(encode_png(picture))

    for key in keys or hr:
        height, width = hr[key].shape[:2]
        lr = cv2.resize(hr[key], (width // 4, height // 4), interpolation=cv2.INTER_AREA)
        bicubic = cv2.resize(lr, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float64)
        save("hr", key, picture=hr[key])
        save("lr", key, picture=lr)
        for name, (num_runs, restore) in methods.items():
            stability = StabilityAccumulator()
            outputs = []
            for i in range(num_runs):
                output = restore(bicubic, rng_for(seed, name, key, i))
                outputs.append(np.clip(np.rint(output), 0, 255).astype(np.uint8))
                save(name, f"{i:02d}", key, picture=outputs[-1])
                stability.add(outputs[-1])
            scores = {
                "psnr_y": [psnr_y(output, hr[key]) for output in outputs],
                "ssim_y": [ssim_y(output, hr[key]) for output in outputs],
                "lpips": [None] * num_runs,
            }
            for i in range(num_runs):
                row = {"method": name, "key": key, "run": i, "seed": seed + i}
                results.append(row | {metric: values[i] for metric, values in scores.items()})
            sharp = float(np.mean([sharpness(output, hr[key]) for output in outputs]))
            if num_runs > 1:
                save(name, "l_std", key, picture=np.rint(stability.map() * 65535).astype(np.uint16))
            numbers = {"l_std": 0.0, "sharpness": sharp}
            if num_runs > 1:
                smooth = np.clip(np.rint(bicubic), 0, 255).astype(np.uint8)
                numbers["l_std"] = stability.l_std()
                numbers["l_std_equal_sharpness"] = l_std_equal_sharpness(outputs, smooth)
            images.append(image_row(name, key, (height, width), scores, **numbers))
    pq.write_table(pa.Table.from_pylist(results, schema=results_schema(METRICS)), folder / "results.parquet")
    pq.write_table(pa.Table.from_pylist(images, schema=images_schema(METRICS)), folder / "images.parquet")
    (folder / "methods").mkdir(exist_ok=True)
    for name in methods:
        identity = {"config": {"name": name, **(method_config or {})}, "input": None}
        (folder / "methods" / f"{name}.json").write_text(json.dumps(identity))
    about = {"job": "evaluate", "config": {"seed": seed}, "fingerprint": "f00d", "dataset_id": "set-1", "seed": seed}
    (folder / "run.json").write_text(json.dumps(about | {"convention": "ccsr"} | (run or {})))
    return folder
