"""MLflow beside training: datasets, parents, and a server that is slow, dead, or comes back."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.background import BackgroundTracker
from infra.tracking import Tracker, TrackingConfig, open_tracker


def run(fingerprint: str) -> dict[str, Any]:
    return {"job": "train", "fingerprint": fingerprint, "config": {"stage": 1}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


def test_datasets_parent_points_and_files_reach_mlflow(store: TrackingConfig) -> None:
    from mlflow.tracking import MlflowClient

    first = open_tracker(store, run("a" * 64))
    second = open_tracker(store.model_copy(update={"experiment": "other"}), run("b" * 64))
    second.parent("a" * 64)
    second.parent("c" * 64)  # unknown: no tag, no error
    second.dataset("train", "0123456789abcdef", "s3://bucket/train", "training")
    background = BackgroundTracker(second)
    for step in range(1, 1203):  # more than one request may hold
        background.metrics({"loss": 1 / step}, step=step)
    background.file("validation/000000000008/a.png", b"picture")
    assert background.close() == 0
    client = MlflowClient(store.uri)
    logged = client.get_run(second.run_id)
    assert logged.data.tags["mlflow.parentRunId"] == first.run_id
    (read,) = logged.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("train", "0123456789abcdef")
    assert json.loads(read.dataset.source) == {"uri": "s3://bucket/train"}
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "training")]
    history = client.get_metric_history(second.run_id, "loss")
    assert [point.step for point in history] == list(range(1, 1203))
    picture = Path(client.download_artifacts(second.run_id, "validation/000000000008/a.png"))
    assert picture.read_bytes() == b"picture"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, and an MLflow client that gives up at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server(port: int, received: list[int], hold: threading.Event) -> ThreadingHTTPServer:
    """Takes log-batch requests, each only once `hold` is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hold.wait(20)
            received.extend(int(metric["step"]) for metric in body["metrics"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


def test_a_dead_server_is_told_and_tried_again_until_it_is_back(port: int) -> None:
    tracker = BackgroundTracker(Tracker.connect(f"http://127.0.0.1:{port}", "run"), seconds_between_tries=0.2)
    tracker.metrics({"loss": 1.0}, step=1)
    deadline = time.monotonic() + 60
    while not tracker.note and time.monotonic() < deadline:
        time.sleep(0.05)
    tracker.metrics({"loss": 1.0}, step=2)
    assert tracker.note == ", MLflow away: 2 points wait"
    received: list[int] = []
    hold = threading.Event()
    hold.set()
    back = server(port, received, hold)
    try:
        while tracker.note and time.monotonic() < deadline:
            time.sleep(0.05)
        assert received == [1, 2]
        tracker.metrics({"loss": 1.0}, step=3)
        assert tracker.close() == 0
        assert received == [1, 2, 3]
    finally:
        back.shutdown()
        back.server_close()


def test_what_a_server_never_took_is_counted(port: int, caplog: pytest.LogCaptureFixture) -> None:
    tracker = BackgroundTracker(Tracker.connect(f"http://127.0.0.1:{port}", "run"))
    tracker.metrics({"loss": 1.0, "l_T": 2.0}, step=1)
    tracker.file("a.png", b"")
    assert tracker.close() == 3
    assert "never took 3" in caplog.text
    Tracker.connect(f"http://127.0.0.1:{port}", "run").end("FINISHED")  # a warning, no error


def test_a_server_that_does_not_answer_holds_up_nobody(port: int) -> None:
    received: list[int] = []
    hold = threading.Event()
    slow = server(port, received, hold)
    try:
        tracker = BackgroundTracker(Tracker.connect(f"http://127.0.0.1:{port}", "run"))
        for step in range(5):
            tracker.metrics({"loss": 1.0}, step=step)
        assert received == []  # all five calls are back, the server has answered none
        hold.set()
        assert tracker.close() == 0
        assert received == [0, 1, 2, 3, 4]
    finally:
        slow.shutdown()
        slow.server_close()
