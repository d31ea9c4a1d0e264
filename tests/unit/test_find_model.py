"""What `init_from` and an evaluation's `model` may name."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evaluation.config import ModelMethod
from infra import ClusterError, ConfigError, ModelError
from infra.files.locations import model_location
from infra.files.publish import write_bytes
from infra.files.storage import join
from infra.imaging.images import encode_png
from infra.mlflow.models import MODEL_TAG, find_model
from infra.mlflow.server import TrackingConfig
from infra.mlflow.tracking import track
from pipelines.cli.main import app
from pipelines.restore import RestoreConfig, restore
from training.config import ModelConfig, SamplingConfig
from training.models import build_model, save_model


def test_a_model_directory_a_runs_folder_and_nothing(s3: str, tmp_path: Path) -> None:
    tracking = TrackingConfig()
    for run in (s3, str(tmp_path / "run")):
        model = join(run, "model")
        with pytest.raises(ModelError, match="no complete model directory") as caught:
            find_model(run, tracking)
        assert f"{run}, {model}" in caught.value.where, "both places are named"
        write_bytes(join(model, "ccsr.json"), b"{}")
        assert find_model(model, tracking) == model
        assert find_model(run, tracking) == model
    assert find_model(None, tracking) is None


def test_a_hub_id_is_a_directory_below_the_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking, weights = TrackingConfig(), tmp_path / "weights"
    monkeypatch.setenv("CCSR_WEIGHTS", str(weights))
    monkeypatch.chdir(tmp_path)
    assert model_location("user/name") == "user/name"
    assert ModelMethod(kind="model", name="x", model="user/name").model == "user/name"
    write_bytes(str(weights / "user/name/model_index.json"), b"{}")
    with pytest.raises(ModelError, match="diffusers pipeline of another program"):
        find_model("user/name", tracking)
    write_bytes(str(weights / "user/name/ccsr.json"), b"{}")
    assert find_model("user/name", tracking) == f"{weights}/user/name"
    write_bytes(str(tmp_path / "user/name/model/ccsr.json"), b"{}")
    assert find_model("user/name", tracking) == f"{tmp_path}/user/name/model", "what the path names comes first"
    assert model_location("user/name") == f"{tmp_path}/user/name"
    for command in (["restore", "in", "out", "--model", "user/other"], ["export", "user/other", "out"]):
        done = CliRunner().invoke(app, command)
        places = [tmp_path / "user/other", tmp_path / "user/other/model", weights / "user/other"]
        assert str(done.exception) == "\n  ".join(
            (
                "there is no complete model directory here",
                f"where: no ccsr.json in {', '.join(map(str, places))}",
                "to do: give a model directory, the folder of a finished run, runs:/ID, models:/NAME@ALIAS, or a hub "
                "id whose files are below the weights folder (CCSR_WEIGHTS)",
            )
        )


def test_the_weights_folder_may_be_on_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", f"{s3}/weights")
    write_bytes(f"{s3}/weights/user/name/ccsr.json", b"{}")
    assert find_model("user/name", TrackingConfig()) == f"{s3}/weights/user/name"


def test_a_run_of_mlflow_by_its_id(tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    with track(tracking, {"fingerprint": "f" * 64, "job": "train", "config": {"stage": 1}}) as tracker:
        with pytest.raises(ConfigError, match="this run has written no model"):
            find_model(f"runs:/{tracker.run_id}", tracking)
        tracker.tag(**{MODEL_TAG: "s3://bucket/run/model"})
    assert find_model(f"runs:/{tracker.run_id}", tracking) == "s3://bucket/run/model"
    with pytest.raises(ClusterError, match="MLflow refused the request"):
        find_model(f"runs:/{'0' * 32}", tracking)


def test_restore_takes_what_a_config_takes_as_init_from(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    save_model(build_model(ModelConfig(), seed=0), tmp_path / "run" / "model")
    with track(TrackingConfig(), {"fingerprint": "e" * 64, "job": "train", "config": {"stage": 1}}) as tracker:
        tracker.tag(**{MODEL_TAG: str(tmp_path / "run" / "model")})
    (tmp_path / "in").mkdir()
    write_bytes(str(tmp_path / "in" / "a.png"), encode_png(np.zeros((16, 16, 3), np.uint8)))
    for number, name in enumerate((tmp_path / "run" / "model", tmp_path / "run", f"runs:/{tracker.run_id}")):
        config = RestoreConfig(sampling=SamplingConfig(num_steps=1), scale=1)
        assert restore(str(tmp_path / "in"), str(tmp_path / f"out{number}"), str(name), config) == 1
    runs = {(tmp_path / f"out{number}" / "run.json").read_bytes() for number in range(3)}
    assert len(runs) == 1
