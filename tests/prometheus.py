"""Debian's Prometheus over a Ray node's metrics port, as a PodMonitor has one read a pod's."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from infra.cluster.render import DASHBOARD, TEMPLATES
from tests.training_runs import free_port

CLUSTER = "here"


@contextmanager
def prometheus(metrics_port: int, folder: Path) -> Iterator[str]:
    """Its address, once it answers. The port's series have the label that `podTargetLabels` gives a pod's."""
    target = {"targets": [f"127.0.0.1:{metrics_port}"], "labels": {"ray_io_cluster": CLUSTER}}
    config = {
        "global": {"scrape_interval": "5s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [target]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    listen = f"127.0.0.1:{free_port()}"
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "tsdb",
        "web.listen-address": listen,
        "web.console.templates": folder,
    }
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(["prometheus", *(f"--{k}={v}" for k, v in options.items())], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://{listen}/-/ready", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "prometheus.log").read_text()
                assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()
                time.sleep(0.2)
        yield f"http://{listen}"
    finally:
        server.terminate()
        server.wait(30)


def query(address: str, expression: str) -> list[dict[str, Any]]:
    """The series that an expression gives now."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    return _data(url)["result"]


def target_error(address: str) -> str:
    """Why the last read of the port failed, "" if it did not."""
    return _data(f"{address}/api/v1/targets")["activeTargets"][0]["lastError"]


def _data(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]


def panels() -> list[dict[str, Any]]:
    """The Grafana dashboard's panels, asking for CLUSTER."""
    text = (TEMPLATES / DASHBOARD).read_text().replace("$cluster", CLUSTER)
    return json.loads(text)["panels"]
