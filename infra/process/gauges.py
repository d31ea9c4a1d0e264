"""Numbers of a running job for Prometheus, through the Ray node's metrics agent; nothing where Ray does not run."""

import sys
import threading
import time
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

AGAIN_SECONDS = 5.0
"""Ray's agent forgets a gauge that is not set for two of its intervals (10 s each), and parts of a job take longer."""

held: dict[tuple[str, tuple[str, ...], tuple[str, ...]], float] = {}
_lock = threading.Lock()  # or an old value would be set again after a new one


def show(values: Mapping[str, float], **tags: str) -> None:
    """Set gauges of GAUGES to `values`, which stay until the next; `tags` become Prometheus labels."""
    if _ray_runs():
        shown = {(name, tuple(tags), tuple(tags.values())): value for name, value in values.items()}
        with _lock:
            held.update(shown)
            _set(shown)
        _keep_shown()


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _set(shown: Mapping[tuple[str, tuple[str, ...], tuple[str, ...]], float]) -> None:
    for (name, keys, labels), value in shown.items():
        ray_gauge(name, keys).set(value, tags=dict(zip(keys, labels, strict=True)))


@cache
def _keep_shown() -> None:
    def again() -> None:
        while True:
            time.sleep(AGAIN_SECONDS)
            if _ray_runs():
                with _lock:
                    _set(held)

    threading.Thread(target=again, daemon=True).start()


@cache
def ray_gauge(name: str, tags: tuple[str, ...]) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=GAUGES[name], tag_keys=tags)
