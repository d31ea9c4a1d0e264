"""A finished run's models in MLflow: found by their stability, registered, named by alias; a server that is away."""

import json
from functools import partial
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from infra import ClusterError, ConfigError, DataError
from infra.mlflow_models import find_model
from infra.mlflow_server import TrackingConfig
from infra.process.background import BackgroundTracker
from infra.publish import write_bytes
from infra.tracking import Tracker, track
from tests.training_runs import noise_shards, train_config
from training.config import TrainConfig
from training.run.checkpoint import TrainingState, save_checkpoint
from training.run.driver import run_train
from training.run.mlflow_log import keep_unsent, try_to_log_models
from training.run.validation import Validation

SCORES = {1: (20.0, 0.3), 2: (25.0, 0.1), 3: (24.0, 0.2)}  # update -> PSNR-Y, L-STD


@pytest.fixture(params=["server", "database"])
def finished(tmp_path: Path, store: TrackingConfig, request: pytest.FixtureRequest) -> TrainConfig:
    """A run of 3 updates of 4 samples whose second one was the best, exported on its way too."""
    uri = store.uri if request.param == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    tracking = {"uri": uri, "experiment": tmp_path.name, "register": "sr@champion"}
    data = noise_shards(tmp_path / "set", 4)
    validation = {"data": [data]}
    config = train_config(data, tmp_path / "run", num_updates=3, tracking=tracking, validation=validation)
    for update, (psnr, _) in SCORES.items():
        facts = {"position": 4 * update, "num_updates": update, "validation": {"psnr_y": psnr}}
        save_checkpoint(config.output, TrainingState(facts, {"weights": {}}), keep=9)
    for name in ("exports/000000000004", "best", "model"):
        write_bytes(f"{config.output}/{name}/ccsr.json", name.encode())
    write_bytes(f"{config.output}/trained.json", b'{"num_updates": 3, "position": 12}')
    with track(config.tracking, {"job": "train", "fingerprint": "1", "config": {}}, output=config.output) as tracker:
        for update, (psnr, std) in SCORES.items():
            tracker.metrics({"validation/psnr_y": psnr, "validation/l_std": std}, 4 * update)
    return config


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


def test_points_that_a_server_never_took_are_sent_later(finished: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for step in (16, 20):  # two starts
        sender = BackgroundTracker(Tracker.connect("http://127.0.0.1:9", "run"))
        sender.metrics({"loss/loss": 1.0 / step, "validation/l_std": 0.05}, step)
        assert sender.close(0.1, keep=partial(keep_unsent, finished.output)) == 2
    run_train(finished, log_only=True)
    client = MlflowClient(finished.tracking.uri)
    run_id = json.loads(Path(finished.output, "mlflow.json").read_text())["run_id"]
    points = client.get_metric_history(run_id, "loss/loss")
    assert {point.step: point.value for point in points} == {16: 1 / 16, 20: 1 / 20}
    assert not Path(finished.output, "mlflow.unsent.json").exists()


@pytest.mark.parametrize("name", ["a/b", "a:b", "sr@", "@champion", "sr@a b", ""])
def test_a_registry_name_that_mlflow_would_refuse_is_refused_by_the_config(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.register"):
        train_config("set", tmp_path, num_updates=1, tracking={"register": name})
