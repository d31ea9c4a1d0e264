"""What `ccsr shard` measures of an image to leave it out by, and the histograms that thresholds are chosen by."""

import cv2
import numpy as np

from infra.display.bars import bars
from infra.errors import DataError
from infra.imaging.pixels import gradient_energy, grey_levels
from infra.shards.manifest import Manifest
from infra.shards.shard import SCORES
from pipelines.sharding.config import ShardConfig

BLOCK_PX = 8
EDGES = {
    "gradient_energy": 4.0 ** np.arange(-1, 8),
    "blockiness": np.array([0, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 2, 4, 100]),
    "sharpness": 4.0 ** np.arange(-1, 8),
}


def scores_of(image: np.ndarray) -> tuple[float, ...]:
    """`SCORES` of uint8 RGB (H, W, 3), to four digits, which do not depend on how a CPU sums.

    `gradient_energy`: of `infra.imaging.pixels`. `blockiness`: mean step of grey levels across JPEG's 8 px grid,
    wherever it begins, over the mean of the other steps, of rows and columns; 1: none, about 1.3: visible.
    `sharpness`: variance of the Laplacian of grey levels.
    """
    grey = grey_levels(image)
    sharpness = float(np.var(cv2.Laplacian(grey, cv2.CV_32F), dtype=np.float64))
    blockiness = sum(_blockiness(np.abs(np.diff(grey, axis=axis)).mean(1 - axis)) for axis in (0, 1)) / 2
    return tuple(float(f"{score:.4g}") for score in (gradient_energy(grey), blockiness, sharpness))


def _blockiness(steps: np.ndarray) -> float:
    sums = np.array([steps[phase::BLOCK_PX].sum(dtype=np.float64) for phase in range(BLOCK_PX)])
    counts = np.array([len(steps[phase::BLOCK_PX]) for phase in range(BLOCK_PX)])
    inside = (sums.sum() - sums) / (counts.sum() - counts)
    ratios = (sums / counts)[inside > 0] / inside[inside > 0]
    return float(ratios.max(initial=1.0))


def unwanted_file(image: np.ndarray, config: ShardConfig) -> str | None:
    """The reason why an image as a whole is left out."""
    short, long = sorted(image.shape[:2])
    if short < config.min_side_px:
        return "small_side"
    return "aspect" if config.max_aspect and long > config.max_aspect * short else None


def unwanted(scores: tuple[float, ...], config: ShardConfig) -> str | None:
    """The reason why a window is left out."""
    energy, blockiness, sharpness = scores
    if energy < config.min_gradient_energy:
        return "flat"
    if config.max_blockiness and blockiness > config.max_blockiness:
        return "blocky"
    return "blurred" if sharpness < config.min_sharpness else None


def print_stats(uri: str) -> None:
    """Print a histogram of each score over a set. DataError for a set of an earlier version, which holds none."""
    index = Manifest.load(uri).index
    if SCORES[0] not in index.column_names:
        raise DataError(
            "this set was made by an earlier version: its index holds no scores",
            where=uri,
            todo="make the set again with `ccsr shard`",
        )
    for name in SCORES:
        values = index[name].to_numpy()
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
        print(f"{name}: 5 % below {low:.4g}, half below {middle:.4g}, 95 % below {high:.4g}")
        print("\n".join(bars(values, EDGES[name])), end="\n\n")
