"""A node's system metrics: MLflow's own collector in a thread of ours, GPUs too, and a machine that it cannot read."""

import re
import socket
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from infra.process.node import NodeMonitor


def unheard(words: str) -> None:
    raise AssertionError(words)


def first_values(monitor: NodeMonitor) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while not (values := monitor()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return values


def test_what_mlflows_collector_reads_is_named_by_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with closing(NodeMonitor(unheard)) as monitor:
        values = first_values(monitor)
    prefix = f"system/{socket.gethostname()}/"
    assert all(name.startswith(prefix) for name in values)
    names = {name.removeprefix(prefix) for name in values}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= names
    assert {"network_receive_megabytes", "network_transmit_megabytes"} <= names
    assert values[f"{prefix}system_memory_usage_megabytes"] > 100
    assert all(re.fullmatch(r"[\w./-]+", name) for name in values)


def test_gpus_are_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics.metrics import gpu_monitor

    assert gpu_monitor.pynvml.__name__ == "pynvml", "a dependency of ours, which MLflow does not install"
    card = SimpleNamespace(
        NVMLError=gpu_monitor.pynvml.NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=40e9, total=80e9),
        nvmlDeviceGetUtilizationRates=lambda index: SimpleNamespace(gpu=90 - 60 * index),
        nvmlDeviceGetPowerUsage=lambda index: 350e3,
        nvmlDeviceGetEnforcedPowerLimit=lambda index: 700e3,
    )
    monkeypatch.setattr(gpu_monitor, "pynvml", card)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "rack-7")
    with closing(NodeMonitor(unheard)) as monitor:
        values = first_values(monitor)
    assert values["system/rack-7/gpu_0_utilization_percentage"] == 90
    assert values["system/rack-7/gpu_1_utilization_percentage"] == 30
    assert values["system/rack-7/gpu_1_memory_usage_percentage"] == 50


def test_a_machine_that_cannot_be_read_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)  # as in a container without network devices
    with closing(NodeMonitor(warned.append)) as monitor:
        deadline = time.monotonic() + 60
        while not warned and time.monotonic() < deadline:
            time.sleep(0.02)
        assert monitor() == {}
    assert "no system metrics (AttributeError" in warned[0]
