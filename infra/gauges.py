"""Numbers of a running job for Prometheus, through the Ray node's metrics agent; nothing where Ray does not run."""

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

GAUGES = {
    "ccsr_progress_done": "finished parts of a job: samples of a set, runs of an evaluation, updates",
    "ccsr_progress_total": "parts that the job has",
    "ccsr_samples_per_second": "samples that all ranks train on per second",
    "ccsr_data_wait_share": "share of the time that a rank waits for samples",
    "ccsr_update_seconds": "time of an update, which is as long as the slowest rank's",
    "ccsr_forward_seconds": "time of a rank's own forward passes in an update",
}
"""By name; Ray's agent puts `ray_` before it."""


def show(values: Mapping[str, float], **tags: str) -> None:
    """Set gauges of GAUGES to `values`; `tags` become Prometheus labels."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    for name, value in values.items():
        _gauge(name, tuple(tags)).set(value, tags=tags)


@cache
def _gauge(name: str, tags: tuple[str, ...]) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=GAUGES[name], tag_keys=tags)
