"""Test sets in folders, other methods' outputs, and which metrics are available: what is found and what is refused."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import evaluation.config
import infra.files.weights
from evaluation.config import EvaluateConfig, FolderSet, NamedSet, OutputsMethod
from evaluation.inputs import EvaluationSet, OutputFiles, find_outputs, load_sets, outputs_id
from evaluation.job import run_evaluate
from evaluation.metrics.registry import UNAVAILABLE, Quality, how_to_get, metric_directions, metric_origins
from evaluation.scoring import gan_file
from infra import ConfigError, DataError, ModelError
from infra.config import parse_config
from infra.files.publish import write_bytes
from infra.files.storage import join
from infra.imaging.images import encode_png, read_image
from pipelines.cli.main import app


def write(path: Path, height: int, width: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)))


def outputs_of(folder: str, pattern: str = "{key}") -> OutputsMethod:
    return OutputsMethod(kind="outputs", name="m", outputs=folder, pattern=pattern)


@pytest.fixture
def pairs(tmp_path: Path) -> FolderSet:
    for index, name in enumerate(("b", "a", "deep/c d")):
        write(tmp_path / "hr" / f"{name}.png", 32, 48, index)
        write(tmp_path / "lr" / f"{name}.png", 8, 12, index)
    return FolderSet(lr=f"{tmp_path}/lr", hr=f"{tmp_path}/hr")


def test_pairs_are_matched_by_name(pairs: FolderSet) -> None:
    images = load_sets([pairs]).images
    assert [image.key for image in images] == ["a", "b", "deep-c-d"]
    lr, hr, size = images[0].read()
    assert (lr.shape, size) == ((8, 12, 3), (32, 48))
    np.testing.assert_array_equal(hr, read_image(f"{pairs.hr}/a.png"))


def test_a_sampling_field_that_the_models_family_lacks_is_refused_before_anything_starts(
    pairs: FolderSet, tmp_path: Path
) -> None:
    write_bytes(f"{tmp_path}/model/ccsr.json", b'{"family": "v2"}')
    method = {"kind": "model", "name": "m", "model": f"{tmp_path}/model", "sampling": {"wrapping": 0.2}}
    values = {"job": "evaluate", "output": f"{tmp_path}/out", "data": [pairs], "methods": [method]}
    with pytest.raises(ConfigError, match="`wrapping` has no effect on a model of family v2"):
        run_evaluate(EvaluateConfig.model_validate(values))
    assert not (tmp_path / "out").exists()


def test_the_id_of_folders_is_their_content(pairs: FolderSet, tmp_path: Path) -> None:
    first = load_sets([pairs]).dataset_id
    (tmp_path / "hr").rename(tmp_path / "moved")
    moved = FolderSet(lr=pairs.lr, hr=f"{tmp_path}/moved")
    assert load_sets([moved]).dataset_id == first
    assert load_sets([FolderSet(lr=pairs.lr)]).dataset_id != load_sets([FolderSet(lr=pairs.lr, scale=2)]).dataset_id
    write(tmp_path / "moved" / "a.png", 32, 48, 9)
    assert load_sets([moved]).dataset_id != first


def test_lr_only_sets_have_a_size_and_no_hr(pairs: FolderSet) -> None:
    image = load_sets([FolderSet(lr=pairs.lr, scale=3)]).images[0]
    lr, hr, size = image.read()
    assert (lr.shape, hr, size) == ((8, 12, 3), None, (24, 36))
    scores = Quality(["psnr_y", "niqe"])(np.zeros((24, 36, 3), np.uint8), hr)
    assert scores == {"psnr_y": None, "niqe": None}


def test_pairs_that_do_not_fit_are_refused(pairs: FolderSet, tmp_path: Path) -> None:
    write(tmp_path / "hr" / "a.png", 32, 47)
    with pytest.raises(DataError, match="no whole multiple"):
        load_sets([pairs])
    (tmp_path / "hr" / "a.png").unlink()
    with pytest.raises(DataError, match="1 images have no partner; the first is 'a'") as caught:
        load_sets([pairs])
    assert caught.value.where == pairs.hr
    write(tmp_path / "lr" / "a.jpg", 8, 12)
    images = load_sets([FolderSet(lr=pairs.lr)]).images
    assert [(image.key, image.noise_key) for image in images[:2]] == [("a.jpg", "a"), ("a.png", "a")]
    with pytest.raises(DataError, match="two images have the key b"):
        load_sets([FolderSet(lr=f"{tmp_path}/hr"), FolderSet(lr=f"{tmp_path}/hr")])


@pytest.mark.parametrize("layout", ["sample{:02d}", "runs/{:02d}"])
def test_outputs_of_other_methods_are_found(tmp_path: Path, layout: str) -> None:
    for run in range(11):
        for key in ("a", "b"):
            write(tmp_path / layout.format(run) / f"{key}.png", 4, 4, run)
    found = find_outputs(outputs_of(str(tmp_path)), ["a", "b"], 10)
    assert found["b"].runs == [str(tmp_path / layout.format(run) / "b.png") for run in range(10)]
    Path(found["b"].runs[7]).unlink()
    with pytest.raises(DataError, match="1 of 2 images have no output; the first is 'b'") as caught:
        find_outputs(outputs_of(str(tmp_path)), ["a", "b"], 10)
    assert caught.value.where == f"{tmp_path}, run 7"
    with pytest.raises(DataError, match="these outputs have 11 runs, 12 are asked for"):
        find_outputs(outputs_of(str(tmp_path)), ["a", "b"], 12)


@pytest.mark.parametrize(
    ("name", "pattern"), [("{}_out", "{key}_out"), ("SR_{}_x4", "SR_{key}_x4"), ("{}_OUT", "{key}_OUT")]
)
def test_outputs_with_a_suffix_are_suggested_and_found(tmp_path: Path, name: str, pattern: str) -> None:
    for key in ("a", "B1"):
        write(tmp_path / f"{name.format(key)}.png", 4, 4)
    with pytest.raises(DataError, match="2 of 2 images have no output; the first is 'a'") as caught:
        find_outputs(outputs_of(str(tmp_path)), ["a", "b1"], 2)
    assert caught.value.todo == f'set pattern: "{pattern}" for this method'
    found = find_outputs(outputs_of(str(tmp_path), pattern.lower()), ["a", "b1"], 2)
    assert found["b1"].runs == [str(tmp_path / f"{name.format('B1')}.png")]
    with pytest.raises(ValueError, match=r"write \{key\} once"):
        outputs_of(str(tmp_path), "out")


def test_perturbed_outputs_are_complete_or_absent(tmp_path: Path) -> None:
    for key in ("a", "b"):
        write(tmp_path / f"{key}.png", 4, 4)
    write(tmp_path / "perturbed" / "shift" / "a.png", 4, 4)
    assert find_outputs(outputs_of(str(tmp_path)), ["a", "b"], 2)["a"].perturbed == {}
    with pytest.raises(DataError, match="1 of 2 images have no output; the first is 'b'") as caught:
        find_outputs(outputs_of(str(tmp_path)), ["a", "b"], 2, ["shift"])
    assert caught.value.where == f"{tmp_path}, perturbed/shift"
    assert find_outputs(outputs_of(str(tmp_path)), ["a"], 2, ["shift"])["a"].perturbed.keys() == {"shift"}


def test_named_sets_are_complete_and_of_their_scale(pairs: FolderSet, tmp_path: Path, monkeypatch: Any) -> None:
    layout = {"lr": "lr", "hr": "hr", "num_images": 3, "scale": 4, "licence": "ours"}
    monkeypatch.setattr(evaluation.config, "published_sets", lambda: {"Three": layout})
    named = NamedSet(set="Three", path=str(tmp_path))
    assert load_sets([named]) == EvaluationSet(load_sets([pairs]).dataset_id, load_sets([named]).images)
    layout["scale"] = 2
    with pytest.raises(DataError, match="is not 2 times its LR image"):
        load_sets([named])
    layout |= {"scale": 4, "num_images": 4}
    with pytest.raises(DataError, match="Three has 3 images here, 4 as published"):
        load_sets([named])
    with pytest.raises(ValueError, match="unknown test set; choose from Three"):
        NamedSet(set="Four", path=str(tmp_path))


def test_the_published_sets() -> None:
    numbers = {"DIV2K": 3000, "RealSR": 100, "DRealSR": 93, "RealSet80": 80, "RealLR200": 200, "RealLQ250": 250}
    for name, number in numbers.items():
        layout = NamedSet(set=name, path="somewhere").layout
        assert (layout["num_images"], layout["scale"], "hr" in layout) == (number, 4, number in (3000, 100, 93))
        assert layout["licence"]


def test_outputs_are_checked_and_named_by_their_pixels(pairs: FolderSet, tmp_path: Path) -> None:
    images = load_sets([pairs]).images
    keys = [image.key for image in images]
    for run in range(2):
        for key in keys:
            write(tmp_path / "out" / f"sample{run}" / f"{key}.png", 32, 48, run)
    outputs = find_outputs(outputs_of(f"{tmp_path}/out"), keys, 2)
    first = outputs_id(outputs, images)
    assert outputs_id(outputs, images[::-1]) == first
    changed = Path(outputs["b"].runs[1])
    write(changed, 32, 48, 99)
    assert outputs_id(outputs, images) != first
    write(changed, 32, 44)
    with pytest.raises(DataError, match="this output is 32 x 44 px, its test image 32 x 48") as caught:
        outputs_id(outputs, images)
    assert caught.value.where == str(changed)
    changed.write_bytes(changed.read_bytes()[:100])
    with pytest.raises(DataError, match="the picture data is damaged"):
        outputs_id(outputs, images)


def test_one_run_folder_is_refused_and_no_run_folder_is_deterministic(tmp_path: Path) -> None:
    write(tmp_path / "one" / "sample00" / "a.png", 4, 4)
    with pytest.raises(DataError, match="1 runs, 2 are asked for") as caught:
        find_outputs(outputs_of(f"{tmp_path}/one"), ["a"], 2)
    assert "deterministic method's outputs are in the folder itself" in caught.value.todo
    write(tmp_path / "plain" / "a.png", 4, 4)
    assert find_outputs(outputs_of(f"{tmp_path}/plain"), ["a"], 10) == {
        "a": OutputFiles([f"{tmp_path}/plain/a.png"], {})
    }
    with pytest.raises(DataError, match="the first is 'b'"):
        find_outputs(outputs_of(f"{tmp_path}/plain"), ["a", "b"], 10)
    with pytest.raises(DataError, match="no images"):
        find_outputs(outputs_of(f"{tmp_path}/nowhere"), ["a"], 10)


def test_one_run_is_refused_by_the_config() -> None:
    values = {"job": "evaluate", "output": "o", "data": ["d"], "methods": [{"kind": "bicubic"}], "num_runs": 1}
    with pytest.raises(ConfigError, match="greater than or equal to 2"):
        parse_config(values, EvaluateConfig, where="test")
    with pytest.raises(ConfigError, match="fid describes a whole set"):
        parse_config(values | {"num_runs": 2, "metrics": ["fid"]}, EvaluateConfig, where="test")


def test_a_metric_without_weights_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("evaluation.metrics.registry.installed_version", lambda package: None)
    metrics = ("psnr_y", "lpips", "dists", "fid", "musiq")
    assert metric_origins(metrics) == dict.fromkeys(metrics[1:], UNAVAILABLE)
    monkeypatch.setattr("evaluation.metrics.registry.installed_version", lambda package: "1.2")
    assert metric_origins(["fid", "musiq"]) == {"fid": UNAVAILABLE, "musiq": UNAVAILABLE}


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiqa is no dependency of the tests (its licence is non-commercial): a module with its one function and table."""

    def create_metric(name: str, *, device: str) -> Any:
        if name == "musiq" and os.environ["HF_HUB_OFFLINE"] == "1":
            raise URLError("Name or service not known")  # what it raises where the hub cannot be reached
        if name == "broken":
            raise RuntimeError("Error(s) in loading state_dict\nmore")
        if name == "ckdn":
            return lambda sr, hr: torch.tensor(2.0) + (sr - hr).mean() * 0
        return lambda *images: torch.tensor(float(len(images)))

    table = {
        "musiq": {"metric_mode": "NR"},
        "brisque": {"metric_mode": "NR", "lower_better": True},
        "ckdn": {"metric_mode": "FR"},
        "broken": {"metric_mode": "NR"},
    }
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the command sets it
    monkeypatch.setattr("evaluation.metrics.registry.installed_version", lambda package: "1.2")
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=create_metric))
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", SimpleNamespace(DEFAULT_CONFIGS=table))


def test_a_metric_of_pyiqa_is_available_once_its_weights_load(pyiqa: None) -> None:
    assert metric_origins(["musiq", "clipiqa"]) == {"musiq": UNAVAILABLE, "clipiqa": "pyiqa 1.2"}
    with pytest.raises(ModelError, match="pyiqa has no weights for musiq here"):
        Quality(["musiq"])
    assert how_to_get("musiq") == "ccsr weights fetch pyiqa:musiq"
    assert CliRunner().invoke(app, ["weights", "fetch", "pyiqa:musiq"]).exit_code == 0
    assert metric_origins(["musiq"]) == {"musiq": "pyiqa 1.2"}


def test_any_metric_of_pyiqa_has_its_direction_and_origin(pyiqa: None) -> None:
    names = ["psnr_y", "pyiqa:brisque", "pyiqa:ckdn"]
    assert metric_origins(names) == dict.fromkeys(names[1:], "pyiqa 1.2")
    assert metric_directions(names) == {"pyiqa:brisque": -1, "pyiqa:ckdn": 1}
    images = [np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8) for i in (0, 1)]
    assert Quality(names[1:])(*images) == {"pyiqa:brisque": 1.0, "pyiqa:ckdn": 2.0}  # images it was given
    assert Quality(names[1:])(images[0], None) == {"pyiqa:brisque": 1.0, "pyiqa:ckdn": None}
    with pytest.raises(ConfigError, match="no metric of single images called 'brisk'") as caught:
        metric_origins(["pyiqa:brisk"])
    assert caught.value.todo == "did you mean brisque?"


def test_a_metric_that_cannot_score_an_image_is_named(pyiqa: None) -> None:
    """As the multi-scale ones with pictures that are too small for their scales."""
    large, small = np.zeros((24, 30, 3), np.uint8), np.zeros((24, 20, 3), np.uint8)
    with pytest.raises(DataError, match=r"pyiqa:ckdn does not score 22x16 px \(RuntimeError") as caught:
        Quality(["pyiqa:ckdn"])(large, small)
    assert caught.value.where == "metrics: pyiqa:ckdn"


def test_a_metric_that_is_here_but_does_not_load_is_no_absence(pyiqa: None) -> None:
    with pytest.raises(
        ModelError, match=r"pyiqa:broken does not load \(RuntimeError: Error\(s\) in loading state_dict\)"
    ):
        metric_origins(["psnr_y", "pyiqa:broken"])


@pytest.mark.parametrize("name", ["psnr", "pyiqa:", "maniqa"])
def test_unknown_metrics_and_conventions_are_refused_by_the_config(name: str) -> None:
    values = {"job": "evaluate", "output": "o", "data": ["d"], "methods": [{"kind": "bicubic"}]}
    with pytest.raises(ConfigError, match="unknown metric; choose from psnr_y"):
        parse_config(values | {"metrics": [name]}, EvaluateConfig, where="test")
    with pytest.raises(ConfigError, match="name each of the metrics once"):
        parse_config(values | {"metrics": ["psnr_y", "psnr_y"]}, EvaluateConfig, where="test")
    with pytest.raises(ConfigError, match="'ccsr' or 'pyiqa'"):
        parse_config(values | {"convention": "stablesr"}, EvaluateConfig, where="test")


def test_weights_with_a_wrong_hash_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", str(tmp_path))
    for name in ("alexnet-owt-7be5be79.pth", "lpips_v0.1_alex.pth"):
        torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ModelError, match="its sha256 is not the published one"):
        metric_origins(["lpips"])
    files = [infra.files.weights.WeightFile(**{**vars(f), "sha256": None}) for f in infra.files.weights.weight_files()]
    monkeypatch.setattr(infra.files.weights, "weight_files", lambda: files)
    assert metric_origins(["lpips"])["lpips"].startswith("alexnet ")
    with pytest.raises(ModelError, match="has shape"):
        Quality(["lpips"])


def test_the_processes_of_a_node_share_a_gans_file(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    uri = join(s3, "gan.pth")
    write_bytes(uri, b"weights")
    with gan_file(uri) as first:
        downloaded = first.stat()
        with gan_file(uri) as second:
            assert (second, second.stat().st_ino) == (first, downloaded.st_ino)
        assert first.read_bytes() == b"weights"
        write_bytes(uri, b"other weights")
        with gan_file(uri) as changed:
            assert changed.read_bytes() == b"other weights"
    assert not first.exists()
    with gan_file(str(tmp_path / "gan.pth")) as local:
        assert local == tmp_path / "gan.pth"
