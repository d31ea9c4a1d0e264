"""Every kind of Ray worker computes under the config's numerics: what a real one of each reports of itself."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluation.job
import pipelines.restore
import pipelines.sharding.job
import training.run.driver
from evaluation.config import EvaluateConfig
from infra import ModelError
from infra.imaging.images import encode_png
from pipelines.restore import RestoreConfig
from pipelines.sharding.config import ShardConfig
from tests.training_runs import noise_shards, train_config
from training.config import ModelConfig
from training.models import build_model, save_model

pytestmark = pytest.mark.usefixtures("ray_session")
NUMERICS = {"tf32": False, "deterministic": True}  # torch's defaults: TF32 convolutions, not deterministic


def reporter(folder: Path) -> Callable[[], None]:
    """A function, by value in whatever process, that writes that process's settings below `folder`."""

    def report() -> None:
        import torch

        backends = torch.backends
        found = {
            "process": os.getpid(),
            "tf32": [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32],
            "benchmark": backends.cudnn.benchmark,
            "deterministic": [backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()],
            "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }
        (folder / f"settings-{os.urandom(4).hex()}.json").write_text(json.dumps(found))

    return report


def assert_all_reported(folder: Path) -> None:
    reports = [json.loads(path.read_text()) for path in folder.glob("settings-*.json")]
    assert reports
    for report in reports:
        assert report.pop("process") != os.getpid()
        expected = {"tf32": [False, False], "benchmark": False, "deterministic": [True, True], "workspace": ":4096:8"}
        assert report == expected


def photo(folder: Path, size: int = 32) -> str:
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    (folder / "a.png").write_bytes(encode_png(picture))
    return str(folder)


@pytest.mark.slow
def test_training_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, worker = reporter(tmp_path), training.run.driver.train_worker

    def reporting(settings: dict[str, Any]) -> None:
        import training.run.worker

        training.run.worker.train = lambda *_: report()
        worker(settings)

    monkeypatch.setattr(training.run.driver, "train_worker", reporting)
    config = train_config(noise_shards(tmp_path / "set", 4), tmp_path / "run", num_updates=1, numerics=NUMERICS)
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    with pytest.raises(ModelError, match="checkpoint after 1 updates is gone"):  # nothing was trained
        training.run.driver.run_train(config.model_copy(update={"tracking": tracking}))
    assert_all_reported(tmp_path)


@pytest.mark.slow
def test_latents_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, writer = reporter(tmp_path), pipelines.sharding.job.shard_writer

    def reporting(*arguments: Any) -> Any:
        report()
        return writer(*arguments)

    monkeypatch.setattr(pipelines.sharding.job, "shard_writer", reporting)
    save_model(build_model(ModelConfig(), 0), tmp_path / "model")
    values = {
        "job": "shard",
        "output": str(tmp_path / "out"),
        "sources": [{"kind": "folder", "name": "f", "path": photo(tmp_path / "in")}],
        "crop": {"kind": "center", "size_px": 32},
        "degradation": "bicubic",
        "latents": {"model": str(tmp_path / "model")},  # deterministic by default
    }
    assert pipelines.sharding.job.run_shard(ShardConfig.model_validate(values)).num_samples == 1
    assert_all_reported(tmp_path)


def test_evaluation_actor_and_its_task_of_whole_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, scorer = reporter(tmp_path), evaluation.job.Scorer

    def reporting(*arguments: Any) -> Any:
        report()
        return scorer(*arguments)

    def fid(*arguments: Any, **settings: Any) -> float:
        report()
        return 1.0

    monkeypatch.setattr(evaluation.job, "Scorer", reporting)
    monkeypatch.setattr(evaluation.job, "fid", fid)
    monkeypatch.setattr(evaluation.job, "metric_origins", lambda metrics: {"fid": "here"})
    monkeypatch.setattr(evaluation.job, "log_result", lambda *_: None)
    for name, size in (("hr", 64), ("lr", 16)):
        photo(tmp_path / name, size)
        (tmp_path / name / "b.png").write_bytes((tmp_path / name / "a.png").read_bytes())
    values = {
        "job": "evaluate",
        "output": str(tmp_path / "out"),
        "data": [{"hr": str(tmp_path / "hr"), "lr": str(tmp_path / "lr")}],
        "methods": [{"kind": "bicubic"}],
        "metrics": ["psnr_y", "fid"],
        "numerics": NUMERICS,
    }
    result = evaluation.job.run_evaluate(EvaluateConfig.model_validate(values))
    assert result.summary["bicubic"]["metrics"]["fid"]["mean"] == 1
    assert len(list(tmp_path.glob("settings-*.json"))) == 2
    assert_all_reported(tmp_path)


@pytest.mark.slow
def test_restoring_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, restorer = reporter(tmp_path), pipelines.restore.Restorer

    def reporting(*arguments: Any) -> Any:
        report()
        return restorer(*arguments)

    monkeypatch.setattr(pipelines.restore, "Restorer", reporting)
    save_model(build_model(ModelConfig(), 0), tmp_path / "model")
    settings = {"scale": 2, "sampling": {"num_steps": 3}, "numerics": NUMERICS, "runtime": {"use_ray": True}}
    config = RestoreConfig.model_validate(settings)
    assert pipelines.restore.restore(photo(tmp_path / "in"), str(tmp_path / "o"), str(tmp_path / "model"), config) == 1
    assert_all_reported(tmp_path)
