"""MLflow's own server in another process, on sqlite and Postgres, with and without passwords, killed and full."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow.tracking import MlflowClient

from infra import ClusterError
from infra.imaging.images import encode_png
from infra.mlflow.models import find_model
from infra.mlflow.server import check_tracking
from infra.mlflow.tracking import Tracker, track
from infra.process.background import BackgroundTracker
from tests.fault.shard_jobs import tmpfs
from tests.integration.conftest import CCSR, REPOSITORY, run_ccsr
from tests.mlflow_process import PASSWORD, USER, Server, postgres
from tests.training_runs import finished_run, noise_shards, train_config
from training.config import TrainConfig
from training.run.driver import run_train
from training.run.monitoring.mlflow_training import keep_unsent

pytestmark = pytest.mark.slow
RUN = {"job": "train", "fingerprint": "1", "config": {"stage": 1}}
STORES = ["sqlite", "sqlite with passwords", "postgres with passwords"]


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Of a client that gives up at once and knows the password."""
    with pytest.MonkeyPatch.context() as patch:
        values = {"MAX_RETRIES": "0", "TIMEOUT": "60"}
        for name, value in values.items():
            patch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
        patch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        yield patch


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, environment: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Server]]:
    """A server by its name in STORES, started on first use."""
    with ExitStack() as ends:

        @cache
        def started(name: str) -> Server:
            folder = tmp_path_factory.mktemp("server")
            on_postgres = name.startswith("postgres")
            database = ends.enter_context(postgres()) if on_postgres else f"sqlite:///{folder}/mlflow.db"
            server = Server(folder, database, passwords="passwords" in name)
            server.start()
            ends.callback(server.kill)
            return server

        yield started


@pytest.fixture
def plain(servers: Callable[[str], Server]) -> Server:
    return servers("sqlite")


def client(config: TrainConfig) -> MlflowClient:
    return MlflowClient(config.tracking.uri)


def run_id(config: TrainConfig) -> str:
    return json.loads(Path(config.output, "mlflow.json").read_text())["run_id"]


@pytest.mark.parametrize("store", STORES)
def test_runs_pictures_tables_and_models_reach_every_kind_of_server(
    store: str, servers: Callable[[str], Server], tmp_path: Path
) -> None:
    finished = finished_run(tmp_path, servers(store).uri)
    run_train(finished)
    experiment = client(finished).get_experiment_by_name(finished.tracking.experiment).experiment_id
    by_stability = [{"field_name": "metrics.validation/l_std", "ascending": True}]
    models = client(finished).search_logged_models([experiment], order_by=by_stability)
    assert [model.tags["ccsr.model"].rsplit("/", 1)[1] for model in models] == ["best", "model", "000000000004"]
    best = f"{finished.output}/best"
    assert [find_model(f"models:/sr@{name}", finished.tracking) for name in ("champion", "newest")] == [best] * 2
    with track(finished.tracking, RUN) as tracker:
        sender = BackgroundTracker(tracker)
        sender.metrics({f"term {number}": number for number in range(1202)}, step=8)
        sender.image("validation/a/lr", encode_png(np.zeros((8, 8, 3), np.uint8)), 8)
        assert sender.close() == 0
        tracker.table("scores.json", ["method", "l_std"], [["a", 1.0]])
        child = tracker.child("ccsr", {"ccsr.job": "method"}, {"sampling": {"num_steps": 45}})
        child.metrics({"l_std": 0.1})
    assert len(client(finished).get_run(tracker.run_id).data.metrics) == 1202
    assert {item.path for item in client(finished).list_artifacts(tracker.run_id)} == {
        "images",
        "run.json",
        "scores.json",
    }
    assert client(finished).get_run(child.run_id).data.params == {"sampling.num_steps": "45"}
    assert tracker.without_images(["validation/a/lr", "validation/a/hr"]) == ["validation/a/hr"]


@pytest.mark.parametrize("store", [name for name in STORES if "passwords" in name])
def test_a_wrong_password_is_three_lines_at_the_start_and_loses_nothing_later(
    store: str, servers: Callable[[str], Server], tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    finished = finished_run(tmp_path, servers(store).uri)
    with environment.context() as patch:
        patch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        with pytest.raises(ClusterError, match="MLflow refused the request") as caught:
            check_tracking(finished.tracking)
        assert "MLFLOW_TRACKING_PASSWORD" in caught.value.todo
        sender = BackgroundTracker(Tracker.connect(finished.tracking.uri, run_id(finished)))
        send(sender, 16)
        assert sender.close(3, keep=partial(keep_unsent, finished.output)) == 2
        with pytest.raises(ClusterError, match="MLflow refused the request"):
            run_train(finished, log_only=True)
    run_train(finished, log_only=True)
    require_sent(finished, 16)


def test_what_a_killed_server_did_not_take_it_takes_later(plain: Server, tmp_path: Path) -> None:
    server, finished = plain, finished_run(tmp_path, plain.uri)
    sender = BackgroundTracker(Tracker.connect(server.uri, run_id(finished)), seconds_between_tries=0.5)
    server.kill()
    try:
        send(sender, 16)
        while not sender.note:
            time.sleep(0.1)
    finally:
        server.start()
    assert sender.close(60) == 0
    server.kill()
    try:
        sender = BackgroundTracker(Tracker.connect(server.uri, run_id(finished)))
        send(sender, 20)
        assert sender.close(2, keep=partial(keep_unsent, finished.output)) == 2
    finally:
        server.start()
    run_train(finished, log_only=True)
    require_sent(finished, 16, 20)


def test_pictures_wait_while_the_artifact_store_is_full(plain: Server, tmp_path: Path) -> None:
    server, finished = plain, finished_run(tmp_path, plain.uri)
    experiment = client(finished).get_run(run_id(finished)).info.experiment_id
    folder = server.artifacts / experiment / run_id(finished) / "artifacts" / "images"
    folder.parent.mkdir(parents=True, exist_ok=True)
    sender = BackgroundTracker(Tracker.connect(server.uri, run_id(finished)))
    try:
        with tmpfs(folder, "4k"):
            (folder / "full").write_bytes(bytes(4096))
            send(sender, 16)
            assert sender.close(3, keep=partial(keep_unsent, finished.output)) == 1, "the points got through"
    except PermissionError as error:
        pytest.skip(f"mounting a small file system takes root: {error}")
    run_train(finished, log_only=True)
    require_sent(finished, 16)


def send(sender: BackgroundTracker, step: int) -> None:
    """A point and a picture."""
    sender.metrics({"loss/loss": 1.0 / step}, step)
    sender.image("validation/a/lr", encode_png(np.zeros((8, 8, 3), np.uint8)), step)


def require_sent(config: TrainConfig, *steps: int) -> None:
    points = client(config).get_metric_history(run_id(config), "loss/loss")
    assert {point.step: point.value for point in points} == {step: 1.0 / step for step in steps}
    names = [item.path for item in client(config).list_artifacts(run_id(config), "images")]
    assert sorted(name.split("+")[2] for name in names if name.endswith(".png")) == [str(step) for step in steps]
    assert client(config).get_run(run_id(config)).info.status == "FINISHED"
    assert not list(Path(config.output).glob("mlflow.unsent*"))


def test_training_outlives_its_server_and_log_only_sends_the_rest(
    tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    """`ccsr train` as a user runs it: a wrong password, then a server that is killed after the first point."""
    server = Server(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", passwords=True)
    data, file = noise_shards(tmp_path / "set", 8), tmp_path / "train.yaml"
    changes = {
        "tracking": {"uri": server.uri, "register": "sr"},
        "validation": {"data": [data], "every": 20, "num_images": 1, "sampling": {"num_steps": 6}},
        "runtime": {"checkpoint_every": 20},
    }
    config = train_config(data, tmp_path / "run", num_updates=40, **changes)
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    command = ["train", "-c", str(file)]
    away = run_ccsr(*command)
    assert away.returncode == 6
    assert "MLflow does not answer" in away.stderr
    server.start()
    try:
        wrong = run_ccsr(*command, MLFLOW_TRACKING_PASSWORD="wrong")
        assert wrong.returncode == 6
        assert len(wrong.stderr.strip().splitlines()) == 3, wrong.stderr
        assert "MLFLOW_TRACKING_PASSWORD" in wrong.stderr
        settings = {**os.environ, "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2", "COLUMNS": "200"}
        with (tmp_path / "log").open("w") as log:
            training = subprocess.Popen([CCSR, *command], cwd=REPOSITORY, env=settings, stdout=log, stderr=log)
        try:
            wait_for_a_point(config, training)
            server.kill()
            code = training.wait(900)
        finally:
            training.kill()
        printed = (tmp_path / "log").read_text()
        assert code == 0, printed
        assert "MLflow does not take points; they wait" in printed
        assert "--log-only" in printed
        assert list(Path(config.output).glob("mlflow.unsent*"))
        assert (Path(config.output) / "model" / "ccsr.json").exists()
    finally:
        server.kill()
        server.start()
    try:
        sent = run_ccsr(*command, "--log-only")
        assert sent.returncode == 0, sent.stderr
        logged = client(config).get_run(run_id(config))
        assert logged.info.status == "FINISHED"
        assert logged.data.tags["ccsr.model"] == f"{config.output}/model"
        points = client(config).get_metric_history(run_id(config), "loss/loss")
        assert sorted(point.step for point in points) == [4 * update for update in range(1, 41)]
        images = [item.path for item in client(config).list_artifacts(run_id(config), "images")]
        assert {name.split("+")[2] for name in images} == {"80", "160"}
        assert find_model("models:/sr@newest", config.tracking).startswith(config.output)
        names = {name.rpartition("/")[2] for name in logged.data.metrics if name.startswith("system/")}
        assert {"cpu_utilization_percentage", "network_receive_megabytes", "peak_memory_gib"} <= names
    finally:
        server.kill()


def wait_for_a_point(config: TrainConfig, training: "subprocess.Popen[bytes]") -> None:
    place = Path(config.output) / "mlflow.json"
    while not place.exists() or not client(config).get_metric_history(run_id(config), "loss/loss"):
        assert training.poll() is None
        time.sleep(0.5)
