"""`ccsr submit` and `ccsr jobs` against a real Ray of two nodes, one of them a GPU node by its label."""

import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.cluster.follow import follow
from infra.cluster.jobs import Need, job_status, list_jobs, stop, submit
from infra.cluster.server import cluster_facts, connect
from infra.errors import ClusterError, ConfigError, StorageError
from infra.run import git_commit
from infra.shards.manifest import Manifest
from pipelines.cli.main import app
from tests.integration.conftest import REPOSITORY, run_ccsr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A head and a GPU node on loopback, started and ended by the test; yields job server and Ray address."""
    port, dashboard, logs = free_port(), free_port(), tmp_path_factory.mktemp("ray")
    ray, nodes = str(Path(sys.executable).with_name("ray")), []
    # A job's `python` is the one that comes first on the node's PATH, as in an activated environment.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def start(*options: str) -> subprocess.Popen:
        common = ["--block", "--disable-usage-stats", "--num-cpus=2", "--object-store-memory=100000000"]
        # Its own port: the agent of the Ray that the other tests share holds the default one.
        command = [ray, "start", *common, f"--dashboard-agent-listen-port={free_port()}", *options]
        with open(logs / f"{len(nodes)}.log", "w") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            nodes.append(subprocess.Popen(command, **output, start_new_session=True, env=environment))
        return nodes[-1]

    try:
        head = start(
            "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir=/tmp/ccsr-ray-{os.getpid()}",
        )  # fmt: skip
        _wait_for(f"http://127.0.0.1:{dashboard}", head)
        gpu_node = start(f"--address=127.0.0.1:{port}", "--num-gpus=1", "--labels=ccsr.io/kind=gpu")
        client = connect(f"http://127.0.0.1:{dashboard}")
        while len(cluster_facts(client).nodes) < 2:
            assert gpu_node.poll() is None, (logs / "1.log").read_text()
            time.sleep(0.5)
        yield client.get_address(), f"127.0.0.1:{port}"
    finally:
        for node in nodes:  # not asked politely: that takes half a minute
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait(timeout=60)


def _wait_for(address: str, head: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
            return
        except urllib.error.HTTPError:  # it is up, and requires a token
            return
        except OSError as error:
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the job server did not come up") from error
            time.sleep(0.5)


@pytest.fixture
def job_server(cluster: tuple[str, str]) -> str:
    return cluster[0]


def test_a_submitted_job_runs_there_once_and_returns_its_exit_code(job_server, tmp_path):
    config = (REPOSITORY / "configs" / "demo" / "shard_heldout.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(config)
    sharding = ["shard", "-c", "mine.yaml", "--set", f"output={tmp_path}/shards", "--set", "samples_per_shard=1"]
    # From another folder: the packages are shipped, the caller's folder is not.
    done = run_ccsr("submit", "--address", job_server, "--", *sharding, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 samples, dataset" in done.stdout
    assert Manifest.load(f"{tmp_path}/shards").num_samples == 4
    lines: list[str] = []
    sharding[2] = str(tmp_path / "mine.yaml")  # the same content
    assert submit(job_server, sharding, lines.append)[1] is None
    assert len(lines) == 1
    assert re.search(r"-1 succeeded at \d{4}-.*; --key NAME forces a new job", lines[0])
    refused = run_ccsr("submit", "--address", job_server, "--", "verify", "x", cwd=tmp_path, RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 6
    assert "its token is missing or wrong" in refused.stderr
    client = connect(job_server)
    (done,) = list_jobs(client)
    assert done.status == "SUCCEEDED"
    assert client.get_job_info(done.id).runtime_env["env_vars"]["CCSR_GIT_COMMIT"] == git_commit()
    with pytest.raises(ClusterError, match="knows no such job"):
        follow(client, "ccsr-shard-nothing-1", lines.append)

    failing = ["verify", f"{tmp_path}/nothing"]
    attempts = [submit(job_server, failing, lines.append, key="failing")[1]]
    assert follow(client, attempts[0], lines.append) == 3
    assert "there is no complete shard set here" in "".join(lines)
    with ThreadPoolExecutor(2) as both:  # after a failure the next attempt is started, by one of two
        attempts += both.map(lambda _: submit(job_server, failing, lines.append, key="failing")[1], range(2))
    assert attempts[1] == attempts[2] == attempts[0].removesuffix("1") + "2"
    assert len(list_jobs(client)) == 3

    lines.clear()
    assert follow(*submit(job_server, ["doctor"], lines.append), lines.append) == 0, "".join(lines)
    assert "ok    packages: infra, degradation, training, evaluation, pipelines in" in "".join(lines)
    assert job_status(client, attempts[0]).exit_code == 3
    listed = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["jobs", "list", "--address", job_server])
    assert listed.exit_code == 0, listed.output
    assert f"ccsr verify {tmp_path}/nothing" in listed.output
    narrow = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["jobs", "list", "--address", job_server]).output.split()
    rows = json.loads(CliRunner().invoke(app, ["jobs", "list", "--address", job_server, "--json"]).stdout)
    assert (attempts[0], "FAILED", 3) in [(row["job"], row["status"], row["exit"]) for row in rows]
    for row in rows:
        assert {row["job"], row["status"], *row["command"].split()} <= set(narrow)


class CuttingProxy:
    """Passes bytes on to a server, and cuts every connection that has lived for `seconds`; counts its cuts."""

    def __init__(self, target: str, seconds: float) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target, self._seconds, self.num_cut = (host, int(port)), seconds, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()

    def _pass_on(self, connection: socket.socket) -> None:
        end = time.monotonic() + self._seconds
        with connection, socket.create_connection(self._target) as server:
            while time.monotonic() < end:
                for ready in select.select([connection, server], [], [], 0.05)[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    (server if ready is connection else connection).sendall(data)
            self.num_cut += 1

    def close(self) -> None:
        self._listener.close()


def test_a_log_survives_lost_connections(job_server):
    script = "import time\nfor i in range(24): print(f'line {i}', flush=True); time.sleep(0.25)\nraise SystemExit(7)"
    proxy = CuttingProxy(job_server, seconds=2.5)
    try:
        client = connect(proxy.address)
        job = client.submit_job(entrypoint=f"python -c {shlex.quote(script)}")
        texts: list[str] = []
        assert follow(client, job, texts.append) == 7
    finally:
        proxy.close()
    assert proxy.num_cut >= 2
    told = [line for line in "".join(texts).splitlines() if line.startswith("line ")]
    assert told == [f"line {i}" for i in range(24)]

    direct = connect(job_server)
    sleeping = direct.submit_job(entrypoint="sleep 100")
    while job_status(direct, sleeping).status == "PENDING":
        time.sleep(0.2)
    assert stop(direct, sleeping)
    assert follow(direct, sleeping, texts.append) == 143
    assert not stop(direct, sleeping)
    with pytest.raises(ClusterError, match="knows no such job"):
        job_status(direct, "ccsr-never")


PLACEMENT = """
import json, sys, time
import numpy as np
import ray
from infra.process.numerics import NumericsConfig
from infra.process.ray_runtime import RayConfig, on_ray, ray_cluster
from training.data.batches import arrays_on_ray
from training.data.samples import TrainingSample

def node(task):
    return ray.get_runtime_context().get_node_id()

config = RayConfig(address=sys.argv[1], task_memory_bytes=50 * 2**20)
with ray_cluster(config):
    gpus = {one["NodeID"] for one in ray.nodes() if one["Resources"].get("GPU")}
    everywhere = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(lambda: (time.sleep(1), node(0))[1])
    found = {"plain": ray.get([everywhere.remote() for _ in range(4)])}
    found["actors"] = list(on_ray(
        lambda: node, [0, 1], config=config, num_actors=2, device="cpu", numerics=NumericsConfig(), output="o"))
    found["on gpus"] = list(on_ray(
        lambda: node, [0], config=config, num_actors=1, device="cuda", numerics=NumericsConfig(), output="o"))
    class Maker:
        def __call__(self, place):
            pixels = np.full((1, 1, 3), int(ray.get_runtime_context().get_node_id() in gpus), np.uint8)
            time.sleep(0.5)
            return TrainingSample("k", 0, pixels, pixels)
    make = arrays_on_ray(Maker(), config)
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as pool:
        found["ingest on gpu nodes"] = [int(one["hr"].max()) for one in pool.map(make, [[None]] * 4)]
    from ray.util.state import list_tasks
    written = [task for task in list_tasks(detail=True, limit=1000) if "Map(work)" in task.name and task.node_id]
    found["sharding"] = [task.node_id for task in written]
    print(json.dumps({"gpus": sorted(gpus), **found}))
"""


@pytest.mark.slow
def test_work_without_gpus_keeps_off_gpu_nodes(cluster, job_server):
    """After the first test, whose sharding is looked up in Ray's list of tasks."""
    done = subprocess.run(
        [sys.executable, "-c", PLACEMENT, cluster[1]],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        env=os.environ | {"RAY_API_SERVER_ADDRESS": job_server},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (gpu_node,) = found["gpus"]
    assert gpu_node in found["plain"]  # it does take work without a placement
    assert found["on gpus"] == [gpu_node]
    assert len(found["actors"]) == 2
    assert gpu_node not in found["actors"]
    assert found["ingest on gpu nodes"] == [0] * 4
    assert len(found["sharding"]) >= 4
    assert gpu_node not in found["sharding"]


def test_what_cannot_work_is_told_before_anything_starts(job_server, bucket, tmp_path, monkeypatch):
    client = connect(job_server)
    before = len(list_jobs(client))
    assert cluster_facts(client).gpus.most == 1

    def refused(kind: type[Exception], match: str, **needs: object) -> None:
        with pytest.raises(kind, match=match):
            submit(job_server, ["verify", "x"], print, need=Need(**needs))

    refused(ClusterError, "needs 2 GPUs, the cluster has 1", num_gpus=2)
    refused(StorageError, "no such bucket", outputs=("s3://absent/out",))
    with monkeypatch.context() as environment:
        (tmp_path / "auth_token").write_text(os.environ["RAY_AUTH_TOKEN"])
        environment.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "auth_token"))
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # the token's file alone, as for a user
            environment.delenv(name)
        done = run_ccsr("doctor", "--address", job_server, "--json", cwd=tmp_path)
    found = {line["name"]: line for line in json.loads(done.stdout)}
    assert [found[name]["state"] for name in ("cluster", "token", "nodes")] == ["ok", "ok", "ok"], done.stdout
    assert "placement" not in found
    monkeypatch.setattr("ray.__version__", "2.59.0")
    refused(ClusterError, "Ray 2.60.* runs there, 2.59.0 is installed here")
    assert len(list_jobs(client)) == before

    unreachable = run_ccsr("submit", "--address", f"127.0.0.1:{free_port()}", "--", "verify", "x", cwd=tmp_path)
    assert unreachable.returncode == 6
    assert unreachable.stderr.startswith("error: the cluster's job server does not answer")
    with pytest.raises(ConfigError, match="cannot be submitted"):
        submit(job_server, ["demo"], print)
