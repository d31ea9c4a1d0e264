"""A run on two real workers is seen while it runs: validation, rates, datasets and a profile, in MLflow and on disk."""

from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from infra.config import parse_config
from infra.imaging.images import decode_image
from infra.shards.manifest import Manifest
from tests.unit.photos import make_shard_set, save_photos, shard_config
from training.config import TrainConfig
from training.models import load_model
from training.run.agreement import WorkerContext
from training.run.checkpoint import complete_checkpoints, load_checkpoint
from training.run.driver import run_train
from training.run.monitoring.validation import Validation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("watched")
    for name, size in (("train", 96), ("held_out", 64)):
        save_photos(place / name, [(size, size)] * 5)
        make_shard_set(shard_config(place / name, place / "shards" / name, degradation="ccsr", samples_per_shard=5))
    values = {
        "job": "train",
        "init_from": "random",
        "output": str(place / "out"),
        "stage": 1,
        "data": [str(place / "shards" / "train")],
        "crop_px": 64,
        "global_batch_size": 8,
        "num_updates": 7,
        "optimizer": {"learning_rate": 1e-3},
        "validation": {"data": [str(place / "shards" / "held_out")], "every": 4, "num_images": 3}
        | {"sampling": {"num_steps": 6}},
        "tracking": {"uri": f"sqlite:///{place}/mlflow.db"},
        "runtime": {"num_workers": 2, "micro_batch_size": 2, "checkpoint_every": 2, "keep_checkpoints": 9},
    }
    return parse_config(values, TrainConfig, where="test")


@pytest.fixture(scope="module")
def run(config: TrainConfig, ray_session: None) -> Run:
    watched = config.model_copy(update={"runtime": config.runtime.model_copy(update={"profile": True})})
    run_train(watched)
    client = MlflowClient(config.tracking.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("ccsr").experiment_id])
    assert found.info.status == "FINISHED"
    return found


def history(config: TrainConfig, run: Run, name: str) -> dict[int, float]:
    return {
        point.step: point.value for point in MlflowClient(config.tracking.uri).get_metric_history(run.info.run_id, name)
    }


def test_validation_on_two_ranks_is_that_of_one_process(config: TrainConfig, run: Run) -> None:
    model = load_model(Path(config.output) / "model")
    scores = Validation.load(config)(model, WorkerContext(0, 1, "cpu", {}), 56)
    for name, score in scores.items():
        points = history(config, run, f"validation/{name}")
        assert list(points) == [32, 56]  # updates 4 and 7 of 8 samples
        assert points[56] == pytest.approx(score, rel=1e-6)
        assert points[32] != points[56]
    facts = [load_checkpoint(place).facts for place in complete_checkpoints(config.output)]
    assert [fact["num_updates"] for fact in facts] == [2, 4, 6, 7]
    assert ["validation" in fact for fact in facts] == [False, True, False, True]
    assert facts[-1]["validation"] == pytest.approx(scores)


def test_pictures_stand_beside_the_numbers(config: TrainConfig, run: Run) -> None:
    client = MlflowClient(config.tracking.uri)
    keys = [entry.key for _, entry in Validation.load(config).images]
    assert run.data.tags["mlflow.loggedImages"] == "True"
    places = [item.path for item in client.list_artifacts(run.info.run_id, "images") if item.path.endswith(".png")]
    logged = [place.split("/")[1].split("+")[:3] for place in places]
    names = [f"validation~{key}~{name}" for key in keys for name in ("lr", "run_0", "run_1", "hr", "l_std")]
    assert sorted(logged) == sorted([name, "step", str(step)] for name in names for step in (32, 56))
    picture = Path(client.download_artifacts(run.info.run_id, places[0]))
    assert decode_image(picture.read_bytes(), where="picture").shape == (64, 64, 3)


def test_rates_memory_and_no_invented_utilisation(config: TrainConfig, run: Run) -> None:
    metrics = run.data.metrics
    assert {"loss/loss", "loss/l_diff", "optimizer/gradient_norm", "optimizer/learning_rate"} <= metrics.keys()
    for name in ("speed/samples_per_second", "speed/tflops_per_second_per_worker", "system/peak_memory_gib"):
        assert list(history(config, run, name)) == [8, 16, 24, 32, 40, 48, 56]
        assert metrics[name] > 0
    assert 0 <= metrics["speed/data_wait_share"] < 1
    assert list(history(config, run, "speed/validation_seconds")) == [40]  # the time between the points at 32 and 40
    assert not {"speed/mfu", "speed/hfu"} & metrics.keys()


def test_datasets_and_profile(config: TrainConfig, run: Run) -> None:
    inputs = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
    manifests = {"training": Manifest.load(config.data[0].path), "validation": Manifest.load(config.validation.data[0])}
    assert {name: dataset.digest for name, dataset in inputs.items()} == {
        name: manifest.dataset_id for name, manifest in manifests.items()
    }
    table = (Path(config.output) / "profile" / "top_ops.txt").read_text()
    assert "conv" in table
    assert (Path(config.output) / "profile" / "trace.json").stat().st_size > 10_000
    (logged,) = MlflowClient(config.tracking.uri).list_artifacts(run.info.run_id, "profile")
    assert logged.path == "profile/top_ops.txt"
