"""What the tiny base shows on held-out photographs: `python -m benchmarks.tiny_base runs/heldout/evaluation` prints one
row per photograph of benchmarks/heldout_evaluation.yaml's result, and draws docs/tiny-base.jpg."""

import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from evaluation.results import load_result
from infra.imaging.images import read_image

SHEET = Path(__file__).resolve().parents[1] / "docs" / "tiny-base.jpg"
LABEL = 20
SEEDS = ("CCSR", "ccsr_seed1", "ccsr_seed2")
SHOWN = 4
COLUMNS = """photo, PSNR-Y bicubic, uniform, truncated, ccsr, energy / bicubic's uniform, truncated, ccsr,
L-STD uniform, truncated, ccsr, ccsr / truncated, at equal sharpness truncated / uniform, ccsr / truncated"""


def claims(folder: str) -> list[str]:
    """A row per photograph, of ccsr a number per training seed; ratios at equal sharpness are not numbers where a run
    is less sharp than bicubic."""
    methods = load_result(folder).methods
    bicubic = methods["bicubic"]
    shown = [methods[name] for name in ("uniform", "truncated", *SEEDS)]
    rows = []
    for index, key in enumerate(bicubic.keys):
        l_std = np.array([method.l_std[index] for method in shown])
        equal = np.array([method.l_std_equal_sharpness[index] for method in shown])
        row = _cells(".2f", [method.scores["psnr_y"][index].mean() for method in (bicubic, *shown)])
        row += _cells(".2f", [method.sharpness[index] / bicubic.sharpness[index] for method in shown])
        row += _cells(".4f", l_std) + _cells(".2f", l_std[2:] / l_std[1])
        row += _cells(".2f", [equal[1] / equal[0], *(equal[2:] / equal[1])])
        rows.append("| " + " | ".join([key, *row]) + " |")
    return rows


def _cells(form: str, values: Sequence[float]) -> list[str]:
    """A cell per value; the last three, of the seeds, share one."""
    texts = [f"{value:{form}}" for value in values]
    return [*texts[: -len(SEEDS)], ", ".join(texts[-len(SEEDS) :])]


def sheet(folder: str) -> np.ndarray:
    """Where uniform's runs differ most: LR enlarged, bicubic, two runs of ccsr and of uniform, the
    truth, and both stability maps on one scale; four photographs."""
    methods, rows = load_result(folder).methods, []
    most = np.argsort(methods["uniform"].l_std)[::-1][:SHOWN]
    for key in [methods["uniform"].keys[index] for index in most]:
        images = Path(folder) / "images"
        names = {"bicubic": "bicubic/00", "ccsr, run 0": "CCSR/00", "ccsr, run 1": "CCSR/01"}
        names |= {"uniform, run 0": "uniform/00", "uniform, run 1": "uniform/01", "truth": "hr"}
        cells = [labelled(read_image(str(images / place / f"{key}.png")), name) for name, place in names.items()]
        lr = read_image(str(images / "lr" / f"{key}.png"))
        side = cells[0].shape[1]
        lr = cv2.resize(lr, (side, side), interpolation=cv2.INTER_NEAREST)
        maps = [cv2.imread(str(images / name / "l_std" / f"{key}.png"), -1) for name in ("CCSR", "uniform")]
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


def main(folder: str) -> None:
    columns = [column.strip() for column in COLUMNS.split(",")]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    print("\n".join(claims(folder)))
    cv2.imwrite(str(SHEET), sheet(folder)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main(*sys.argv[1:])
