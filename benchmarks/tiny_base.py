"""The demo's claim, photo by photo and for several training seeds; draws docs/tiny-base.jpg from the first seed."""

import argparse
from pathlib import Path

import cv2
import numpy as np

from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from evaluation.results import load_result
from infra.imaging.images import read_image
from infra.process.ray_runtime import RayConfig, ray_cluster
from pipelines.demo import TRAININGS, demo_config
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import run_shard
from training.config import TrainConfig
from training.run.driver import run_train

SHEET = Path(__file__).resolve().parents[1] / "docs" / "tiny-base.jpg"
LABEL = 20


def run_seed(out: str, seed: int) -> str:
    """The demo with another training seed; the evaluation's folder."""
    for name in ("shard_train", "shard_heldout"):
        run_shard(demo_config(name, ShardConfig, out))
    for name in TRAININGS:
        run_train(demo_config(name, TrainConfig, out).model_copy(update={"seed": seed}))
    return run_evaluate(demo_config("evaluate", EvaluateConfig, out)).folder


def claims(folder: str, seed: int) -> list[str]:
    """One row per photo: PSNR-Y against bicubic's, gradient energy over bicubic's, L-STD over uniform's."""
    methods = load_result(folder).methods
    bicubic, uniform, truncated, ccsr = (methods[name] for name in ("bicubic", "uniform", "truncated", "ccsr"))
    rows = []
    for index, key in enumerate(ccsr.keys):
        psnr = [method.scores["psnr_y"][index].mean() for method in (bicubic, uniform, truncated, ccsr)]
        sharp = [method.sharpness[index] / bicubic.sharpness[index] for method in (uniform, truncated, ccsr)]
        l_std = [method.l_std[index] for method in (uniform, truncated, ccsr)]
        ratio = l_std[2] / l_std[0]
        reached = (psnr[3] >= psnr[0] - 2, sharp[2] >= 1.2, ratio <= 0.8)
        cells = [f"{seed}", key, *(f"{value:.2f}" for value in (*psnr, *sharp)), *(f"{value:.4f}" for value in l_std)]
        rows.append("| " + " | ".join([*cells, f"{ratio:.2f}", *("yes" if r else "no" for r in reached)]) + " |")
    return rows


def sheet(folder: str) -> np.ndarray:
    """Per photo: LR enlarged, two runs of ccsr and of uniform, the truth, and both stability maps on one scale."""
    rows = []
    for key in load_result(folder).methods["ccsr"].keys:
        images = Path(folder) / "images"
        names = ["bicubic/00", "ccsr/00", "ccsr/01", "uniform/00", "uniform/01", "hr"]
        cells = [labelled(read_image(str(images / name / f"{key}.png")), name) for name in names]
        lr = read_image(str(images / "lr" / f"{key}.png"))
        side = cells[0].shape[1]
        lr = cv2.resize(lr, (side, side), interpolation=cv2.INTER_NEAREST)
        maps = [cv2.imread(str(images / name / "l_std" / f"{key}.png"), -1) for name in ("ccsr", "uniform")]
        maps = [cv2.resize(m.astype(np.float32) / 65535, (side, side)) for m in maps]
        scale = np.quantile(maps[1], 0.99)
        drawn = [
            cv2.applyColorMap((np.clip(m / scale, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS) for m in maps
        ]
        cells += [labelled(m[..., ::-1], f"L-STD {name}") for m, name in zip(drawn, ("ccsr", "uniform"), strict=True)]
        rows.append(np.hstack([labelled(lr, "input"), *cells]))
    return np.vstack(rows)


def labelled(image: np.ndarray, text: str) -> np.ndarray:
    strip = np.full((LABEL, image.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([strip, image])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/tiny-base")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    columns = "seed, photo, PSNR-Y bicubic, uniform, truncated, ccsr, energy / bicubic's uniform, truncated, ccsr"
    columns += ", L-STD uniform, truncated, ccsr, ccsr / uniform, PSNR reached, energy reached, L-STD reached"
    print(f"| {columns.replace(', ', ' | ')} |\n|{'---|' * (columns.count(',') + 1)}", flush=True)
    with ray_cluster(RayConfig()):
        for seed in range(arguments.seeds):
            folder = run_seed(f"{Path(arguments.out).absolute()}/{seed}", seed)
            print("\n".join(claims(folder, seed)), flush=True)
            if seed == 0:
                cv2.imwrite(str(SHEET), sheet(folder)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main()
