"""Shard sets as runs of MLflow, and `ccsr runs`: what a person compares in the terminal."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from evaluation.runs import runs_table
from infra import ClusterError, DataError
from infra.mlflow.server import TrackingConfig
from infra.mlflow.tracking import track
from infra.run import claim_output
from infra.shards.manifest import Manifest
from pipelines.sets.verify import verify
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.reports.card import write_card
from pipelines.sharding.reports.mlflow_shard_set import log_shard_set
from tests.unit.photos import make_shard_set, save_photos, shard_config

RUN = {"job": "shard", "fingerprint": "1" * 64, "config": {}}


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardConfig, Manifest]:
    """Two photographs and a file that is none."""
    place = tmp_path_factory.mktemp("shards")
    save_photos(place / "photos", [(64, 64)] * 2)
    (place / "photos" / "bad.png").write_bytes(b"no picture")
    config = shard_config(place / "photos", place / "set", degradation="bicubic")
    claim_output(config.output, config, job="shard", inputs={}, libraries=())
    manifest = make_shard_set(config)
    write_card(manifest)
    return config, manifest


def test_a_shard_set_is_a_run_with_its_counts_card_and_sheet(
    shard_set: tuple[ShardConfig, Manifest], store: TrackingConfig
) -> None:
    config, manifest = shard_set
    config = config.model_copy(update={"tracking": store.model_copy(update={"experiment": "shards"})})
    log_shard_set(config, manifest, RUN, 12.5)
    log_shard_set(config, manifest, RUN, None)  # the same command again
    client = MlflowClient(store.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("shards").experiment_id])
    (reason,) = {one["reason"] for one in manifest.facts["quarantined"]}
    counts = {"samples": 2, "quarantined": 1, f"quarantined/{reason}": 1}
    assert run.data.metrics == counts | {"speed/samples_per_second": 12.5}
    assert run.data.tags["ccsr.dataset_id"] == run.inputs.dataset_inputs[0].dataset.digest == manifest.dataset_id
    assert run.data.params["degradation"] == "bicubic"
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
        "DATA_CARD.md",
        "contact_sheet.jpg",
        "run.json",
    }
    assert verify(manifest.uri).dataset_id == manifest.dataset_id, "mlflow.json belongs to the set"


def test_a_server_that_is_away_loses_no_shard_set(
    shard_set: tuple[ShardConfig, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = shard_set[0].model_copy(update={"tracking": TrackingConfig(uri="http://127.0.0.1:9")})
    with pytest.raises(ClusterError, match="the shard set is complete, but MLflow did not take it") as caught:
        log_shard_set(config, shard_set[1], RUN, None)
    assert "run the same command again" in caught.value.todo


def test_runs_are_listed_by_their_stability(store: TrackingConfig, tmp_path: Path) -> None:
    tracking = store.model_copy(update={"experiment": "listed"})
    train = RUN | {"job": "train"}
    with track(tracking, train, output=str(tmp_path / "a")) as run:
        run.metrics({"validation/psnr_y": 20.0, "validation/l_std": 0.2}, 8)
        run.tag(**{"ccsr.model": "s3://bucket/a/model"})
    with track(tracking, train, output=str(tmp_path / "b")) as run:
        run.metrics({"validation/psnr_y": 25.0, "validation/l_std": 0.1}, 8)
    with track(tracking, RUN | {"job": "evaluate"}, output=str(tmp_path / "bob's")) as run:
        run.child("ccsr", {"ccsr.job": "method"}, {}).metrics({"l_std": 0.15, "lpips.g_std": 0.01})

    def names(sort: str | None = None) -> list[str]:
        return [row["run"] for row in runs_table(store, "listed", sort).records()]

    assert set(names()) == {"a", "b", "bob's", "bob's/ccsr"}
    assert names("l_std") == ["b", "bob's/ccsr", "a"]
    assert names("psnr_y") == ["b", "a"]
    assert names("lpips.g_std") == ["bob's/ccsr"]
    row = runs_table(store, "listed", "l_std").records()[2]
    assert (row["l_std"], row["psnr_y"], row["model"], row["status"]) == (0.2, 20.0, "s3://bucket/a/model", "FINISHED")
    with pytest.raises(DataError, match="no run has the metric 'lstd'"):
        names("lstd")
    with pytest.raises(DataError, match="no experiment 'lsited'"):
        runs_table(store, "lsited")
    with pytest.raises(DataError, match="no MLflow database"):
        runs_table(TrackingConfig(uri=f"sqlite:///{tmp_path}/none/mlflow.db"))
    assert not (tmp_path / "none").exists()
