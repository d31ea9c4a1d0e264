"""Nodes on separate machines, which share nothing but S3, die and are cut off; results stay."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from cluster_nodes import Nodes, cluster_nodes
from faulty_server import faulty_server
from mlflow.tracking import MlflowClient
from shard_jobs import CCSR, NUM_SHARDS, ShardJob, num_records, require_undisturbed, wait, wait_until

from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from infra.config import Config, parse_config
from infra.files.publish import download_folder, write_bytes
from infra.files.storage import join, read_bytes
from tests.conftest import S3_SETTINGS
from tests.training_runs import noise_shards, run_workers, train_config
from training.run.checkpoint import complete_checkpoints, load_checkpoint

NUM_UPDATES = 20
PATIENCE_SECONDS = 900


@pytest.fixture
def nodes(request: pytest.FixtureRequest, s3_server: str) -> Iterator[Nodes]:
    """A head and two workers, of one CPU or of the parameter's, that reach the S3 server through the bridge."""
    with cluster_nodes() as cluster, faulty_server(s3_server, ["passed"], cluster.host) as server:
        cluster.s3 = server
        cluster.environment |= {**S3_SETTINGS, "AWS_ENDPOINT_URL": server.address}
        cluster.add(num_cpus=0)
        for _ in range(2):
            cluster.add(num_cpus=getattr(request, "param", 1))
        cluster.wait(3)
        yield cluster


def on_head(nodes: Nodes) -> dict[str, Any]:
    """How a job is started on the head."""
    return {"environment": nodes.environment, "inside": nodes.inside(nodes.nodes[0])}


def uploaded(photos: Path, place: str) -> str:
    for path in photos.iterdir():
        write_bytes(join(place, path.name), path.read_bytes())
    return place


def shard_with_a_loss(nodes: Nodes, photos: Path, s3: str) -> str:
    """Shard across both workers, one of which dies in the middle."""
    source, output = uploaded(photos, join(s3, "photos")), join(s3, "set")
    job = ShardJob(photos, output, nodes.ray_address, num_actors=2, source=source, **on_head(nodes)).start()
    wait_until(job, lambda: num_records(output) >= 3)
    nodes.kill(nodes.nodes[1])
    assert num_records(output) < NUM_SHARDS, "killed too late"
    code, printed = wait(job)
    assert code == 0, printed
    return output


@pytest.mark.slow
def test_a_worker_node_dies_while_sharding(photos: Path, whole: str, s3: str, nodes: Nodes) -> None:
    require_undisturbed(shard_with_a_loss(nodes, photos, s3), whole)


class Job:
    """`ccsr COMMAND` on the head, with its config and log in `folder`."""

    def __init__(self, nodes: Nodes, command: str, config: Config, folder: Path) -> None:
        values = config.model_dump(mode="json")
        values["runtime"]["ray"]["address"] = nodes.ray_address
        file, self._log = folder / f"{command}.yaml", folder / f"{command}.log"
        file.write_text(yaml.safe_dump(values))
        self.process = start_inside(nodes, [CCSR, command, "-c", str(file)], self._log)

    @classmethod
    def of(cls, *arguments: Any) -> Callable[[], tuple[int, str]]:
        """A function that runs the job to its end; its exit code and what it printed."""

        def run() -> tuple[int, str]:
            job = cls(*arguments)
            return job.process.wait(timeout=PATIENCE_SECONDS), job.printed

        return run

    def wait_until(self, reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.2)

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def end(self, expected: int = 0) -> str:
        """What it printed, once it has ended with that exit code."""
        code = self.process.wait(timeout=PATIENCE_SECONDS)
        assert code == expected, self.printed
        return self.printed


def start_inside(nodes: Nodes, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command on the head."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [*nodes.inside(nodes.nodes[0]), *command],
            env={**os.environ, **nodes.environment, "CC": "/bin/false", "COLUMNS": "200"},
            stdout=file,
            stderr=file,
        )


@contextmanager
def mlflow_server(nodes: Nodes, folder: Path) -> Iterator[str]:
    """An MLflow server on the head, as the manifests start it."""
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts"]
    network = ["--host", "0.0.0.0", "--port", "5000", "--workers", "1"]
    program = [sys.executable, "-m", "mlflow", "server", *store, *network]
    server = start_inside(nodes, program, folder / "server.log")
    address = f"http://{nodes.nodes[0].address}:5000"
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def updates_saved(output: str) -> int:
    places = complete_checkpoints(output)
    return int(places[-1].rpartition("/")[2]) // 4 if places else 0


def logged_losses(tracking: str) -> list[tuple[int, float]]:
    """(update, loss) of the server's newest run."""
    client = MlflowClient(tracking)
    logged, *_ = client.search_runs([client.get_experiment_by_name("ccsr").experiment_id])
    return [(point.step // 4, point.value) for point in client.get_metric_history(logged.info.run_id, "loss/loss")]


def require_equal(
    run: str, losses: list[tuple[int, float]], data: str, folder: Path, num_updates: int, rel: float = 0, **changes: Any
) -> None:
    """Losses, to `rel`, and where that is 0 the last checkpoint's tensors are those of a run that nobody disturbed."""
    alone = train_config(data, folder / "alone", num_updates=num_updates, **changes)
    if not (folder / "losses").exists():
        run_workers(folder, [{"config": alone.model_dump(mode="json"), "losses": str(folder / "losses")}])
    expected = [float(line) for line in (folder / "losses").read_text().split()]
    assert {update for update, _ in losses} == set(range(1, num_updates + 1))
    assert all(loss == pytest.approx(expected[update - 1], rel, 0) for update, loss in losses), (losses, expected)
    if rel:
        return
    found, wanted = (load_checkpoint(complete_checkpoints(place)[-1]).tensors for place in (run, alone.output))
    assert all(found[file][name].equal(wanted[file][name]) for file in wanted for name in wanted[file])


def evaluate_config(data: str, model: str, output: str, tracking: str) -> EvaluateConfig:
    sampling = {"num_steps": 6}
    values = {
        "job": "evaluate",
        "output": output,
        "data": [data],
        "num_runs": 2,
        "methods": [{"kind": "bicubic"}, {"kind": "model", "name": "ours", "model": model, "sampling": sampling}],
        "tracking": {"uri": tracking},
        "runtime": {"num_actors": 2},
    }
    return parse_config(values, EvaluateConfig, where="test")


@pytest.mark.slow
def test_shard_train_and_evaluate_each_lose_a_node(
    photos: Path, whole: str, s3: str, nodes: Nodes, tmp_path: Path
) -> None:
    """Every stage reads what the one before wrote to S3; what it is compared with was made on one machine, from local
    files, with nobody disturbing."""
    data, run, result = shard_with_a_loss(nodes, photos, s3), join(s3, "run"), join(s3, "result")
    require_undisturbed(data, whole)
    nodes.add(num_cpus=1)

    with mlflow_server(nodes, tmp_path) as tracking:
        # A drained node is no failure: the restarts are for the other two.
        runtime = {"num_workers": 2, "checkpoint_every": 2, "max_restarts": 2, "collective_timeout_seconds": 60}
        nodes.wait(3)
        changes = {"runtime": runtime, "tracking": {"uri": tracking}}
        job = Job(nodes, "train", train_config(data, run, num_updates=NUM_UPDATES, **changes), tmp_path)
        # Of two workers on nodes of one CPU.
        for disturb, moment in ((nodes.drain, 2), (nodes.kill, 8), (nodes.cut, 14)):
            job.wait_until(lambda: updates_saved(run) >= moment)  # noqa: B023
            disturb(nodes.nodes[-1])
            nodes.add(num_cpus=1)
        printed = job.end()
        assert printed.count("from the last checkpoint") == 3
        assert printed.count("node is being drained") == 1
        losses = logged_losses(tracking)

        tested = noise_shards(join(s3, "test"), 12, 64)
        job = Job(nodes, "evaluate", evaluate_config(tested, join(run, "model"), result, tracking), tmp_path)
        job.wait_until(lambda: num_records(result) >= 3)
        nodes.kill(nodes.nodes[-1])
        nodes.add(num_cpus=1)
        assert num_records(result) < 2 * 12, "killed too late"
        job.end()

    require_equal(run, losses, whole, tmp_path, NUM_UPDATES)

    model = str(download_folder(join(run, "model"), tmp_path / "model"))
    local = noise_shards(tmp_path / "test", 12, 64)
    undisturbed = run_evaluate(
        evaluate_config(local, model, str(tmp_path / "result"), f"sqlite:///{tmp_path}/alone.db")
    )
    for name in ("results.parquet", "images.parquet"):
        here, there = (pq.read_table(BytesIO(read_bytes(join(p, name)))) for p in (undisturbed.folder, result))
        assert here.num_rows > 0
        assert here.equals(there), name


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_a_run_shrinks_and_grows_with_the_cluster(whole: str, s3: str, nodes: Nodes, tmp_path: Path) -> None:
    """Four workers on two nodes of two CPUs; a node dies; another one comes; then the run is asked to stop."""
    run = join(s3, "run")
    data = noise_shards(join(s3, "data"), 12, 64)
    with mlflow_server(nodes, tmp_path) as tracking:
        runtime = {"num_workers": {"min": 2, "max": 4}, "checkpoint_every": 2, "max_restarts": 1}
        changes = {"runtime": runtime | {"micro_batch_size": 1, "collective_timeout_seconds": 60}}
        config = train_config(data, run, num_updates=100_000, tracking={"uri": tracking}, **changes)
        job = Job(nodes, "train", config, tmp_path)
        job.wait_until(lambda: updates_saved(run) >= 4)
        nodes.kill(nodes.nodes[-1])
        job.wait_until(lambda: "; 2 workers instead of 4" in job.printed)
        shrunk = updates_saved(run)
        job.wait_until(lambda: updates_saved(run) >= shrunk + 4)
        nodes.add(num_cpus=2)
        job.wait_until(lambda: "; 4 workers instead of 2" in job.printed)
        grown = updates_saved(run)
        job.wait_until(lambda: updates_saved(run) >= grown + 4)
        psutil.Process(job.process.pid).children()[0].terminate()
        printed = job.end(143)
        assert printed.count("from the last checkpoint") == 2
        assert "4 workers have become possible; the run was asked to stop and saved" in printed
        losses = logged_losses(tracking)
    # Two ranks sum four gradients in another order than four: the last bit of a loss.
    alone = {"rel": 1e-6, "runtime": {"micro_batch_size": 1, "checkpoint_every": 1000}}
    require_equal(run, losses, noise_shards(tmp_path / "data", 12, 64), tmp_path, updates_saved(run), **alone)
