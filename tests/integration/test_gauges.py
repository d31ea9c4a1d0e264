"""What a job shows to Prometheus, read from the page that Prometheus reads; and that the dashboard asks for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.cluster.render import DASHBOARD, TEMPLATES
from infra.gauges import GAUGES
from tests.training_runs import free_port

JOB = """
import sys, time, urllib.request
import ray
from infra.display.progress import progress
from infra.gauges import show
from training.run.launch import show_rates
from types import SimpleNamespace

port = int(sys.argv[1])
with progress("before Ray", 2) as advance:
    advance()  # no gauge, no error
ray.init(num_cpus=1, include_dashboard=False, _metrics_export_port=port, logging_level="ERROR")
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
print(page)
"""


@pytest.mark.slow
def test_a_jobs_numbers_are_on_the_page_that_prometheus_reads(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}
    command = [sys.executable, str(tmp_path / "job.py"), str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

    def value(name: str, label: str) -> float:
        (found,) = re.findall(rf"^ray_ccsr_{name}\{{.*{label}.*\}} (\S+)$", done.stdout, re.MULTILINE)
        return float(found)

    assert value("progress_done", 'job_title="sharding"') == 3
    assert value("progress_total", 'job_title="sharding"') == 10
    assert value("forward_seconds", 'rank="0"') == 0.5
    assert value("forward_seconds", 'rank="1"') == 0.75
    assert value("samples_per_second", "") == 8
    assert value("update_seconds", "") == 2


def test_the_dashboard_shows_every_gauge() -> None:
    panels = json.loads((TEMPLATES / DASHBOARD).read_text())["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert {f"ray_{name}" for name in GAUGES} == set(re.findall(r"ray_ccsr_\w+", asked))
