"""What `init_from` and an evaluation's `model` may name."""

from pathlib import Path

import numpy as np
import pytest

from infra import ClusterError, ConfigError
from infra.images import encode_png
from infra.mlflow_models import MODEL_TAG, find_model
from infra.mlflow_server import TrackingConfig
from infra.publish import write_bytes
from infra.storage import join
from infra.tracking import track
from pipelines.restore import RestoreConfig, restore
from training.config import ModelConfig, SamplingConfig
from training.models import build_model, save_model


def test_a_model_directory_a_runs_folder_and_nothing(s3: str, tmp_path: Path) -> None:
    tracking = TrackingConfig()
    for run in (s3, str(tmp_path / "run")):
        model = join(run, "model")
        assert find_model(run, tracking) == run, "without a model there the place itself is told of"
        write_bytes(join(model, "ccsr.json"), b"{}")
        assert find_model(model, tracking) == model
        assert find_model(run, tracking) == model
    assert find_model(None, tracking) is None


def test_a_run_of_mlflow_by_its_id(tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    with track(tracking, {"fingerprint": "f" * 64, "job": "train", "config": {"stage": 1}}) as tracker:
        with pytest.raises(ConfigError, match="this run has written no model"):
            find_model(f"runs:/{tracker.run_id}", tracking)
        tracker.tag(**{MODEL_TAG: "s3://bucket/run/model"})
    assert find_model(f"runs:/{tracker.run_id}", tracking) == "s3://bucket/run/model"
    with pytest.raises(ClusterError, match="MLflow refused the request"):
        find_model(f"runs:/{'0' * 32}", tracking)


def test_restore_takes_what_a_config_takes_as_init_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
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
