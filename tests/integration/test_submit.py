"""`ccsr submit` against a real Ray head with its job server."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from infra.manifest import Manifest
from tests.integration.conftest import REPOSITORY, run_ccsr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def job_server():
    """A Ray head on loopback, started and ended by the test; yields the address of its job server."""
    port, dashboard = free_port(), free_port()
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
        "--num-cpus=2", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--include-dashboard=true",
        # Its own port: the agent of the Ray that the other tests share holds the default one.
        f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir=/tmp/ccsr-ray-{os.getpid()}",
    ]  # fmt: skip
    # A job's `python` is the one that comes first on the node's PATH, as in an activated environment.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen(command, **quiet, start_new_session=True, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{dashboard}", head)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


def _wait_for(address: str, head: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
            return
        except urllib.error.HTTPError:  # it is up, and wants a token
            return
        except OSError as error:
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the job server did not come up") from error
            time.sleep(0.5)


def test_a_submitted_job_runs_there_and_returns_its_exit_code(job_server, tmp_path):
    config = (REPOSITORY / "configs" / "demo" / "shard_heldout.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(config)
    out = f"output={tmp_path}/shards"
    # From another folder: the packages are shipped, the caller's folder is not.
    done = run_ccsr("submit", "--address", job_server, "--", "shard", "-c", "mine.yaml", "--set", out, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 samples, dataset" in done.stdout
    assert Manifest.load(f"{tmp_path}/shards").num_samples == 4
    stranger = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    refused = run_ccsr("submit", "--address", job_server, "--", "verify", "x", cwd=tmp_path, **stranger)
    assert refused.returncode == 6
    assert "its token is missing or wrong" in refused.stderr
    failed = run_ccsr("submit", "--address", job_server, "--", "verify", f"{tmp_path}/nothing", cwd=tmp_path)
    assert failed.returncode == 1
    assert "there is no complete shard set here" in failed.stdout


def test_what_cannot_be_submitted_is_told_at_once(tmp_path):
    unreachable = run_ccsr("submit", "--address", f"http://127.0.0.1:{free_port()}", "--", "verify", "x", cwd=tmp_path)
    assert unreachable.returncode == 6
    assert unreachable.stderr.startswith("error: the cluster's job server does not answer")
    demo = run_ccsr("submit", "--", "demo", cwd=tmp_path)
    assert demo.returncode == 2
    assert "cannot be submitted" in demo.stderr
