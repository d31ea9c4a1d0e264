"""Metrics by name: how each is shown, which direction is better, what needs several runs."""

from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric is shown; `direction`: +1 where higher is better, -1 where lower is, 0 where neither."""

    label: str
    direction: int
    digits: int


METRICS = {
    "psnr_y": Metric("PSNR", 1, 2),
    "ssim_y": Metric("SSIM", 1, 4),
    "lpips": Metric("LPIPS", -1, 4),
    "dists": Metric("DISTS", -1, 4),
    "l_std": Metric("L-STD", -1, 4),
    "l_std_equal_sharpness": Metric("L-STD at equal sharpness", -1, 4),
    "p_std": Metric("P-STD", -1, 4),
    "fid": Metric("FID", -1, 2),
    "niqe": Metric("NIQE", -1, 2),
    "niqe_bt601": Metric("NIQE (BT.601)", -1, 2),
    "clipiqa": Metric("CLIPIQA", 1, 4),
    "musiq": Metric("MUSIQ", 1, 2),
    "sharpness": Metric("sharpness", 0, 3),
}
OVER_RUNS = ("l_std", "g_std_")
"""How the names of numbers begin that describe the spread over runs."""


def metric_direction(metric: str, directions: Mapping[str, int] | None = None) -> int:
    """+1 where higher is better, -1 where lower is (every g_std_METRIC and p_g_std_METRIC), 0 where neither.

    `directions`: of pyiqa's metrics.
    """
    if metric.startswith(("g_std_", "p_g_std_")):
        return -1
    return (directions or {}).get(metric, METRICS.get(metric, Metric(metric, 0, 4)).direction)


def needs_runs(metric: str) -> bool:
    """Whether a number describes the spread over the runs, which a deterministic method has none of."""
    return metric.startswith(OVER_RUNS)
