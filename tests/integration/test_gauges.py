"""What a job shows to Prometheus, on the page that Prometheus reads and in a Prometheus that the dashboard asks."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from infra.process.gauges import GAUGES
from tests.prometheus import panels, prometheus, query, target_error
from tests.training_runs import free_port

JOB = """
import sys, time, urllib.request
import ray
from infra.display.progress import progress
from infra.process.gauges import show
from training.run.launch import show_rates
from types import SimpleNamespace

port, dashboard = map(int, sys.argv[1:])
with progress("before Ray", 2) as advance:
    advance()  # no gauge, no error
ports = {"dashboard_port": dashboard, "_metrics_export_port": port}
ray.init(num_cpus=1, include_dashboard=True, logging_level="ERROR", **ports)
rates = {"samples_per_second": 8.0, "data_wait_share": 0.25, "forward_seconds": 0.5}
deadline = time.monotonic() + 90
with progress("sharding", 10) as advance:
    advance(3)
    show_rates(SimpleNamespace(global_batch_size=16), 0, rates)
    show_rates(SimpleNamespace(global_batch_size=16), 1, rates | {"forward_seconds": 0.75})
    while time.monotonic() < deadline:
        try:
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            page = ""
        if "ray_ccsr_forward_seconds" in page and "ray_ccsr_progress_done" in page:
            break
        time.sleep(1)
print(page, "END", sep="\\n", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """A job that runs: its node's metrics port, and the page that was read there."""
    folder, port = tmp_path_factory.mktemp("job"), free_port()
    (folder / "job.py").write_text(JOB)
    command = [sys.executable, str(folder / "job.py"), str(port), str(free_port())]
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "5000"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    yield port, "".join(takewhile("END\n".__ne__, process.stdout))
    process.stdin.close()
    assert process.wait(120) == 0


@pytest.mark.slow
def test_a_jobs_numbers_are_on_the_page_that_prometheus_reads(job: tuple[int, str]) -> None:
    def value(name: str, label: str) -> float:
        (found,) = re.findall(rf"^ray_ccsr_{name}\{{.*{label}.*\}} (\S+)$", job[1], re.MULTILINE)
        return float(found)

    assert value("progress_done", 'job_title="sharding"') == 3
    assert value("progress_total", 'job_title="sharding"') == 10
    assert value("forward_seconds", 'rank="0"') == 0.5
    assert value("forward_seconds", 'rank="1"') == 0.75
    assert value("samples_per_second", "") == 8
    assert value("update_seconds", "") == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian's package prometheus is not installed")
def test_a_prometheus_answers_each_of_the_dashboards_queries(job: tuple[int, str], tmp_path: Path) -> None:
    asked = {target["expr"] for panel in panels() for target in panel["targets"]}
    (gpus,) = [expression for expression in asked if "gpus_utilization" in expression]  # none on this machine
    time.sleep(30)  # the job reports nothing more, and yet its last values stay
    with prometheus(job[0], tmp_path) as address:
        waiting, deadline = asked - {gpus}, time.monotonic() + 90
        while waiting and time.monotonic() < deadline:
            waiting = {expression for expression in waiting if not query(address, expression)}
            time.sleep(1)
        assert waiting == set(), target_error(address)
        (sharding,) = query(address, 'ray_ccsr_progress_done{job_title="sharding"}')
        assert sharding["value"][1] == "3"


def test_the_dashboard_shows_every_gauge() -> None:
    asked = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    assert {f"ray_{name}" for name in GAUGES} == set(re.findall(r"ray_ccsr_\w+", asked))
