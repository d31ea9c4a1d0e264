"""Sources: datasets with their counts, zips, patterns, pairs and shard sets, on disk and on S3."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import make_shard_set, photo, save_photos, shard_config

from degradation import degrade, load_preset
from infra import ConfigError, DataError, rng_for
from infra.files.publish import write_bytes
from infra.files.storage import join
from infra.imaging.images import UnusableImageError, decode_image, encode_png
from infra.imaging.pictures import resized
from infra.shards.shard import read_sample
from pipelines.sets.verify import verify
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.files import FileList
from pipelines.sharding.inputs.pairs import check_pair
from pipelines.sharding.plan import source_id
from pipelines.sharding.recipe import resolve_degradation
from pipelines.sharding.sources import SourceFile, list_sources, source_facts


def config_of(*sources: dict[str, Any], output: Path | str = "out", **changes: Any) -> ShardConfig:
    return ShardConfig.model_validate({"job": "shard", "output": str(output), "sources": list(sources), **changes})


def listed(**source: Any) -> list[SourceFile]:
    return list_sources(config_of({"kind": "folder", "name": "s", **source}).sources)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


DATASETS = {
    "DIV2K_train": (["DIV2K_train_HR/0001.png", "0800.png"], ["0801.png", "DIV2K_train_LR_bicubic/X4/0001x4.png"]),
    "DIV2K_valid": (["DIV2K_valid_HR/0801.png", "0900.png"], ["0800.png", "0901.png", "X2/0801x2.png"]),
    "Flickr2K": (["Flickr2K_HR/000001.png"], ["Flickr2K_LR_bicubic/X4/000001x4.png", "0001.png"]),
    "DIV8K": (["train/0001.png"], ["00001.png"]),
    "OST": (["animal/a.png", "OutdoorSceneTrain_v2/sky/b.jpg"], ["other/c.png", "animal/sub/d.png"]),
    "FFHQ": (["images1024x1024/00000/00000.png", "69000/69999.png"], ["thumbnails/1.png"]),
    "LSDIR": (["HR/train/0001000/0000001.png"], ["X4/train/0001000/0000001x4.png"]),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_dataset_is_found_as_it_is_distributed_and_counted(dataset: str, tmp_path: Path) -> None:
    its, others = DATASETS[dataset]
    put(tmp_path, *its, *others)
    with pytest.raises(DataError, match=rf"has {len(its)} files, \d+ are expected") as caught:
        listed(path=str(tmp_path), dataset=dataset)
    assert f"expected_files: {len(its)}" in caught.value.todo
    files = listed(path=str(tmp_path), dataset=dataset, expected_files=len(its))
    assert sorted(file.name for file in files) == sorted(its)
    config = config_of({"kind": "folder", "name": "s", "path": "x", "dataset": dataset, "expected_files": 9})
    (facts,) = source_facts(config.sources, files)
    assert facts["licence"]
    assert (facts["dataset"], facts["num_files"], facts["expected_files"]) == (dataset, len(its), 9)


def test_the_expected_counts_are_the_published_ones(tmp_path: Path) -> None:
    counts = {"DIV2K_train": 800, "DIV2K_valid": 100, "Flickr2K": 2650, "DIV8K": 1500, "OST": 10324}
    for dataset, count in {**counts, "FFHQ": 70000, "LSDIR": 84991}.items():
        config = config_of({"kind": "folder", "name": "s", "path": "x", "dataset": dataset})
        assert source_facts(config.sources, FileList([]))[0]["expected_files"] == count
    put(tmp_path, *(f"{number:04d}.png" for number in range(1, 901)))
    assert [file.name for file in listed(path=str(tmp_path), dataset="DIV2K_train")][::799] == ["0001.png", "0800.png"]
    assert len(listed(path=str(tmp_path), dataset="DIV2K_valid")) == 100
    with pytest.raises(ConfigError, match="no dataset 'DIV3K'"):
        listed(path=str(tmp_path), dataset="DIV3K")


def test_the_first_files_in_order_are_taken_after_the_count(tmp_path: Path) -> None:
    put(tmp_path, *(f"{number:05d}.png" for number in (3, 1, 2, 0)))
    source = {"path": str(tmp_path), "dataset": "FFHQ", "first": 2}
    assert [file.name for file in listed(**source, expected_files=4)] == ["00000.png", "00001.png"]
    with pytest.raises(DataError, match="has 4 files, 70000 are expected"):
        listed(**source)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_patterns_choose_files(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    names = ["a/HR/1.png", "a/LR/1.png", "b/HR/2.png", "b/HR/deep/3.png", "b/HR/4.txt"]
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    for name in names:
        write_bytes(join(root, name), b"x")
    found = {
        pattern: [file.name for file in listed(path=f"{root}/{pattern}")]
        for pattern in ("*/HR/*.png", "**/*.png", "b/HR/**", "?/LR/?.png")
    }
    assert found == {
        "*/HR/*.png": ["a/HR/1.png", "b/HR/2.png"],
        "**/*.png": ["a/HR/1.png", "a/LR/1.png", "b/HR/2.png", "b/HR/deep/3.png"],
        "b/HR/**": ["2.png", "deep/3.png"],
        "?/LR/?.png": ["a/LR/1.png"],
    }
    with pytest.raises(DataError, match="no images here"):
        listed(path=f"{root}/*/XX/*.png")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_zip_gives_the_set_that_its_folder_gives(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(70, 90), (64, 64)])
    images = {path.name: path.read_bytes() for path in sorted((tmp_path / "photos").iterdir())}
    members = {f"DIV/HR/{name}": data for name, data in images.items()}
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    write_bytes(f"{root}/set.zip", zipped(**members, **{"DIV/readme.txt": b"x", "__MACOSX/DIV/HR/._00.png": b"x"}))
    crop = {"kind": "random", "size_px": 48, "num_per_image": 2}
    reference = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "a", crop=crop))
    for number, path in enumerate(("set.zip!DIV/HR", "set.zip!DIV/HR/*.png", "set.zip!/DIV/HR/")):
        made = make_shard_set(shard_config(f"{root}/{path}", tmp_path / str(number), crop=crop))
        assert made.dataset_id == reference.dataset_id
    (first, _) = listed(path=f"{root}/set.zip")
    assert (first.name, first.uri) == ("DIV/HR/00.png", f"{root}/set.zip!DIV/HR/00.png")


def test_a_changed_zip_is_another_source_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64), (64, 68)])
    one, other = (path.read_bytes() for path in sorted((tmp_path / "photos").iterdir()))
    place = tmp_path / "set.zip"
    place.write_bytes(zipped(**{"a.png": one, "b.png": one}))
    before = source_id(listed(path=str(place)))
    (tmp_path / "new.zip").write_bytes(zipped(**{"a.png": one, "b.png": other}))
    assert source_id(listed(path=str(tmp_path / "new.zip"))) != before
    data = bytearray(place.read_bytes())
    data[len(one) // 2] ^= 255
    (tmp_path / "bad.zip").write_bytes(data)
    manifest = make_shard_set(shard_config(tmp_path / "bad.zip", tmp_path / "out", degradation="bicubic"))
    assert [(item["source"], item["reason"]) for item in manifest.facts["quarantined"]] == [("a.png", "truncated")]
    assert manifest.num_samples == 1
    (tmp_path / "text.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="zip is damaged"):
        listed(path=str(tmp_path / "text.zip"))


def test_a_zip_bomb_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sharding.inputs.zips.MAX_MEMBER_BYTES", 1 << 20)
    good = encode_png(photo(64, 64))
    (tmp_path / "set.zip").write_bytes(zipped(**{"good.png": good, "bomb.png": bytes(1 << 21)}))
    manifest = make_shard_set(shard_config(tmp_path / "set.zip", tmp_path / "out", degradation="bicubic"))
    assert [(item["source"], item["reason"]) for item in manifest.facts["quarantined"]] == [("bomb.png", "too_large")]


def test_members_with_paths_outside_are_only_names(tmp_path: Path) -> None:
    good = encode_png(photo(64, 64))
    (tmp_path / "in" / "set").mkdir(parents=True)
    (tmp_path / "in" / "set.zip").write_bytes(zipped(**{"../../evil.png": good, "/abs.png": good}))
    manifest = make_shard_set(shard_config(tmp_path / "in" / "set.zip", tmp_path / "out", degradation="bicubic"))
    assert {entry.key for entry in manifest.entries} == {"set-evil-000-0", "set-abs-000-0"}
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == []


def save_pairs(folder: Path, count: int = 3, scale: int = 4, size: int = 96) -> list[np.ndarray]:
    images = [photo(size, size + 32, seed=number) for number in range(count)]
    for number, hr in enumerate(images):
        lr = degrade(hr, load_preset("bicubic"), rng_for(0, number)).lr
        for name, image in ((f"HR/{number}_HR.png", hr), (f"LR/{number}_LR4.png", lr)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(encode_png(image))
    return images


def pairs_config(folder: Path, output: Path | str = "out", **changes: Any) -> ShardConfig:
    source = {"kind": "pairs", "name": "real", "hr": f"{folder}/HR", "lr": f"{folder}/LR"}
    return config_of(source, output=output, **{"degradation": None, **changes})


def test_found_pairs_keep_their_bytes_and_their_place(tmp_path: Path) -> None:
    images = save_pairs(tmp_path)
    whole = make_shard_set(pairs_config(tmp_path, tmp_path / "whole"))
    assert (whole.facts["scale"], whole.facts["has_lr"]) == (4, True)
    for number, entry in enumerate(whole.entries):
        members = read_sample(whole.uri, entry)
        assert members["hr.png"] == (tmp_path / f"HR/{number}_HR.png").read_bytes()
        assert members["lr.png"] == (tmp_path / f"LR/{number}_LR4.png").read_bytes()
        assert json.loads(members["json"])["degradation"] == {"clean": False}
    crops = [
        {"kind": "random", "size_px": 48, "num_per_image": 4},
        {"kind": "grid", "size_px": 48, "step_px": 20},
    ]
    for crop in crops:
        made = make_shard_set(pairs_config(tmp_path, tmp_path / crop["kind"], crop=crop))
        places = set()
        for entry in made.entries:
            members = read_sample(made.uri, entry)
            at = json.loads(members["json"])["crop"]
            y, x = at["y"], at["x"]
            places.add((y, x))
            number = int(entry.key.split("-")[1].split("_")[0])
            assert (decode_image(members["hr.png"], where="") == images[number][y : y + 48, x : x + 48]).all()
            lr = decode_image((tmp_path / f"LR/{number}_LR4.png").read_bytes(), where="")
            window = lr[y // 4 : y // 4 + 12, x // 4 : x // 4 + 12]
            assert (decode_image(members["lr.png"], where="") == window).all()
        assert len(places) > 5
        assert all(y % 4 == x % 4 == 0 for y, x in places)
    (tmp_path / "LR/0_LR4.png").write_bytes(encode_png(photo(24, 32)) + b" ")
    changed = list_sources(pairs_config(tmp_path).sources)
    assert source_id(changed) != whole.facts["source_id"]


def test_an_image_without_its_partner_is_named_before_the_start(tmp_path: Path) -> None:
    save_pairs(tmp_path)
    (tmp_path / "LR/1_LR4.png").unlink()
    put(tmp_path, "LR/extra_LR4.png")
    with pytest.raises(DataError, match="1 HR images have no LR: 1; 1 LR images have no HR: extra"):
        list_sources(pairs_config(tmp_path).sources)
    put(tmp_path, "LR/2x4.png")
    with pytest.raises(DataError, match="two files are the image 2"):
        list_sources(pairs_config(tmp_path).sources)


def test_pairs_that_do_not_fit_are_set_aside(tmp_path: Path) -> None:
    images = save_pairs(tmp_path, count=4)
    small = decode_image((tmp_path / "LR/0_LR4.png").read_bytes(), where="")
    (tmp_path / "LR/0_LR4.png").write_bytes(encode_png(small[:-1]))
    (tmp_path / "LR/1_LR4.png").write_bytes((tmp_path / "LR/3_LR4.png").read_bytes())
    shifted = np.roll(images[2], (12, 0), (0, 1))
    (tmp_path / "LR/2_LR4.png").write_bytes(encode_png(resized(shifted, (24, 32))))
    manifest = make_shard_set(pairs_config(tmp_path, tmp_path / "out"))
    reasons = {item["source"]: item["reason"] for item in manifest.facts["quarantined"]}
    assert reasons == {"0_HR.png": "pair_size", "1_HR.png": "pair_misaligned", "2_HR.png": "pair_misaligned"}
    assert all(len(item["sha256"]) == 64 for item in manifest.facts["quarantined"])
    assert manifest.num_samples == 1


@pytest.mark.parametrize("shift", [0, 3])
def test_a_shift_is_seen_through_a_strong_degradation(shift: int) -> None:
    from skimage import data

    hr = data.astronaut()
    for number in range(4):
        lr = degrade(hr, load_preset("ccsr"), rng_for(number, "aligned")).lr
        if shift:
            with pytest.raises(UnusableImageError) as caught:
                check_pair(hr, np.roll(lr, shift, 0), 4, where="x")
            assert caught.value.reason == "pair_misaligned"
        else:
            check_pair(hr, lr, 4, where="x")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"degradation": "ccsr"}, "degradation"),
        ({"crop": {"kind": "center", "size_px": 64}}, "crop"),
        ({"scales": [1, 0.5]}, "crop"),
        ({"crop": {"kind": "random", "size_px": 66}}, "crop.size_px"),
        ({"crop": {"kind": "grid", "size_px": 64, "step_px": 30}}, "crop.step_px"),
        ({"latents": {"model": "m"}}, "latents"),
    ],
)
def test_what_pairs_cannot_take_is_told_before_the_start(changes: dict[str, Any], where: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_degradation(pairs_config(tmp_path, **changes))
    assert caught.value.where == where


def test_a_shard_set_is_a_source(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(70, 90), (64, 64)])
    first = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "one", degradation=None))
    source = {"kind": "shards", "name": "again", "path": str(tmp_path / "one")}
    again = make_shard_set(config_of(source, output=tmp_path / "two", degradation="ccsr", draws=2))
    assert again.num_samples == 4
    assert verify(again.uri) == again
    for entry, original in zip(again.entries[::2], first.entries, strict=True):
        mine, its = read_sample(again.uri, entry), read_sample(first.uri, original)
        # 70 x 90 is no multiple of the scale; 64 x 64 is taken whole, and its bytes stay.
        assert (mine["hr.png"] == its["hr.png"]) == ("01" in original.key)
        assert json.loads(mine["json"])["source_sha256"] == json.loads(its["json"])["source_sha256"]
        assert json.loads(mine["json"])["source"] == f"again/{original.key}"
    files = list_sources(config_of(source).sources)
    reseeded = make_shard_set(
        shard_config(tmp_path / "photos", tmp_path / "three", crop={"kind": "random", "size_px": 64}, degradation=None)
    )
    other = list_sources(config_of({**source, "path": reseeded.uri}).sources)
    assert [file.name for file in files] == [file.name for file in other]
    assert source_id(files) != source_id(other)
