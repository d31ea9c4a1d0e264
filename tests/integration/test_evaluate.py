"""The evaluation job on other methods' outputs, folders and the paper's tables; what it logs; what changes nothing."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from evaluation.compare import compare
from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from evaluation.mlflow_log import log_comparison
from evaluation.results import load_result
from infra.config import apply_overrides, load_yaml, parse_config
from infra.errors import ClusterError, ConfigError, DataError
from infra.images import encode_png
from infra.mlflow_server import TrackingConfig
from tests.integration.conftest import REPOSITORY
from training.config import ModelConfig
from training.models import build_model, save_model

pytestmark = pytest.mark.usefixtures("ray_session")
KEYS = ("astro", "bird", "cat")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pair folders of three pictures of unlike sizes, an LR folder, and two untrained models."""
    place = tmp_path_factory.mktemp("evaluate")
    for name in ("hr", "lr"):
        (place / name).mkdir()
    for number, key in enumerate(KEYS):
        rng = np.random.default_rng(number)
        hr = cv2.resize(rng.uniform(0, 255, (9, 12, 3)), (96 + 32 * number, 64), interpolation=cv2.INTER_CUBIC)
        hr = np.clip(hr, 0, 255).astype(np.uint8)
        (place / "hr" / f"{key}.png").write_bytes(encode_png(hr))
        lr = cv2.resize(hr, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        (place / "lr" / f"{key}.png").write_bytes(encode_png(lr))
    for family, seed in (("v1", 0), ("v2", 1)):
        save_model(build_model(ModelConfig(family=family), seed), place / "training" / family)
    return place


def config(place: Path, output: str, **changes) -> EvaluateConfig:
    values = {
        "job": "evaluate",
        "output": f"{place}/{output}",
        "data": [{"hr": f"{place}/hr", "lr": f"{place}/lr"}],
        "num_runs": 3,
        "metrics": ["psnr_y", "ssim_y", "lpips", "fid"],
        "methods": [
            {"kind": "bicubic"},
            {"kind": "model", "name": "v2", "model": f"{place}/training/v2", "sampling": {"num_steps": 6}},
        ],
        "tracking": {"uri": f"sqlite:///{place}/mlflow.db", "run_name": output},
    }
    return parse_config(values | changes, EvaluateConfig, where="test")


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCSR_WEIGHTS", str(tmp_path_factory.mktemp("weights")))
        yield


@pytest.fixture(scope="module")
def first(place: Path, ray_session: None, without_weights: None) -> Path:
    """The result of bicubic and of a model that an MLflow run trained."""
    (place / "training" / "run.json").write_text(json.dumps({"fingerprint": "5eed"}))
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    client.create_run(client.create_experiment("training"), tags={"ccsr.fingerprint": "5eed"}, run_name="training")
    return Path(run_evaluate(config(place, "first")).folder)


def by_image(folder: Path, method: str) -> dict[str, dict[str, float]]:
    found = load_result(folder).methods[method]
    return {
        key: {"l_std": found.l_std[i], "sharpness": found.sharpness[i]}
        | {f"{name} {run}": value for name in ("psnr_y", "ssim_y") for run, value in enumerate(found.scores[name][i])}
        for i, key in enumerate(found.keys)
    }


def test_a_metric_without_weights_is_null_and_bicubic_is_exactly_stable(first: Path) -> None:
    result = load_result(first)
    for method in result.summary.values():
        for metric in ("lpips", "fid"):
            assert (method["metrics"][metric]["mean"], method["metrics"][metric]["num_images"]) == (None, 0)
    assert result.run["inputs"]["metrics"] == {"lpips": "unavailable", "fid": "unavailable"}
    bicubic = result.summary["bicubic"]
    assert (bicubic["num_runs"], bicubic["l_std"], bicubic["metrics"]["psnr_y"]["g_std"]) == (1, 0, 0)
    assert result.summary["v2"]["l_std"] > 0
    assert "unavailable" in (first / "report.html").read_text()


def test_outputs_of_another_method_get_the_same_numbers(place: Path, first: Path) -> None:
    shutil.copytree(first / "images" / "v2", place / "theirs" / "runs")
    shutil.rmtree(place / "theirs" / "runs" / "l_std")
    methods = [
        {"kind": "outputs", "name": "v2", "outputs": f"{place}/theirs"},
        {"kind": "outputs", "name": "bicubic", "outputs": f"{first}/images/bicubic/00"},
    ]
    result = run_evaluate(config(place, "second", methods=methods))
    for method in ("bicubic", "v2"):
        assert by_image(Path(result.folder), method) == by_image(first, method)
    assert (result.summary["bicubic"]["num_runs"], result.summary["bicubic"]["l_std"]) == (1, 0)
    changed = place / "theirs" / "runs" / "01" / "bird.png"
    good = changed.read_bytes()
    changed.write_bytes(good[:-40])
    with pytest.raises(DataError, match="the picture data is damaged"):
        run_evaluate(config(place, "third", methods=methods))
    assert not (place / "third").exists()
    changed.write_bytes(good)


def test_other_images_order_and_workers_change_no_number(place: Path, first: Path) -> None:
    """Not a bit; what another batch of runs changes is tests/unit/test_restore.py's."""
    for name in ("hr", "lr"):
        (place / f"other_{name}").mkdir()
        for key, source in (("zebra", "cat"), ("bird", "bird"), ("astro", "astro")):
            shutil.copy(place / name / f"{source}.png", place / f"other_{name}" / f"{key}.png")
    changes = {
        "data": [{"hr": f"{place}/other_hr", "lr": f"{place}/other_lr"}],
        "methods": config(place, "first").model_dump()["methods"][::-1],
        "runtime": {"num_actors": 2},
    }
    result = run_evaluate(config(place, "other", **changes))
    ours, theirs = by_image(first, "v2"), by_image(Path(result.folder), "v2")
    for key in ("astro", "bird"):
        assert theirs[key] == ours[key]
    assert theirs["zebra"]["psnr_y 0"] != pytest.approx(ours["cat"]["psnr_y 0"], rel=1e-5)  # another key, another noise


def test_an_error_in_a_worker_reaches_the_user_and_what_is_done_stays(place: Path, without_weights: None) -> None:
    def with_steps(num_steps: int) -> EvaluateConfig:
        model = {"kind": "model", "name": "v2", "model": f"{place}/training/v2", "sampling": {"num_steps": num_steps}}
        return config(place, f"steps{num_steps}", methods=[{"kind": "bicubic"}, model])

    with pytest.raises(ConfigError, match="2 steps leave no timestep between t_max and t_min"):
        run_evaluate(with_steps(2))
    assert {path.name for path in (place / "steps2" / "records" / "bicubic").iterdir()} >= {"astro.json"}


def test_images_without_hr_have_sharpness_against_bicubic(place: Path, without_weights: None) -> None:
    changes = {"data": [{"lr": f"{place}/lr"}], "metrics": ["psnr_y", "niqe"]}
    result = run_evaluate(config(place, "lr_only", **changes))
    assert result.summary["bicubic"]["sharpness"] == 1
    assert result.summary["v2"]["l_std"] > 0
    assert result.summary["v2"]["metrics"]["psnr_y"]["num_images"] == 0
    assert result.methods["v2"].sizes == [(64, 96), (64, 128), (64, 160)]
    assert "slider" in (place / "lr_only" / "report.html").read_text()


def test_mlflow_knows_model_and_parent_and_a_result_can_be_sent_later(place: Path, first: Path) -> None:
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (training,) = client.search_runs(experiments, "run_name = 'training'")
    (logged,) = client.search_runs(experiments, "run_name = 'first'")
    run = json.loads((first / "run.json").read_text())
    assert logged.data.tags["mlflow.parentRunId"] == logged.data.tags["trained_by.v2"] == training.info.run_id
    assert logged.data.tags["model.v2"] == run["inputs"]["models"]["v2"]
    assert logged.data.tags["dataset_id"] == run["dataset_id"]
    shutil.copytree(first, place / "away")
    away = {"uri": "http://127.0.0.1:9", "run_name": "away"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(ClusterError, match="the result is complete, but MLflow did not take it") as caught:
            run_evaluate(config(place, "away", tracking=away))
    assert "--log-only" in caught.value.todo
    later = {"uri": f"sqlite:///{place}/later.db", "run_name": "later"}
    run_evaluate(config(place, "away", tracking=later, data=["nowhere"]), log_only=True)
    client = MlflowClient(f"sqlite:///{place}/later.db")
    (sent,) = client.search_runs([client.get_experiment_by_name("ccsr").experiment_id])
    assert sent.info.status == "FINISHED"
    assert sent.data.metrics["v2/l_std"] == pytest.approx(load_result(first).summary["v2"]["l_std"], rel=1e-12)
    with pytest.raises(DataError, match="no complete result to log"):
        run_evaluate(config(place, "nothing"), log_only=True)


def test_mlflow_runs_are_compared_by_name_and_id(place: Path, first: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{place}/mlflow.db")
    client = MlflowClient(tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ccsr").experiment_id], "run_name = 'first'")
    by_name = compare(["first:bicubic", f"{run.info.run_id}:v2"], tracking=tracking)
    by_folder = compare([f"{first}:bicubic", f"{first}:v2"])
    assert [(d.metric, d.mean, d.low) for d in by_name.differences] == [
        (d.metric, d.mean, d.low) for d in by_folder.differences
    ]
    assert by_name.baseline == "first:bicubic"
    logged = log_comparison(by_name, ["first:bicubic", "first:v2"], tracking)
    assert {item.path for item in client.list_artifacts(logged)} >= {"differences.csv", "comparison.txt"}
    with pytest.raises(DataError, match="no MLflow runs are called so"):
        compare(["frist", "first"], tracking=tracking)
    with pytest.raises(DataError, match="holds no evaluation result"):
        compare(["training", "first"], tracking=tracking)


@pytest.mark.parametrize(("table", "num_orderings"), [(4, 14), pytest.param(5, 28, marks=pytest.mark.slow)])
def test_the_papers_ablations_run_on_a_tiny_base(
    place: Path, without_weights: None, table: int, num_orderings: int
) -> None:
    path = REPOSITORY / "configs" / "paper" / f"table{table}.yaml"
    values = load_yaml(path)
    overrides = [
        f"output={place}/table{table}",
        f"data=[{{hr: {place}/hr, lr: {place}/lr}}]",
        f"tracking={{uri: 'sqlite:///{place}/mlflow.db'}}",
        "num_runs=2",
        *(f"methods.{i}.model={place}/training/v1" for i in range(len(values["methods"]))),
        *(f"methods.{i}.sampling.num_steps=9" for i in range(len(values["methods"]))),
    ]
    run_evaluate(parse_config(apply_overrides(values, overrides), EvaluateConfig, where=str(path)))
    orderings = json.loads((place / f"table{table}" / "orderings.json").read_text())
    assert len(orderings) == num_orderings
    for ordering in orderings:
        tested = not ordering["metric"].removeprefix("g_std_").startswith(("lpips", "musiq"))
        assert (ordering["verdict"] == "not tested") == (not tested)
        if tested:
            assert ordering["low"] <= ordering["mean"] <= ordering["high"]
    report = (place / f"table{table}" / "report.html").read_text()
    assert f"{num_orderings} orderings of the paper" in report
