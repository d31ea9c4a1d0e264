"""The evaluation job on other methods' outputs, folders and the paper's tables; what it logs; what changes nothing."""

import gc
import json
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import ray
from mlflow.tracking import MlflowClient

from evaluation.compare import compare
from evaluation.config import EvaluateConfig
from evaluation.job import preview_evaluate, run_evaluate
from evaluation.mlflow_results import log_comparison
from evaluation.report.page import report_results
from evaluation.report.tables import table_rows
from evaluation.results import load_result
from infra.config import apply_overrides, load_yaml, parse_config
from infra.errors import ClusterError, ConfigError, DataError
from infra.imaging.images import encode_png, read_image
from infra.imaging.pictures import resized
from infra.mlflow.server import TrackingConfig
from infra.mlflow.tracking import track
from infra.process.ray_runtime import RayConfig, ray_cluster
from tests.integration.conftest import REPOSITORY
from training.config import ModelConfig
from training.models import build_model, save_model

pytestmark = pytest.mark.usefixtures("ray_session")
KEYS = ("astro", "bird", "cat")


@pytest.fixture(scope="module")
def place(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    shutil.copy(migrated, place)
    return place


def config(place: Path, output: str, **changes) -> EvaluateConfig:
    values = {
        "job": "evaluate",
        "output": f"{place}/{output}",
        "data": [{"hr": f"{place}/hr", "lr": f"{place}/lr"}],
        "num_runs": 3,
        "metrics": ["psnr_y", "ssim_y", "lpips", "fid"],
        "perturbations": ["shift", "jpeg"],
        "methods": [
            {"kind": "bicubic"},
            {"kind": "model", "name": "v2", "model": f"{place}/training/v2", "sampling": {"num_steps": 6}},
        ],
        "tracking": {"uri": f"sqlite:///{place}/mlflow.db", "experiment": "study", "run_name": output},
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
    tracking = TrackingConfig(uri=f"sqlite:///{place}/mlflow.db", experiment="training")
    trained = {"job": "train", "fingerprint": "5eed", "config": {}}
    with track(tracking, trained, output=str(place / "training")):
        pass
    return Path(run_evaluate(config(place, "first")).folder)


def by_image(folder: Path, method: str) -> dict[str, dict[str, float]]:
    found = load_result(folder).methods[method]
    return {
        key: {name: getattr(found, name)[i] for name in ("l_std", "l_std_equal_sharpness", "p_std", "sharpness")}
        | {f"p_g_std {name}": found.p_g_std[name][i] for name in ("psnr_y", "ssim_y")}
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


def test_a_result_grows_by_other_methods_outputs_and_computes_nothing_else(
    place: Path, first: Path, without_ray: None
) -> None:
    """The outputs are what the result's own methods wrote, so they get the same numbers, perturbed LR images too."""
    grown = place / "grown"
    shutil.copytree(first, grown)
    shutil.copytree(first / "images" / "v2", place / "theirs" / "runs", ignore=shutil.ignore_patterns("l_std"))
    for name in ("shift", "jpeg"):
        for key in KEYS:
            lr = read_image(str(first / "images" / "lr_perturbed" / name / f"{key}.png"))
            output = place / "bicubic" / "perturbed" / name / f"{key}_OUT.png"
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_bytes(encode_png(resized(lr, (4 * lr.shape[0], 4 * lr.shape[1]))))
            shutil.copy(first / "images" / "bicubic" / "00" / f"{key}.png", place / "bicubic" / f"{key}_OUT.png")
    theirs = {"kind": "outputs", "name": "theirs", "outputs": f"{place}/theirs"}
    bicubics = {"kind": "outputs", "name": "bicubics", "outputs": f"{place}/bicubic", "pattern": "{key}_out"}
    before = {path: path.stat().st_mtime_ns for path in (grown / "images").rglob("*.png")}
    ours = config(place, "grown").model_dump(mode="json")["methods"][::-1]
    more = config(place, "grown", methods=[theirs, *ours, bicubics])
    assert (preview_evaluate(more).done, preview_evaluate(more).total) == (6, 12), "a complete result that grows"
    with pytest.raises(DataError, match="the result lacks the methods theirs, bicubics"):
        run_evaluate(more, log_only=True)
    result = run_evaluate(more)
    assert list(result.methods) == ["theirs", "v2", "bicubic", "bicubics"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for method in ("bicubic", "v2"):
        assert by_image(grown, method) == by_image(first, method)
    assert by_image(grown, "bicubics") == by_image(first, "bicubic")
    without_p = {"p_std", "p_g_std psnr_y", "p_g_std ssim_y"}
    for key, numbers in by_image(grown, "theirs").items():
        assert {name for name, value in numbers.items() if np.isnan(value)} == without_p
        expected = by_image(first, "v2")[key]
        assert {name: expected[name] for name in numbers.keys() - without_p} == pytest.approx(
            {name: numbers[name] for name in numbers.keys() - without_p}, abs=0
        )
    assert (result.summary["bicubics"]["num_runs"], result.summary["bicubics"]["l_std"]) == (1, 0)
    less = config(place, "grown", methods=ours[1:])
    fewer = run_evaluate(less)
    assert list(fewer.methods) == ["bicubic"]
    assert (preview_evaluate(less).done, preview_evaluate(less).total) == (3, 3), "not the removed methods' records"
    with pytest.raises(ConfigError, match=r"the method .theirs. of this output was another one: config\.kind"):
        run_evaluate(config(place, "grown", methods=[{"kind": "bicubic", "name": "theirs"}]))
    merged, target = report_results([str(first), str(grown)], f"{place}/merged.html", TrackingConfig())
    assert list(merged.methods) == ["bicubic", "v2"]
    assert "P-STD" in Path(target).read_text()
    changed = place / "theirs" / "runs" / "01" / "bird.png"
    good = changed.read_bytes()
    changed.write_bytes(good[:-40])
    with pytest.raises(DataError, match="the picture data is damaged"):
        run_evaluate(config(place, "third", methods=[theirs]))
    assert not (place / "third").exists()
    changed.write_bytes(good)


def test_stability_against_the_input_ranks_the_deterministic_too(first: Path) -> None:
    summary = load_result(first).summary
    assert 0 < summary["bicubic"]["p_std"] < summary["v2"]["p_std"]
    for metric in ("psnr_y", "ssim_y"):
        assert (load_result(first).methods["bicubic"].p_g_std[metric] > 0).all()
    label, cells = next(row for row in table_rows(summary) if row[0] == "↓ P-STD")
    assert [cell[0].rank for cell in cells] == [1, 2], label


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

    gc.disable()
    try:
        with pytest.raises(ConfigError, match="2 steps leave no timestep between t_max and t_min"):
            run_evaluate(with_steps(2))
        with ray_cluster(RayConfig()):  # the next job in this process finds all CPUs free
            deadline = time.monotonic() + 30
            while ray.available_resources().get("CPU") != 2:
                assert time.monotonic() < deadline, ray.available_resources()
                time.sleep(0.2)
    finally:
        gc.enable()
    assert {path.name for path in (place / "steps2" / "records" / "bicubic").iterdir()} >= {"astro.json"}


def test_images_without_hr_have_sharpness_against_bicubic(
    place: Path, without_weights: None, without_ray: None
) -> None:
    changes = {"data": [{"lr": f"{place}/lr"}], "metrics": ["psnr_y", "niqe"], "perturbations": []}
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
    run = load_result(first).run
    below = f"tags.`ccsr.evaluation` = '{logged.info.run_id}'"
    methods = {child.data.tags["ccsr.method"]: child for child in client.search_runs(experiments, below)}
    assert set(methods) == {"bicubic", "v2"}
    v2 = methods["v2"].data
    assert v2.tags["ccsr.trained_by"] == training.info.run_id
    assert (v2.tags["ccsr.model"], v2.tags["ccsr.model_id"]) == (
        str(place / "training" / "v2"),
        run["inputs"]["methods"]["v2"],
    )
    for name in ("l_std_equal_sharpness", "p_std", "psnr_y.p_g_std", "psnr_y.g_std"):
        assert v2.metrics[name] > 0
    assert v2.metrics["psnr_y"] == load_result(first).summary["v2"]["metrics"]["psnr_y"]["mean"]
    assert v2.params["sampling.num_steps"] == logged.data.params["methods.1.sampling.num_steps"] == "6"
    assert logged.data.tags["ccsr.dataset_id"] == run["dataset_id"]
    assert "/#/experiments/" in logged.data.tags["mlflow.note.content"].replace("(#", "(/#")
    table = json.loads(Path(client.download_artifacts(logged.info.run_id, "scores.json")).read_text())
    assert [row[0] for row in table["data"]] == ["bicubic", "v2"]
    pictures = [item.path.split("+")[0] for item in client.list_artifacts(methods["v2"].info.run_id, "images")]
    assert set(pictures) == {f"images/{key}~{label}" for key in KEYS for label in ("best", "worst", "l_std")}
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
    sent = client.search_runs([client.get_experiment_by_name("ccsr").experiment_id])
    assert {one.info.status for one in sent} == {"FINISHED"}
    (sent_v2,) = (one for one in sent if one.data.tags.get("ccsr.method") == "v2")
    assert sent_v2.data.metrics["l_std"] == pytest.approx(load_result(first).summary["v2"]["l_std"], rel=1e-12)
    with pytest.raises(DataError, match="no complete result to log"):
        run_evaluate(config(place, "nothing"), log_only=True)


def test_mlflow_runs_are_compared_by_name_and_id(place: Path, first: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{place}/mlflow.db")
    client = MlflowClient(tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("study").experiment_id], "run_name = 'first'")
    by_name = compare(["first:bicubic", f"{run.info.run_id}:v2"], tracking=tracking)
    by_folder = compare([f"{first}:bicubic", f"{first}:v2"])
    assert [(d.metric, d.mean, d.low) for d in by_name.differences] == [
        (d.metric, d.mean, d.low) for d in by_folder.differences
    ]
    assert by_name.baseline == "first:bicubic"
    for comparison in (by_name, by_folder):
        logged = log_comparison(comparison, ["first:bicubic", "first:v2"], tracking)
        assert client.get_run(logged).info.experiment_id == run.info.experiment_id
    assert {item.path for item in client.list_artifacts(logged)} >= {
        "differences.csv",
        "comparison.txt",
        "comparison.html",
    }
    with pytest.raises(DataError, match="no MLflow runs are called so"):
        compare(["frist", "first"], tracking=tracking)
    with pytest.raises(DataError, match="holds no evaluation result"):
        compare(["training", "first"], tracking=tracking)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "num_orderings"), [(4, 14), (5, 28)])
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
        "perturbations=[]",
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
    assert ("What each timestep brings" in report) == (table == 4)
    if table == 4:
        trace = json.loads((place / "table4" / "images" / "CCSR" / "trace.json").read_text())
        scores = load_result(place / "table4").methods["CCSR"]
        for number, key in enumerate(KEYS[:2]):
            last = trace[key][-1]
            assert last["psnr_y"] == pytest.approx(scores.scores["psnr_y"][number].mean(), abs=1e-12)
            assert last["l_std"] == scores.l_std[number]
