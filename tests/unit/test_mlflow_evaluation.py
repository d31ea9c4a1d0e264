"""An evaluation's runs in MLflow: described with links, and completed where a first try was cut off."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from evaluation.compare import compare
from evaluation.config import EvaluateConfig
from evaluation.mlflow_results import log_comparison, log_result
from evaluation.results import load_result
from infra.config import parse_config
from infra.mlflow.server import TrackingConfig
from infra.mlflow.tracking import Tracker, track
from tests.unit.result_folder import noisy, photographs, write_result


def evaluation(folder: Path, store: TrackingConfig) -> EvaluateConfig:
    """Three pictures, one method with a run and one with two, on a shard set that has its own run."""
    tracking = {"uri": store.uri, "experiment": folder.name}
    data = folder / "set"
    data.mkdir()
    shards = TrackingConfig.model_validate(tracking)
    with track(shards, {"job": "shard", "fingerprint": "1", "config": {}}, output=str(data)):
        pass
    output = folder / "result"
    output.mkdir()
    methods = [{"kind": "bicubic", "name": "plain"}, {"kind": "bicubic", "name": "random"}]
    values = {"job": "evaluate", "output": str(output), "data": [str(data)], "methods": methods, "tracking": tracking}
    write_result(output, photographs(), {"plain": (1, noisy(0)), "random": (2, noisy(8))})
    return parse_config(values, EvaluateConfig, where="test")


def test_a_result_that_was_logged_in_part_is_completed_and_described(
    store: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, logged = evaluation(tmp_path, store), []
    result, real = load_result(config.output), Tracker.image

    def cut_off(self: Tracker, key: str, png: bytes, step: int = 0) -> None:
        if len(logged) == 5:
            raise OSError(28, "No space left on device")
        logged.append(key)
        real(self, key, png, step)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "image", cut_off)
        with pytest.raises(OSError, match="No space"):
            log_result(config, result)
    log_result(config, result)
    client = MlflowClient(store.uri)
    number = client.get_experiment_by_name(tmp_path.name).experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([number])}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert set(runs) == {"set", "result", "result/plain", "result/random"}
    method = runs["result/random"]
    places = [item.path for item in client.list_artifacts(method.info.run_id, "images")]
    keys = sorted(place.removeprefix("images/").partition("+")[0] for place in places if place.endswith("png"))
    assert keys == sorted(f"img{i}~{label}" for i in range(3) for label in ("best", "worst", "l_std"))
    parent = runs["result"]
    for tag in ("mlflow.user", "mlflow.source.name", "ccsr.git_commit"):
        assert method.data.tags[tag] == parent.data.tags[tag]

    def page(name: str) -> str:
        return f"(#/experiments/{number}/runs/{runs[name].info.run_id}"

    note = parent.data.tags["mlflow.note.content"]
    assert f"[report.html]{page('result')}/artifacts/report.html)" in note
    assert f"Data: [set]{page('set')}), `{config.data[0]}`" in note
    assert f"[result/random]{page('result/random')})" in note
    assert f"Method random of [result]{page('result')})" in method.data.tags["mlflow.note.content"]
    comparison = compare([f"{config.output}:plain", f"{config.output}:random"])
    compared = client.get_run(log_comparison(comparison, ["plain", "random"], config.tracking))
    note = compared.data.tags["mlflow.note.content"]
    assert f"Evaluations: [result]{page('result')})" in note
    assert f"runs/{compared.info.run_id}/artifacts/comparison.html)" in note
