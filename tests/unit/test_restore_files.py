"""`ccsr restore` and files: names, keys, what an output was made from, and what is never its input."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import photo
from PIL import Image

from evaluation.config import EvaluateConfig
from evaluation.inputs import load_sets
from evaluation.scoring import Scorer, ScoreTask
from infra import ConfigError, DataError, PartialResultError
from infra.files.publish import upload_folder, write_bytes
from infra.files.storage import list_files, read_bytes
from infra.imaging.images import encode_png, read_image
from pipelines.restore import RestoreConfig, restore
from tests.small_networks import smaller_tiny
from training.config import ModelConfig, SamplingConfig
from training.models import build_model, save_model

CONFIG = RestoreConfig(scale=2, sampling=SamplingConfig(num_steps=3))
LONG = "x" * 251
NAMES = [
    "photo.png",
    "deep/a b.png",
    "夕焼け.png",
    "हिन्दी.jpg",
    "👍.png",
    f"{LONG}.png",
    "/".join(["deep" * 20] * 6) + "/y.png",
    os.fsdecode(b"caf\xe9.png"),
]


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    with smaller_tiny():
        save_model(build_model(ModelConfig(family="v2"), 1), folder)
    return str(folder)


@pytest.fixture
def model(smaller: str) -> Iterator[str]:
    with smaller_tiny():
        yield smaller


def save(place: Path, seed: int = 0) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(16, 20, seed)).save(place, quality=95)


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_any_name_is_restored_alone_as_beside_others(model: str, tmp_path: Path) -> None:
    """A picture depends on its path below INPUT, not on its neighbours and not on the output's name."""
    for name in NAMES:
        save(tmp_path / "in" / name)
    assert restore(f"{tmp_path}/in", f"{tmp_path}/out", model, CONFIG) == len(NAMES)
    together = written(tmp_path / "out")
    assert len(together) == len(NAMES)
    assert {"photo.png", "deep/a b.png", "夕焼け.png", "हिन्दी.png"} <= together.keys()
    assert restore(f"{tmp_path}/in", f"{tmp_path}/out", model, CONFIG) == len(NAMES)
    for number, name in enumerate(NAMES):
        save(tmp_path / f"alone{number}" / name)
        restore(f"{tmp_path}/alone{number}", f"{tmp_path}/single{number}", model, CONFIG)
        ((place, picture),) = written(tmp_path / f"single{number}").items()
        assert together[place] == picture
    pictures = set(together.values())
    assert len(pictures) == len(NAMES), "each path has its own noise"


def test_files_that_differ_in_their_suffix_keep_it_and_their_noise(model: str, tmp_path: Path) -> None:
    save(tmp_path / "in" / "photo.png")
    restore(f"{tmp_path}/in", f"{tmp_path}/alone", model, CONFIG)
    save(tmp_path / "in" / "photo.jpg")
    restore(f"{tmp_path}/in", f"{tmp_path}/both", model, CONFIG)
    both = written(tmp_path / "both")
    assert both.keys() == {"photo.png.png", "photo.jpg.png"}
    assert both["photo.png.png"] == written(tmp_path / "alone")["photo.png"]


@pytest.mark.parametrize(("family", "steps"), [("v2", {"num_steps": 3}), ("onestep", {"tile": 64})])
def test_restore_and_evaluate_make_the_same_pictures(family: Any, steps: dict[str, int], tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    save_model(build_model(ModelConfig(family=family), 1), model)
    for number, name in enumerate(["deep/a b.png", "photo.png", "photo.jpg", "夕焼け.png", f"{LONG}.png"]):
        save(tmp_path / "in" / name, number)
    grey = photo(24, 20, seed=9)[..., :1].repeat(3, axis=2)
    (tmp_path / "in" / "grey.png").write_bytes(encode_png(grey))
    sampling = SamplingConfig.model_validate(steps).model_dump()
    values: dict[str, Any] = {
        "job": "evaluate",
        "output": f"{tmp_path}/evaluation",
        "data": [{"lr": f"{tmp_path}/in", "scale": 2}],
        "methods": [{"kind": "model", "name": "ours", "model": model, "sampling": sampling}],
        "num_runs": 2,
        "seed": 3,
    }
    config = EvaluateConfig.model_validate(values)
    images = load_sets(config.data).images
    score = Scorer(config, ["psnr_y"])
    for image in images:
        score(ScoreTask(config.methods[0], image, None, trace=False))
    ours = {"num_runs": 2, "seed": 3, "scale": 2, "sampling": sampling}
    torch.set_num_threads(4)  # as a shell has them, whose number moves single levels
    restore(f"{tmp_path}/in", f"{tmp_path}/out", model, RestoreConfig.model_validate(ours))
    assert torch.get_num_threads() == 1
    restored = {picture for name, picture in written(tmp_path / "out").items()}
    evaluated = written(tmp_path / "evaluation" / "images" / "ours")
    assert len(restored) == (6 if family == "onestep" else 12), "one step: all seeds give one picture"
    assert np.ptp(read_image(f"{tmp_path}/evaluation/images/ours/00/grey.png"), axis=2).max() == 0, "grey stays grey"
    assert restored == {picture for name, picture in evaluated.items() if not name.startswith("l_std")}
    assert [image.key for image in images][:5] == [
        "deep-a-b",
        "grey",
        "photo.jpg",
        "photo.png",
        f"{'x' * 191}-{images[4].key[-8:]}",
    ]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_changed_source_is_not_passed_over(
    place: str, model: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        write_bytes(f"{root}/in/{name}", encode_png(photo(16, 20, number)))
    arguments = (f"{root}/in", f"{root}/out", model, CONFIG)
    assert restore(*arguments) == 3
    before = {uri: read_bytes(uri) for uri in list_files(f"{root}/out")}
    record = json.loads(before[f"{root}/out/records/a.json"])
    assert record == {"source": "a.png", "num_bytes": len(read_bytes(f"{root}/in/a.png")), "sha256": record["sha256"]}
    assert restore(*arguments) == 3
    write_bytes(f"{root}/in/a.png", encode_png(photo(16, 20, 7)))
    with pytest.raises(PartialResultError, match=r"1 of 3 images were not restored: 1 changed \(a\.png\)"):
        restore(*arguments)
    assert "another file or from an earlier one" in capsys.readouterr().err
    write_bytes(f"{root}/other/a.png", encode_png(photo(16, 20, 7)))
    for source in (f"{root}/other", f"{root}/other/a.png"):
        with pytest.raises(PartialResultError, match="1 of 1 images were not restored: 1 changed"):
            restore(source, *arguments[1:])
    assert {uri: read_bytes(uri) for uri in list_files(f"{root}/out")} == before


def test_an_output_without_a_record_is_not_taken_and_a_record_alone_binds_nothing(model: str, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    arguments = (f"{tmp_path}/in", f"{tmp_path}/out", model, CONFIG)
    restore(*arguments)
    output, record = tmp_path / "out" / "a.png", tmp_path / "out" / "records" / "a.json"
    picture, known = output.read_bytes(), record.read_bytes()
    record.unlink()
    with pytest.raises(PartialResultError, match="1 changed"):
        restore(*arguments)
    output.unlink()
    record.parent.mkdir(exist_ok=True)
    record.write_bytes(known.replace(b'"num_bytes": ', b'"num_bytes": 1'))
    assert restore(*arguments) == 1
    assert (output.read_bytes(), record.read_bytes()) == (picture, known)


def test_one_file_goes_into_one_file(model: str, tmp_path: Path) -> None:
    save(tmp_path / "in" / "meadow.jpg")
    restore(f"{tmp_path}/in", f"{tmp_path}/out", model, CONFIG)
    arguments = (f"{tmp_path}/in/meadow.jpg", f"{tmp_path}/new/big.png", model, CONFIG)
    for _ in range(2):
        assert restore(*arguments) == 1
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["big.png", "big.png.run.json"]
    assert (tmp_path / "new/big.png").read_bytes() == (tmp_path / "out/meadow.png").read_bytes()
    save(tmp_path / "in" / "meadow.jpg", 5)
    with pytest.raises(ConfigError, match=r"inputs\.source\.sha256"):
        restore(*arguments)


@pytest.mark.parametrize(
    ("source", "output", "num_runs", "what"),
    [
        ("in", "big.png", 1, "INPUT is no file"),
        ("in/a.png", "big.jpg", 1, "results are PNG files"),
        ("in/a.png", "big.png", 2, "several runs"),
        ("in/a.png", "in/a.png", 1, "OUTPUT is INPUT"),
        ("in", "in", 1, "inside an input"),
        ("in", "in/out", 1, "inside an input"),
        ("in", "link/out", 1, "inside an input"),
        ("in/a.png", "in", 1, "inside an input"),
        ("out/raw", "out", 1, "inside an input"),
    ],
)
def test_an_output_that_would_be_an_input_is_refused(
    source: str, output: str, num_runs: int, what: str, model: str, tmp_path: Path
) -> None:
    for name in ("in/a.png", "out/raw/raw/a.png"):
        save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=what):
        restore(f"{tmp_path}/{source}", f"{tmp_path}/{output}", model, CONFIG.model_copy(update={"num_runs": num_runs}))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_input_that_does_not_exist_is_said_to(model: str, tmp_path: Path) -> None:
    for source in ("meadow.jpg", "photos"):
        with pytest.raises(DataError, match="does not exist"):
            restore(f"{tmp_path}/{source}", f"{tmp_path}/out", model, CONFIG)


def test_what_is_passed_over_is_counted_by_kind(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.fromarray(photo(16, 20))
    save(tmp_path / "in" / "good.png")
    for name in ("a", "b"):
        transparent = picture.convert("RGBA")
        transparent.putalpha(100)
        transparent.save(tmp_path / "in" / f"{name}.png")
    picture.convert("CMYK").save(tmp_path / "in" / "print.jpg")
    Image.fromarray(photo(16, 20)[..., 0].astype("uint16")).save(tmp_path / "in" / "deep.png")
    (tmp_path / "in" / "._good.png").write_bytes(b"x")
    (tmp_path / "in" / os.fsdecode(b"\xe9.png")).write_bytes(b"x")
    with pytest.raises(PartialResultError, match="5 of 6 images were not restored") as caught:
        restore(f"{tmp_path}/in", f"{tmp_path}/out", model, CONFIG.model_copy(update={"format": "jpg"}))
    assert "2 transparent (a.png, b.png)" in str(caught.value)
    assert "repair" not in str(caught.value)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].split("(")[0].strip() for line in lines if line.startswith("not restored")] == [
        "1 cmyk",
        "1 sixteen_bit",
        "2 transparent",
        "1 unreadable",
    ]
    assert sum("add --convert" in line for line in lines) == 3
    assert any("1 hidden or system files left out" in line for line in lines)
    str(caught.value).encode()


def test_frames_share_one_noise_field_and_one_size(model: str, tmp_path: Path) -> None:
    """Equal frames give equal pictures, with the posterior's sample too (v2); a frame of another size is left out."""
    for name in ("0001.png", "0002.png"):
        save(tmp_path / "in" / name)
    Image.fromarray(photo(20, 20)).save(tmp_path / "in" / "0003.png")
    config = CONFIG.model_copy(update={"noise": "shared"})
    with pytest.raises(PartialResultError, match=r"1 of 3 .* 1 frame_size \(0003.png\)"):
        restore(f"{tmp_path}/in", f"{tmp_path}/shared", model, config)
    (tmp_path / "in" / "0003.png").unlink()
    restore(f"{tmp_path}/in", f"{tmp_path}/own", model, CONFIG)
    shared, own = written(tmp_path / "shared"), written(tmp_path / "own")
    assert shared["0001.png"] == shared["0002.png"]
    assert own["0001.png"] != own["0002.png"]


def test_from_s3_with_names_of_any_script(s3: str, model: str) -> None:
    upload_folder(Path(model), f"{s3}/model", last="ccsr.json")
    write_bytes(f"{s3}/in/夕/焼 け.png", encode_png(photo(16, 20)))
    assert restore(f"{s3}/in", f"{s3}/out", f"{s3}/model", CONFIG) == 1
    assert f"{s3}/out/夕/焼 け.png" in list_files(f"{s3}/out")


def test_a_file_that_another_program_made_is_not_taken_for_a_result(model: str, tmp_path: Path) -> None:
    save(tmp_path / "small.png", 1)
    (tmp_path / "large.png").write_bytes(b"another program's")
    with pytest.raises(ConfigError, match="there already"):
        restore(f"{tmp_path}/small.png", f"{tmp_path}/large.png", model, CONFIG)
    assert (tmp_path / "large.png").read_bytes() == b"another program's"
    assert not (tmp_path / "large.png.run.json").exists()
