"""What `init_from` and an evaluation's `model` may name."""

from pathlib import Path

import pytest

from infra import ClusterError, ConfigError
from infra.mlflow_server import TrackingConfig
from infra.publish import write_bytes
from infra.storage import join
from infra.tracking import MODEL_TAG, find_model, track


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
        with pytest.raises(ConfigError, match="this run trained no model"):
            find_model(f"runs:/{tracker.run_id}", tracking)
        tracker.tag(**{MODEL_TAG: "s3://bucket/run/model"})
    assert find_model(f"runs:/{tracker.run_id}", tracking) == "s3://bucket/run/model"
    with pytest.raises(ClusterError, match="MLflow refused the request"):
        find_model(f"runs:/{'0' * 32}", tracking)
