"""A finished run's models in MLflow: found by their stability, registered, named by alias; a server that is away."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra import ClusterError, ConfigError, DataError
from infra.files.publish import write_bytes
from infra.imaging.images import encode_png
from infra.mlflow.models import find_model
from infra.mlflow.server import TrackingConfig
from infra.mlflow.tracking import Tracker, track
from infra.process.background import BackgroundTracker
from tests.training_runs import finished_run, train_config
from training.config import TrainConfig
from training.run.driver import run_train
from training.run.monitoring.mlflow_training import keep_unsent, send_unsent, try_to_log_models
from training.run.monitoring.validation import Validation


@pytest.fixture(params=["server", "database"])
def finished(tmp_path: Path, store: TrackingConfig, database: str, request: pytest.FixtureRequest) -> TrainConfig:
    return finished_run(tmp_path, store.uri if request.param == "server" else database)


def test_the_most_stable_model_is_found_and_the_best_registered_once(finished: TrainConfig) -> None:
    for _ in range(2):
        run_train(finished)
    client = MlflowClient(finished.tracking.uri)
    experiment = client.get_experiment_by_name(finished.tracking.experiment).experiment_id
    (run,) = client.search_runs([experiment])
    assert run.data.tags["ccsr.model"] == f"{finished.output}/model"
    by_stability = [{"field_name": "metrics.validation/l_std", "ascending": True}]
    models = client.search_logged_models([experiment], order_by=by_stability)
    assert [model.tags["ccsr.model"].removeprefix(f"{finished.output}/") for model in models] == [
        "best",
        "model",
        "exports/000000000004",
    ]
    (digest,) = Validation.load(finished).datasets.values()
    on_set = [{"dataset_name": "set", "dataset_digest": digest}]
    low = client.search_logged_models([experiment], "metrics.`validation/l_std` < 0.15", on_set)
    assert [model.model_id for model in low] == [models[0].model_id]
    assert run.data.params["inputs.dataset_ids"] == f"['{digest}']"
    assert {model.source_run_id for model in models} == {run.info.run_id}
    assert (models[0].params["step"], models[0].model_type) == ("8", "v1 stage 1")
    (version,) = client.search_model_versions("name = 'sr'")[:1]
    assert version.run_id == run.info.run_id
    assert json.loads(models[0].tags["mlflow.modelVersions"]) == [{"name": "sr", "version": version.version}]
    tracking = finished.tracking
    best = f"{finished.output}/best"
    assert find_model("models:/sr@champion", tracking) == find_model("models:/sr@newest", tracking) == best
    assert find_model(f"models:/sr/{version.version}", tracking) == best
    assert find_model(f"models:/{models[0].model_id}", tracking) == best
    assert find_model(f"runs:/{run.info.run_id}", tracking) == f"{finished.output}/model"
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["run.json"], "nothing is copied"
    for unknown in ("models:/sr@none", "models:/none@champion", "models:/m-0"):
        with pytest.raises(ClusterError, match="MLflow refused the request"):
            find_model(unknown, tracking)
    write_bytes(f"{best}/ccsr.json", b"another")
    with pytest.raises(ConfigError, match="another model is now in the directory"):
        find_model("models:/sr@champion", tracking)


def test_what_mlflow_does_not_take_at_the_end_is_a_warning_and_sent_later(
    finished: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = finished.tracking.model_copy(update={"register": "sr@v1"})  # an alias that MLflow keeps for itself
    with track(tracking, {"job": "train", "fingerprint": "1", "config": {}}, output=finished.output) as tracker:
        try_to_log_models(tracker, finished.model_copy(update={"tracking": tracking}))
    assert MlflowClient(tracking.uri).get_run(tracker.run_id).info.status == "FINISHED"
    assert "Version alias name 'v1' is reserved" in (warning := capsys.readouterr().err)
    assert "--log-only" in warning
    away = finished.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    with pytest.raises(ClusterError, match="MLflow does not answer"):
        run_train(finished.model_copy(update={"tracking": away}), log_only=True)
    unregistered = finished.tracking.model_copy(update={"register": None})
    run_train(finished.model_copy(update={"tracking": unregistered}), log_only=True)
    record = json.loads(Path(finished.output, "mlflow.json").read_text())
    assert record["run_id"] == tracker.run_id
    longer = finished.model_copy(update={"num_updates": 4})
    with pytest.raises(DataError, match="this run is not finished"):
        run_train(longer, log_only=True)


def test_what_a_server_never_took_is_sent_later(finished: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    for step in (16, 20):  # two starts
        sender = BackgroundTracker(Tracker.connect("http://127.0.0.1:9", "run"))
        sender.metrics({"loss/loss": 1.0 / step, "validation/l_std": 0.05}, step)
        sender.image("validation/a/lr", png, step)
        sender.file("profile/top_ops.txt", b"conv")
        assert sender.close(0.1, keep=partial(keep_unsent, finished.output)) == 4
    run_train(finished, log_only=True)
    client = MlflowClient(finished.tracking.uri)
    run_id = json.loads(Path(finished.output, "mlflow.json").read_text())["run_id"]
    points = client.get_metric_history(run_id, "loss/loss")
    assert {point.step: point.value for point in points} == {16: 1 / 16, 20: 1 / 20}
    pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    assert sorted(name.split("+")[:3] for name in pictures) == [
        ["images/validation~a~lr", "step", step] for step in ("16", "20")
    ]
    assert [item.path for item in client.list_artifacts(run_id, "profile")] == ["profile/top_ops.txt"]
    assert not list(Path(finished.output).glob("mlflow.unsent*"))


def test_points_of_a_run_whose_experiment_was_deleted_are_sent_once_it_is_restored(
    finished: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient(finished.tracking.uri)
    number = client.get_experiment_by_name(finished.tracking.experiment).experiment_id
    (run,) = client.search_runs([number])
    client.delete_experiment(number)
    sender = BackgroundTracker(Tracker.connect(finished.tracking.uri, run.info.run_id))
    sender.metrics({"loss/loss": 0.5}, 16)
    assert sender.close(1, keep=partial(keep_unsent, finished.output)) == 1
    try_to_log_models(Tracker.connect(finished.tracking.uri, run.info.run_id), finished)
    assert "--log-only" in capsys.readouterr().err
    with pytest.raises(ClusterError, match="is deleted") as caught:
        run_train(finished, log_only=True)
    assert f"mlflow experiments restore --experiment-id {number}" in caught.value.todo
    client.restore_experiment(number)
    client.rename_experiment(number, f"{finished.tracking.experiment} renamed")
    run_train(finished, log_only=True)
    assert client.get_run(run.info.run_id).data.metrics["loss/loss"] == 0.5
    assert len(client.search_logged_models([number])) == 3


def test_what_is_refused_again_stays_for_the_next_time(store: TrackingConfig, tmp_path: Path) -> None:
    bad, good = "x" * 300 + "/a.png", "b.png"
    keep_unsent(str(tmp_path), [["loss/loss", 1.0, 1, 4]], [[bad, b"bad"], [good, b"good"]])
    with track(store, {"job": "train", "fingerprint": "1", "config": {}}) as tracker:
        send_unsent(tracker, str(tmp_path), seconds=5)
    client = MlflowClient(store.uri)
    assert client.get_run(tracker.run_id).data.metrics == {"loss/loss": 1.0}
    assert {item.path for item in client.list_artifacts(tracker.run_id)} == {"run.json", good}
    kept = json.loads((tmp_path / "mlflow.unsent.json").read_text())
    ((name, digest),) = kept["files"]
    assert (kept["points"], name) == ([], bad)
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "mlflow.unsent").iterdir()] == [(digest, b"bad")]


def test_a_model_that_was_logged_in_part_is_completed(finished: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "metrics", refuse)
        with pytest.raises(ClusterError, match="away"):
            run_train(finished)
    run_train(finished)
    client = MlflowClient(finished.tracking.uri)
    experiment = client.get_experiment_by_name(finished.tracking.experiment).experiment_id
    models = client.search_logged_models([experiment])
    assert len(models) == 3
    assert all(model.status == "READY" and len(model.metrics) == 2 for model in models)


def refuse(*_: object, **__: object) -> None:
    raise MlflowException("away")


@pytest.mark.parametrize("name", ["a/b", "a:b", "sr@", "@champion", "sr@a b", ""])
def test_a_registry_name_that_mlflow_would_refuse_is_refused_by_the_config(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.register"):
        train_config("set", tmp_path, num_updates=1, tracking={"register": name})
