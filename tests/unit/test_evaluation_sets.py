"""Test sets in folders, other methods' outputs, and which metrics can be had: what is found and what is refused."""

import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

import infra.weights
from evaluation.config import EvaluateConfig, FolderSet
from evaluation.metrics.registry import UNAVAILABLE, Quality, metric_origins
from evaluation.outputs import find_outputs, outputs_id
from evaluation.sets import EvaluationImage, load_sets
from infra import ConfigError, DataError, ModelError
from infra.config import parse_config
from infra.images import encode_png, read_image


def write(path: Path, height: int, width: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)))


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
    assert EvaluationImage.from_dict(images[0].to_dict()) == images[0]


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
    found = find_outputs(str(tmp_path), ["a", "b"], 10)
    assert found["b"] == [str(tmp_path / layout.format(run) / "b.png") for run in range(10)]
    Path(found["b"][7]).unlink()
    with pytest.raises(DataError, match="1 of 2 images have no output; the first is 'b'") as caught:
        find_outputs(str(tmp_path), ["a", "b"], 10)
    assert caught.value.where == f"{tmp_path}, run 7"
    with pytest.raises(DataError, match="these outputs have 11 runs, 12 are asked for"):
        find_outputs(str(tmp_path), ["a", "b"], 12)


def test_outputs_are_checked_and_named_by_their_pixels(pairs: FolderSet, tmp_path: Path) -> None:
    images = load_sets([pairs]).images
    keys = [image.key for image in images]
    for run in range(2):
        for key in keys:
            write(tmp_path / "out" / f"sample{run}" / f"{key}.png", 32, 48, run)
    outputs = find_outputs(f"{tmp_path}/out", keys, 2)
    first = outputs_id(outputs, images)
    assert outputs_id(outputs, images[::-1]) == first
    changed = Path(outputs["b"][1])
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
        find_outputs(f"{tmp_path}/one", ["a"], 2)
    assert "deterministic method's outputs lie in the folder itself" in caught.value.todo
    write(tmp_path / "plain" / "a.png", 4, 4)
    assert find_outputs(f"{tmp_path}/plain", ["a"], 10) == {"a": [f"{tmp_path}/plain/a.png"]}
    with pytest.raises(DataError, match="the first is 'b'"):
        find_outputs(f"{tmp_path}/plain", ["a", "b"], 10)
    with pytest.raises(DataError, match="no images"):
        find_outputs(f"{tmp_path}/nowhere", ["a"], 10)


def test_one_run_is_refused_by_the_config() -> None:
    values = {"job": "evaluate", "output": "o", "data": ["d"], "methods": [{"kind": "bicubic"}], "num_runs": 1}
    with pytest.raises(ConfigError, match="greater than or equal to 2"):
        parse_config(values, EvaluateConfig, where="test")
    with pytest.raises(ConfigError, match="fid describes a whole set"):
        parse_config(values | {"num_runs": 2, "metrics": ["fid"]}, EvaluateConfig, where="test")


def test_a_metric_without_weights_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("evaluation.metrics.registry._release", lambda package: None)
    metrics = ("psnr_y", "lpips", "dists", "fid", "musiq")
    assert metric_origins(metrics) == dict.fromkeys(metrics[1:], UNAVAILABLE)
    monkeypatch.setattr("evaluation.metrics.registry._release", lambda package: "1.2")
    assert metric_origins(["fid", "musiq"]) == {"fid": UNAVAILABLE, "musiq": UNAVAILABLE}


def test_a_metric_of_pyiqa_is_available_once_its_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiqa is no dependency of the tests (its licence is non-commercial): a module with its one function stands in."""

    def create_metric(name: str, *, device: str) -> str:
        if name == "musiq":
            raise URLError("Name or service not known")  # what it raises where the hub cannot be reached
        return f"{name} on {device}"

    monkeypatch.setattr("evaluation.metrics.registry._release", lambda package: "1.2")
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=create_metric))
    assert metric_origins(["musiq", "clipiqa"]) == {"musiq": UNAVAILABLE, "clipiqa": "pyiqa 1.2"}
    with pytest.raises(ModelError, match="pyiqa cannot load musiq here"):
        Quality(["musiq"])


def test_weights_with_a_wrong_hash_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", str(tmp_path))
    for name in ("alexnet-owt-7be5be79.pth", "lpips_v0.1_alex.pth"):
        torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ModelError, match="its sha256 is not the published one"):
        metric_origins(["lpips"])
    files = [infra.weights.WeightFile(**{**vars(f), "sha256": None}) for f in infra.weights.weight_files()]
    monkeypatch.setattr(infra.weights, "weight_files", lambda: files)
    assert metric_origins(["lpips"])["lpips"].startswith("alexnet ")
    with pytest.raises(ModelError, match="has shape"):
        Quality(["lpips"])
