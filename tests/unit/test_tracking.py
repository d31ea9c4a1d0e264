"""MLflow beside the jobs: how a run begins and ends, and a server that is slow, dead, refuses, or comes back."""

import errno
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra import ClusterError, ConfigError, DataError
from infra.config import parse_config
from infra.errors import StoppedError
from infra.imaging.images import encode_png
from infra.mlflow.models import find_model
from infra.mlflow.server import TrackingConfig, check_tracking, refused_for_good
from infra.mlflow.tracking import Tracker, track
from infra.process import background
from infra.process.background import BackgroundTracker


def run(fingerprint: str, **config: Any) -> dict[str, Any]:
    return {"job": "train", "fingerprint": fingerprint, "config": {"stage": 1, **config}}


def client(store: TrackingConfig) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(store.uri)


def test_datasets_points_and_files_reach_mlflow(store: TrackingConfig) -> None:
    with track(store.model_copy(update={"experiment": "other"}), run("b" * 64)) as second:
        second.dataset("train", "0123456789abcdef", "s3://bucket/train", "training")
        sender = BackgroundTracker(second)
        sender.metrics({f"term {number}": number for number in range(1202)}, step=8)  # more than fit in a request
        sender.file("validation/000000000008/a.png", b"picture")
        assert sender.close() == 0
    logged = client(store).get_run(second.run_id)
    (read,) = logged.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("train", "0123456789abcdef")
    assert json.loads(read.dataset.source) == {"uri": "s3://bucket/train"}
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "training")]
    assert logged.data.metrics == {f"term {number}": number for number in range(1202)}
    assert client(store).get_metric_history(second.run_id, "term 7")[0].step == 8
    picture = Path(client(store).download_artifacts(second.run_id, "validation/000000000008/a.png"))
    assert picture.read_bytes() == b"picture"


def test_one_output_has_one_run_whatever_its_fingerprint(store: TrackingConfig, tmp_path: Path) -> None:
    config, mlflow = store.model_copy(update={"experiment": "one output"}), client(store)

    def job(output: Path, fingerprint: str = "6" * 64) -> str:
        with track(config, run(fingerprint), output=str(output)) as tracker:
            tracker.metrics({"loss/loss": 1.0})
        return tracker.run_id

    one, two = tmp_path / "one", tmp_path / "two"
    first = job(one)
    assert job(one) == job(one, "5" * 64) == first, "a resume, under another version's fingerprint too"
    mlflow.rename_experiment(mlflow.get_experiment_by_name("one output").experiment_id, "renamed")
    assert job(one) == first
    assert mlflow.get_experiment_by_name("one output") is None
    assert job(two) != first, "the same config into another output"
    shutil.copytree(one, tmp_path / "copy")
    assert job(tmp_path / "copy") != first
    client(store).delete_run(first)
    again = job(one)
    assert again != first, "a deleted run is not continued"
    shutil.rmtree(one)
    assert job(one) != again, "a new output in an old place"
    info = client(store).get_run(job(tmp_path / "stage1")).info
    assert info.run_name == "stage1"
    assert client(store).get_run(job(two)).info.run_name == "two-stage1"


def test_a_failed_run_says_why_until_it_is_resumed(store: TrackingConfig, tmp_path: Path) -> None:
    error = DataError("the shard is damaged", where="s3://bucket/set", todo="run ccsr verify")
    with suppress(DataError), track(store, run("4" * 64), output=str(tmp_path)) as tracker:
        tracker.note("Stage 1", "Output")
        raise error
    tags = client(store).get_run(tracker.run_id).data.tags
    assert tags["ccsr.error"] == str(error)
    assert tags["mlflow.note.content"].startswith("Stage 1\n\nOutput\n\n**FAILED**")
    assert str(error) in tags["mlflow.note.content"]
    assert tags["mlflow.source.name"] == "ccsr train"
    assert tags["mlflow.user"]
    with track(store, run("4" * 64), output=str(tmp_path)) as tracker:
        tracker.note("Stage 1")
    tags = client(store).get_run(tracker.run_id).data.tags
    assert "ccsr.error" not in tags
    assert tags["mlflow.note.content"] == "Stage 1"


def test_pictures_have_steps_and_keys_that_mlflow_takes(store: TrackingConfig) -> None:
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    keys = ["validation/a.b-1", "Zürich", "x" * 200]
    with track(store, run("3" * 64)) as tracker:
        sender = BackgroundTracker(tracker)
        for step in (8, 16):
            for key in keys:
                sender.image(key, png, step)
        assert sender.close() == 0
        tracker.table("scores.json", ["method", "l_std"], [["a", 1.0]])
        tracker.table("scores.json", ["method", "l_std"], [["a", 2.0], ["b", None]])
    names = [item.path for item in client(store).list_artifacts(tracker.run_id, "images") if item.path.endswith("png")]
    stems = {tuple(name.removeprefix("images/").split("+")[:3]) for name in names}
    assert len(stems) == len(names) == 6
    assert {stem[0][:20] for stem in stems} == {"validation~a.b-1", "Z-rich-4251685e", "x" * 20}
    assert {stem[2] for stem in stems} == {"8", "16"}
    local = client(store).download_artifacts(tracker.run_id, "scores.json")
    assert json.loads(Path(local).read_text())["data"] == [["a", 2.0], ["b", None]]


def test_two_jobs_that_start_in_a_new_experiment_both_begin(
    store: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    real, both = MlflowClient.get_experiment_by_name, threading.Barrier(2)

    def seen_by_both_before_either_makes_it(self: Any, name: str) -> Any:
        found = real(self, name)
        if found is None:
            both.wait(60)
        return found

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", seen_by_both_before_either_makes_it)
    statuses: list[str] = []

    def job(fingerprint: str) -> None:
        with track(store.model_copy(update={"experiment": "new"}), run(fingerprint)) as tracker:
            pass
        statuses.append(client(store).get_run(tracker.run_id).info.status)

    jobs = [threading.Thread(target=job, args=(letter * 64,)) for letter in "12"]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join(60)
    assert statuses == ["FINISHED"] * 2


def test_a_deleted_experiment_is_named_with_its_way_back(store: TrackingConfig) -> None:
    config = store.model_copy(update={"experiment": "gone"})
    with track(config, run("d" * 64)):
        pass
    number = client(store).get_experiment_by_name("gone").experiment_id
    client(store).delete_experiment(number)
    with (
        pytest.raises(ClusterError, match=r"'gone' is deleted \(RESOURCE_ALREADY_EXISTS") as caught,
        track(config, run("e")),
    ):
        pass
    assert f"mlflow experiments restore --experiment-id {number}" in caught.value.todo
    assert "tracking.experiment" in caught.value.todo


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError(), "FAILED"),
        (DataError("bad", where="here", todo="look"), "FAILED"),
        (StoppedError("asked", where="here", todo="again"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
)
def test_a_run_ends_as_its_block_does(store: TrackingConfig, error: BaseException | None, status: str) -> None:
    seen = []
    with suppress(BaseException), track(store, run("f" * 64)) as tracker:
        seen.append(client(store).get_run(tracker.run_id).info)
        if error is not None:
            raise error
    assert seen[0].status == "RUNNING"
    assert client(store).get_run(seen[0].run_id).info.status == status


def test_a_run_that_mlflow_refuses_to_describe_is_failed_and_in_its_words(store: TrackingConfig) -> None:
    refused = run("9" * 64, **{"what?": 1})
    words = r"MLflow refused the request \(INVALID_PARAMETER_VALUE: .*what\?"
    with pytest.raises(ClusterError, match=words), track(store, refused):
        pass
    experiment = client(store).get_experiment_by_name("ccsr").experiment_id
    (found,) = client(store).search_runs([experiment], f"tags.`ccsr.fingerprint` = '{'9' * 64}'")
    assert found.info.status == "FAILED"
    with pytest.raises(ClusterError, match=r"MLflow refused the request .*RESOURCE_DOES_NOT_EXIST"):
        find_model(f"runs:/{'0' * 32}", store)


def test_sigterm_ends_a_commands_run(store: TrackingConfig) -> None:
    program = (
        "import os, signal, time\n"
        "from infra.mlflow.server import TrackingConfig\n"
        "from infra.mlflow.tracking import track\n"
        "from pipelines.cli import main as cli\n"
        "@cli.app.command()\n"
        "def wait(uri: str):\n"
        "    with track(TrackingConfig(uri=uri), {'job': 'compare', 'fingerprint': '5' * 64, 'config': {}}):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "wait", str(store.uri)], capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert "stopped; the same command" in done.stderr
    experiment = client(store).get_experiment_by_name("ccsr").experiment_id
    (found,) = client(store).search_runs([experiment], f"tags.`ccsr.fingerprint` = '{'5' * 64}'")
    assert found.info.status == "KILLED"


def test_all_parameters_are_logged_and_a_cut_one_is_said(
    store: TrackingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = run("8" * 64, **{f"field{number}": number for number in range(250)}, long="x" * 7000, medium="y" * 600)
    with track(store, described, output=str(tmp_path)) as tracker:
        pass
    assert "6000 characters of a parameter, long is cut there" in capsys.readouterr().err
    logged = client(store).get_run(tracker.run_id).data.params
    assert logged == {
        "stage": "1",
        **{f"field{number}": str(number) for number in range(250)},
        "long": "x" * 6000,
        "medium": "y" * 600,
    }
    described["config"]["field0"] = 1
    with track(store, described, output=str(tmp_path)) as tracker:  # a resume adds what has changed
        assert capsys.readouterr().err == ""
    resumed = client(store).get_run(tracker.run_id).data
    assert resumed.params == logged
    assert resumed.tags["ccsr.changed"] == "field0: 0 -> 1"


def test_what_mlflow_refuses_is_dropped_and_holds_up_nothing(
    store: TrackingConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "SECONDS_BETWEEN_LAST_TRIES", 0.05)
    with track(store, run("7" * 64)) as tracker:
        sender = BackgroundTracker(tracker, seconds_between_tries=0.01)
        for step in range(40):
            sender.metrics({"loss": 1.0, **({"what?": 1.0} if step == 13 else {})}, step=step)
        sender.file("x" * 300 + "/a.png", b"")  # the server answers 500, as if it were out of order
        for number in range(8):
            sender.file(f"{number}.png", b"")
        assert sender.close(600) == 2
        assert {item.path for item in client(store).list_artifacts(tracker.run_id)} == {
            "run.json",
            *(f"{number}.png" for number in range(8)),
        }
    history = client(store).get_metric_history(tracker.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(40))
    warned = sorted(record.message for record in caplog.records if ", it is " in record.message)
    assert len(warned) == 2
    assert "'what?' of the points, it is dropped" in warned[0]
    assert "/a.png' of the files, it is set aside" in warned[1]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, and an MLflow client that gives up at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server(port: int, received: list[int], hold: threading.Event, answers: Iterator[int]) -> ThreadingHTTPServer:
    """Takes log-batch requests, each only once `hold` is set; answers with these HTTP statuses."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hold.wait(20)
            status = next(answers)
            if status == 200:
                received.extend(int(metric["step"]) for metric in body["metrics"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
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
    back = server(port, received, hold, repeat(200))
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


@pytest.mark.parametrize("status", [503, 404])
def test_closing_tries_until_the_server_is_back(port: int, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "SECONDS_BETWEEN_LAST_TRIES", 0.05)
    received: list[int] = []
    hold = threading.Event()
    starting = server(port, received, hold, chain([status] * 3, repeat(200)))
    try:
        tracker = BackgroundTracker(Tracker.connect(f"http://127.0.0.1:{port}", "run"))
        tracker.metrics({"loss": 1.0}, step=1)
        hold.set()
        assert tracker.close() == 0
        assert received == [1]
    finally:
        starting.shutdown()
        starting.server_close()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_for_good_is_told_from_a_passing_one(status: int) -> None:
    from requests import HTTPError, Response

    answer = Response()
    answer.status_code = status
    assert refused_for_good(HTTPError(response=answer))
    answer.status_code = 503
    assert not refused_for_good(HTTPError(response=answer))
    assert refused_for_good(OSError(errno.ENAMETOOLONG, "File name too long"))
    assert not refused_for_good(OSError(errno.ENOSPC, "No space left on device"))
    assert not refused_for_good(ConnectionError())


def test_what_a_server_never_took_is_counted(port: int, caplog: pytest.LogCaptureFixture) -> None:
    tracker = BackgroundTracker(Tracker.connect(f"http://127.0.0.1:{port}", "run"))
    tracker.metrics({"loss": 1.0, "l_T": 2.0}, step=1)
    tracker.file("a.png", b"")
    assert tracker.close(1) == 3
    assert "never took 3" in caplog.text
    Tracker.connect(f"http://127.0.0.1:{port}", "run").end("FINISHED", seconds=0)  # a warning, no error


def test_a_server_that_does_not_answer_holds_up_nobody(port: int) -> None:
    received: list[int] = []
    hold = threading.Event()
    slow = server(port, received, hold, repeat(200))
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


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("localhost:5000", "http://localhost:5000"),
        ("mlflow.example.org", "http://mlflow.example.org"),
        ("10.0.0.7:5000/mlflow", "http://10.0.0.7:5000/mlflow"),
        ("runs.db", "sqlite:///runs.db"),
    ],
)
def test_an_address_without_scheme_is_refused_with_the_likely_one(
    uri: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=meant):
        parse_config({"uri": uri}, TrackingConfig, where="train.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=meant):
        check_tracking(TrackingConfig())


@pytest.mark.parametrize("status", [404, 200])
def test_a_server_that_is_no_mlflow_is_quoted_and_a_path_prefix_advised(port: int, status: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>\n<h1>Nothing under this path</h1></html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
    try:
        with pytest.raises(ClusterError, match=r"MLflow refused the request .*Nothing under this path") as caught:
            check_tracking(TrackingConfig(uri=f"http://127.0.0.1:{port}"))
    finally:
        proxy.shutdown()
        proxy.server_close()
    assert "http://HOST/mlflow" in caught.value.todo
    with pytest.raises(ClusterError, match="MLflow does not answer"):
        check_tracking(TrackingConfig(uri=f"http://127.0.0.1:{port}"))


def test_a_deleted_experiment_an_unreadable_database_and_a_wrong_setting_are_reported_when_asked(
    store: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = store.model_copy(update={"experiment": "removed"})
    check_tracking(config)
    assert client(store).get_experiment_by_name("removed") is None, "asking makes nothing"
    client(store).delete_experiment(client(store).create_experiment("removed"))
    with pytest.raises(ClusterError, match="'removed' is deleted"):
        check_tracking(config)
    (tmp_path / "photo.png").write_bytes(b"no database" * 100)
    with pytest.raises(ClusterError, match="not a database"):
        check_tracking(TrackingConfig(uri=f"sqlite:///{tmp_path}/photo.png"))
    with pytest.raises(ValueError, match="a location here is one of"):
        TrackingConfig(uri="htp://there")
    check_tracking(TrackingConfig(uri=f"sqlite:///{tmp_path}/new.db"))
    assert not (tmp_path / "new.db").exists()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="soon") as caught:
        check_tracking(store)
    assert caught.value.where == "MLFLOW_HTTP_REQUEST_TIMEOUT"
