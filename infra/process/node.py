"""What MLflow's own collector reads of this machine: CPU, memory, disk, network, and GPUs where NVML finds some."""

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from infra.errors import line_of

NOWHERE = "http://127.0.0.1:9"  # what MLflow's monitor would send to, were its thread started


class NodeMonitor:
    """Samples in a thread, as often as MLflow does (10 s, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL); a call returns
    {"system/NODE/NAME": the mean since the last call}, empty without a sample. NODE is the host's name, or
    MLFLOW_SYSTEM_METRICS_NODE_ID.

    MLflow's own thread would count its samples where our charts count images, and end for good once the server is away.
    The collector here sends nothing and knows no server; a call while it reads is empty too.
    """

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn = warn
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._monitor: Any = None
        threading.Thread(target=self._run, name="node monitor", daemon=True).start()

    def __call__(self) -> dict[str, float]:
        if not self._lock.acquire(blocking=False):  # a driver that hangs would else stop all ranks
            return {}
        try:
            if self._monitor is None:
                return {}
            values = self._monitor.aggregate_metrics()
            self._clear()
        finally:
            self._lock.release()
        return {f"system/{self._monitor.node_id}/{name}": float(value) for name, value in values.items()}

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        try:
            monitor = self._make()
            with self._lock:
                self._monitor = monitor
            while not self._closed.wait(monitor.sampling_interval):
                with self._lock:
                    monitor.collect_metrics()
        except Exception as error:  # noqa: BLE001  whatever a container's /proc or a driver lacks: training continues
            self._warn(f"{socket.gethostname()}: no system metrics ({type(error).__name__}: {line_of(error)})")

    def _make(self) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # a line for each node without GPU
        monitor = SystemMetricsMonitor("", tracking_uri=NOWHERE, node_id=socket.gethostname())
        monitor.collect_metrics()  # a thread's first reading of the CPU's use is 0
        for one in monitor.monitors:
            one.clear_metrics()
        return monitor

    def _clear(self) -> None:
        for one in self._monitor.monitors:
            one.clear_metrics()
