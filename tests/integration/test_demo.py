"""What `ccsr demo` promises: real tars, checkpoints, results and MLflow entries, and the same again for nothing."""

import io
import json
import subprocess

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from mlflow.tracking import MlflowClient

import pipelines.demo
from degradation import apply
from evaluation import g_std, l_std, psnr_y, ssim_y
from infra.imaging.images import decode_image, read_image
from infra.shards.manifest import Manifest
from pipelines.sets.verify import verify
from tests.integration.conftest import NUM_RUNS, NUM_STEPS, NUM_UPDATES, REPOSITORY, run_ccsr
from training.config import SamplingConfig
from training.models import load_model
from training.models.library import AutoencoderKL, UNet2DConditionModel
from training.restore.seeded_runs import restore_runs
from training.run.checkpoint import complete_checkpoints, load_checkpoint

METHODS = {"bicubic": 1, "uniform": NUM_RUNS, "truncated": NUM_RUNS, "ccsr": NUM_RUNS}
KEYS = ["skimage-astronaut-000-0", "skimage-chelsea-000-0", "skimage-coffee-000-0", "sklearn-china-000-0"]


def test_says_what_it_made(demo):
    assert all(method in demo.stdout for method in METHODS)
    assert "PSNR / G-STD" in demo.stdout
    assert "L-STD" in demo.stdout
    assert f"{demo.out}/evaluation/report.html" in demo.stdout
    assert f"ui --backend-store-uri sqlite:///{demo.out}/mlflow.db" in demo.stdout


def test_shards_are_webdataset_tars_of_degraded_pairs(demo):
    manifest = verify(str(demo.out / "shards" / "train"))
    assert manifest.num_samples == 120
    tars = [str(demo.out / "shards" / "train" / shard["shard"]) for shard in manifest.facts["shards"]]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [entry.key for entry in manifest.entries]
    traces = set()
    for sample in samples[::12]:
        hr, lr = (decode_image(sample[name], where=name) for name in ("hr.png", "lr.png"))
        assert hr.shape == (128, 128, 3)
        assert lr.shape == (32, 32, 3)
        facts = json.loads(sample["json"])
        replayed = apply(hr, facts["degradation"])
        np.testing.assert_array_equal(replayed.lr, lr)
        traces.add(json.dumps(facts["degradation"]))
    assert len(traces) == 10  # every crop has its own draw
    listed = subprocess.run(["tar", "tf", tars[0]], capture_output=True, text=True, check=True).stdout.split()
    assert listed[:3] == [f"{samples[0]['__key__']}.{name}" for name in ("hr.png", "lr.png", "json")]


@pytest.mark.parametrize("stage", ["uniform", "stage1", "stage2"])
def test_checkpoints_and_models(demo, stage):
    places = complete_checkpoints(str(demo.out / stage))
    states = [load_checkpoint(place) for place in places]
    assert [state.facts["num_updates"] for state in states] == [NUM_UPDATES // 2, NUM_UPDATES]
    assert states[-1].facts["position"] == NUM_UPDATES * 8
    first, last = (state.tensors["weights"] for state in states)
    assert first.keys() == last.keys()
    assert any((first[name] != last[name]).any() for name in first)
    assert ("discriminator" in states[-1].tensors) == (stage == "stage2")
    folder = demo.out / stage / "model"
    model = load_model(folder)
    trained = model.vae if stage == "stage2" else model.controlnet
    exported = trained.state_dict()
    assert all(name in exported and (exported[name] == tensor).all() for name, tensor in last.items())
    assert sum(p.numel() for p in UNet2DConditionModel.from_pretrained(folder / "unet").parameters()) > 1e6
    assert sum(p.numel() for p in AutoencoderKL.from_pretrained(folder / "vae").parameters()) > 1e6


def test_stage2_changes_only_the_decoder(demo):
    before, after = (load_model(demo.out / stage / "model") for stage in ("stage1", "stage2"))
    for part in ("unet", "controlnet"):
        old, new = (getattr(model, part).state_dict() for model in (before, after))
        assert all((old[name] == new[name]).all() for name in old)
    old, new = before.vae.state_dict(), after.vae.state_dict()
    changed = {name.split(".")[0] for name in old if (old[name] != new[name]).any()}
    assert changed == {"decoder", "post_quant_conv"}


def test_numbers_are_those_of_the_pictures_on_disk(demo):
    folder = demo.out / "evaluation"
    results = pq.read_table(folder / "results.parquet").to_pylist()
    images = {(row["method"], row["key"]): row for row in pq.read_table(folder / "images.parquet").to_pylist()}
    expected = [(method, key, run) for method, n in METHODS.items() for key in KEYS for run in range(n)]
    assert [(row["method"], row["key"], row["run"]) for row in results] == expected
    for method, num_runs in METHODS.items():
        for key in KEYS:
            hr = read_image(str(folder / "images" / "hr" / f"{key}.png"))
            places = [folder / "images" / method / f"{run:02d}" / f"{key}.png" for run in range(num_runs)]
            runs = [read_image(str(place)) for place in places]
            rows = [row for row in results if (row["method"], row["key"]) == (method, key)]
            scores = [psnr_y(image, hr) for image in runs]
            assert [row["psnr_y"] for row in rows] == pytest.approx(scores, abs=1e-9)
            assert [row["ssim_y"] for row in rows] == pytest.approx([ssim_y(image, hr) for image in runs], abs=1e-9)
            image = images[method, key]
            if num_runs == 1:
                assert (image["l_std"], image["g_std_psnr_y"]) == (0, 0)
            else:
                assert image["l_std"] == pytest.approx(l_std(np.stack(runs)), rel=1e-9)
                assert image["g_std_psnr_y"] == pytest.approx(g_std(np.array([scores])), rel=1e-9)
                assert image["l_std"] > 0
                stability = cv2.imread(str(folder / "images" / method / "l_std" / f"{key}.png"), cv2.IMREAD_UNCHANGED)
                assert stability.dtype == np.uint16
                cut = stability[4:-4, 4:-4] if stability.shape == hr.shape[:2] else stability
                assert cut.mean() / 65535 == pytest.approx(image["l_std"], rel=1e-2)


def test_one_run_can_be_made_again_alone(demo):
    """The recorded seed gives run 2 of the second photograph without runs 0 and 1 and without the first photograph."""
    folder = demo.out / "evaluation"
    seed = json.loads((folder / "run.json").read_text())["seed"]
    lr = read_image(str(folder / "images" / "lr" / f"{KEYS[1]}.png"))
    model = load_model(demo.out / "stage2" / "model")
    (image,) = restore_runs(
        model, lr, (128, 128), SamplingConfig(num_steps=NUM_STEPS), seed=seed, key=KEYS[1], runs=[2]
    )
    stored = read_image(str(folder / "images" / "ccsr" / "02" / f"{KEYS[1]}.png")).astype(int)
    assert np.abs(image.astype(int) - stored).max() <= 1  # another batch size may round a value the other way
    other = read_image(str(folder / "images" / "ccsr" / "01" / f"{KEYS[1]}.png")).astype(int)
    assert np.abs(image.astype(int) - other).max() > 1


def test_mlflow_holds_parameters_metrics_tables_and_pictures(demo):
    client = MlflowClient(f"sqlite:///{demo.out}/mlflow.db")
    experiment = client.get_experiment_by_name("ccsr-demo")
    found = client.search_runs([experiment.experiment_id])
    kinds = [tuple(run.data.tags.get(f"ccsr.{tag}") for tag in ("job", "stage", "method")) for run in found]
    runs = dict(zip(kinds, found, strict=True))
    assert len(found) == len(runs)
    methods = {("method", None, name) for name in METHODS}
    assert set(runs) == {*(("train", stage, None) for stage in "012"), ("evaluate", None, None), *methods}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    train = runs["train", "1", None]
    losses = client.get_metric_history(train.info.run_id, "loss/loss")
    assert [point.step for point in losses] == [8 * update for update in range(1, NUM_UPDATES + 1)]
    first = client.get_metric_history(train.info.run_id, "loss/l_diff")[0].value
    assert first < 0.5  # random weights have 1: training began at the base
    assert {"loss/l_t", "loss/l_tmax", "optimizer/gradient_norm", "speed/data_wait_share"} <= set(train.data.metrics)
    assert train.data.params["optimizer.learning_rate"] == "0.0001"
    evaluation = runs["evaluate", None, None]
    images = pq.read_table(demo.out / "evaluation" / "images.parquet").to_pylist()
    for method in METHODS:
        stored = [row["l_std"] for row in images if row["method"] == method]
        metrics = runs["method", None, method].data.metrics
        assert {"psnr_y", "ssim_y", "sharpness"} <= set(metrics)
        if METHODS[method] == 1:  # a stability of 0 would sort it before all others
            assert not {"l_std", "psnr_y.g_std"} & set(metrics)
            continue
        assert metrics["l_std"] == pytest.approx(np.mean(stored), rel=1e-9)
        assert "psnr_y.g_std" in metrics
    artifacts = {item.path for item in client.list_artifacts(evaluation.info.run_id)}
    assert {"results.parquet", "images.parquet", "report.html", "images", "run.json"} <= artifacts
    local = client.download_artifacts(evaluation.info.run_id, f"images/ccsr/00/{KEYS[0]}.png")
    assert read_image(local).shape == (128, 128, 3)


def test_report_is_one_file(demo):
    page = (demo.out / "evaluation" / "report.html").read_text()
    assert all(method in page for method in METHODS)
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert page.count("data:image/") >= 2 * 5


def test_again_on_the_same_folder_makes_nothing_anew(demo, monkeypatch, capsys):
    """Nor starts Ray for it."""
    monkeypatch.setattr(pipelines.demo, "ray_cluster", None)
    monkeypatch.setattr(pipelines.demo, "CONFIGS", demo.out.parent / "configs")
    monkeypatch.setenv("COLUMNS", "200")

    def times() -> dict:
        suffixes = (".tar", ".safetensors", ".parquet", ".json", ".png")
        kept = [path for path in demo.out.rglob("*") if path.suffix in suffixes and "mlartifacts" not in path.parts]
        return {path: path.stat().st_mtime_ns for path in kept}

    made = times()
    pipelines.demo.run_demo(demo.out)
    assert times() == made
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in demo.stdout.splitlines() if line.startswith(("↑", "↓"))]
    assert table
    assert [line for line in printed if line.startswith(("↑", "↓"))] == table
    client = MlflowClient(f"sqlite:///{demo.out}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ccsr-demo").experiment_id])
    assert len(runs) == 4 + len(METHODS)


@pytest.mark.slow
def test_each_step_runs_alone_with_its_yaml(demo, tmp_path):
    out = f"output={tmp_path}/heldout"
    done = run_ccsr("shard", "-c", "configs/demo/shard_heldout.yaml", "--set", out)
    assert done.returncode == 0, done.stderr
    alone, whole = Manifest.load(f"{tmp_path}/heldout"), Manifest.load(str(demo.out / "shards" / "heldout"))
    assert alone.dataset_id == whole.dataset_id
    folder = demo.out / "evaluation"
    compared = run_ccsr("compare", f"{folder}:uniform", f"{folder}:ccsr", "--csv", str(tmp_path / "difference.csv"))
    assert compared.returncode == 0, compared.stderr
    assert "l_std" in (tmp_path / "difference.csv").read_text()
    assert io.StringIO(compared.stdout).readline()


@pytest.mark.slow
@pytest.mark.parametrize(("table", "stages"), [(4, ["uniform", "stage1", "stage2"]), (5, ["stage2"] * 5)])
def test_the_papers_ablations_on_the_demos_models(shipped_demo, table, stages):
    """Four photographs leave most orderings open. Each has its interval; L-STD's means have Table 4's order."""
    out = shipped_demo.out
    path = REPOSITORY / "configs" / "paper" / f"table{table}.yaml"
    overrides = [
        f"output={out}/table{table}",
        f"data=[{out}/shards/heldout]",
        f"tracking.uri=sqlite:///{out}/mlflow.db",
        "num_runs=10",
        "runtime.num_actors=2",
        *(f"methods.{index}.model={out}/{stage}/model" for index, stage in enumerate(stages)),
    ]
    done = run_ccsr("evaluate", "-c", str(path), *(word for value in overrides for word in ("--set", value)))
    assert done.returncode == 0, done.stderr
    orderings = json.loads((out / f"table{table}" / "orderings.json").read_text())
    tested = [ordering for ordering in orderings if ordering["verdict"] != "not tested"]
    assert {"psnr_y", "g_std_psnr_y", "l_std"} == {ordering["metric"] for ordering in tested}
    assert all(ordering["low"] <= ordering["mean"] <= ordering["high"] for ordering in tested)
    assert all(ordering["num_images"] == 4 for ordering in tested)
    if table == 4:
        stability = [ordering for ordering in tested if ordering["metric"] == "l_std"]
        assert [(o["better"], o["worse"]) for o in stability] == [("CCSR", "truncated"), ("truncated", "uniform")]
        assert all(ordering["mean"] < 0 for ordering in stability)
