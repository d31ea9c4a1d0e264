"""A picture of the dashboard's panels while the demo runs, drawn by a Prometheus (Debian's package) in Chromium.

    python -m benchmarks.dashboard docs/dashboard.png

Grafana is not among Debian's packages, so one of Prometheus' consoles draws the panels: the same queries, of the same
metrics port that a PodMonitor reads. The demo runs on a Ray that was started by hand, as a cluster's is.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.prometheus import panels, prometheus
from tests.training_runs import free_port

PYTHON = Path(sys.executable)
MINUTES = 4
CONSOLE = """<!doctype html>
<link href="/classic/static/rickshaw/rickshaw.min.css" rel="stylesheet">
<link href="/classic/static/css/prom_console.css" rel="stylesheet">
<style>body {font-family: sans-serif; display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px}
h4 {margin: 0 0 4px 40px}</style>
<script>var PATH_PREFIX = "";</script>
<script src="/classic/static/d3/d3.min.js"></script>
<script src="/classic/static/rickshaw/rickshaw.min.js"></script>
<script src="/classic/static/js/prom_console.js"></script>
<body><script>
for (const [title, expr, name] of PANELS) {
  const node = document.body.appendChild(document.createElement("div"));
  node.appendChild(document.createElement("h4")).textContent = title;
  new PromConsole.Graph({node, expr, name, width: 370, height: 130, duration: SECONDS, min: 0, xTitle: ""});
}
</script>
"""


def draw(address: str, folder: Path, seconds: float, picture: Path) -> None:
    """The console that is in `folder`, of the last `seconds`."""
    drawn = []
    for panel in panels():
        legends = [target["legendFormat"].replace("{{", "[[").replace("}}", "]]") for target in panel["targets"]]
        drawn.append((panel["title"], [target["expr"] for target in panel["targets"]], legends))
    page = CONSOLE.replace("PANELS", json.dumps(drawn)).replace("SECONDS", str(int(seconds)))
    (folder / "ccsr.html").write_text(page.replace("{{", "{ {"))
    options = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--window-size=1300,640",
        "--virtual-time-budget=20000",
    ]
    command = ["chromium", *options, f"--screenshot={picture}", f"{address}/consoles/ccsr.html"]
    subprocess.run(command, check=True, timeout=120)


def main() -> None:
    picture, port, metrics_port = Path(sys.argv[1]).resolve(), free_port(), free_port()
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_TMPDIR": "/tmp/ccsr-dashboard"}
    with tempfile.TemporaryDirectory() as folder:
        ports = [f"--port={port}", f"--metrics-export-port={metrics_port}", f"--dashboard-port={free_port()}"]
        start = [PYTHON.with_name("ray"), "start", "--head", *ports, "--num-cpus=2", "--disable-usage-stats", "--block"]
        node = subprocess.Popen([*start, "--node-ip-address=127.0.0.1"], env=environment)
        try:
            with prometheus(metrics_port, Path(folder)) as address:
                time.sleep(20)
                began = time.monotonic()
                demo = subprocess.Popen(
                    [PYTHON, "-m", "pipelines.cli.main", "demo", "--out", f"{folder}/demo"], env=environment
                )
                with suppress(subprocess.TimeoutExpired):
                    demo.wait(60 * MINUTES)
                demo.terminate()
                draw(address, Path(folder), time.monotonic() - began + 20, picture)
                demo.wait(120)
        finally:
            node.terminate()
            node.wait(120)


if __name__ == "__main__":
    main()
