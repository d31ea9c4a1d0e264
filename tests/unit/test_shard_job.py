"""A shard's making, without Ray: equal bytes each time, bad files set aside, and `verify` finds every change."""

import hashlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from photos import make_shard_set, photo, save_photos, shard_config
from PIL import Image

from degradation import apply
from evaluation.inputs import load_sets
from infra import ConfigError, DataError, PartialResultError, StorageError
from infra.config import result_part
from infra.files.publish import publish_if_absent, write_bytes
from infra.files.storage import exists, join, list_files, read_bytes
from infra.imaging.images import UnusableImageError, decode_image, encode_png
from infra.imaging.pictures import resized
from infra.seeding import noise_for
from infra.shards.manifest import Manifest, ShardRecord, committed, record_uri
from infra.shards.shard import image_of, read_sample
from pipelines.sets.verify import verify
from pipelines.sharding.config import LatentsConfig, ShardConfig
from pipelines.sharding.job import report_quarantine, write_shard
from pipelines.sharding.plan import plan_shards
from pipelines.sharding.recipe import resolve_degradation
from pipelines.sharding.reports.card import look_at
from pipelines.sharding.sample import crop_image
from pipelines.sharding.sources import SourceFile, list_sources
from tests.training_runs import train_config
from training.data.samples import SampleReader


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, [(70, 90), (64, 64), (99, 83)])
    return folder


def content(output: str) -> dict[str, bytes]:
    return {place.removeprefix(output).lstrip("/"): read_bytes(place) for place in list_files(output)}


@pytest.mark.parametrize(
    "changes",
    [
        {"degradation": "bicubic"},
        {"degradation": "ccsr", "crop": {"kind": "random", "size_px": 48, "num_per_image": 2}, "draws": 2},
        {"degradation": None, "crop": {"kind": "center", "size_px": 48}},
    ],
)
def test_the_same_config_makes_the_same_bytes_anywhere(photos: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    one = make_shard_set(shard_config(photos, tmp_path / "a", samples_per_shard=2, **changes))
    other = make_shard_set(shard_config(photos, tmp_path / "b" / "c", samples_per_shard=2, **changes))
    assert content(one.uri) == content(other.uri)
    assert verify(one.uri).dataset_id == other.dataset_id
    reseeded = make_shard_set(shard_config(photos, tmp_path / "d", samples_per_shard=2, seed=1, **changes))
    assert reseeded.dataset_id != one.dataset_id


def test_samples_do_not_depend_on_how_they_are_cut_into_shards(photos: Path, tmp_path: Path) -> None:
    sets = [
        make_shard_set(shard_config(photos, tmp_path / str(n), samples_per_shard=n, degradation="ccsr")) for n in (1, 7)
    ]
    members = [{entry.key: read_sample(s.uri, entry) for entry in s.entries} for s in sets]
    assert members[0] == members[1]
    assert [len(s.facts["shards"]) for s in sets] == [3, 1]


def test_a_samples_json_says_how_to_make_it_again(photos: Path, tmp_path: Path) -> None:
    crop = {"kind": "random", "size_px": 48, "num_per_image": 3}
    manifest = make_shard_set(shard_config(photos, tmp_path, degradation="ccsr", crop=crop))
    for entry in manifest.entries:
        members = read_sample(manifest.uri, entry)
        facts = json.loads(members["json"])
        source, name = facts["source"].split("/")
        assert source == "set"
        image = decode_image((photos / name).read_bytes(), where=name)
        at = facts["crop"]
        hr = image[at["y"] : at["y"] + at["height"], at["x"] : at["x"] + at["width"]]
        pair = apply(np.ascontiguousarray(hr), facts["degradation"])
        assert (decode_image(members["hr.png"], where="") == pair.hr).all()
        assert (decode_image(members["lr.png"], where="") == pair.lr).all()
        assert members["lr.png"] == encode_png(pair.lr)


def bad_files(folder: Path) -> None:
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes(encode_png(photo(64, 64))[:-300])
    Image.new("CMYK", (64, 64)).save(folder / "print.jpg")
    Image.fromarray(photo(16, 64)).save(folder / "small.png")
    for suffix in ("gif", "txt"):
        (folder / f"ignored.{suffix}").write_bytes(b"x")


def test_bad_files_are_set_aside_with_their_reasons(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64), (70, 80)])
    bad_files(tmp_path / "photos")
    config = shard_config(tmp_path / "photos", tmp_path / "out", degradation="bicubic", samples_per_shard=3)
    manifest = make_shard_set(config)
    reasons = {item["source"]: item["reason"] for item in manifest.facts["quarantined"]}
    assert reasons == {
        "empty.png": "empty",
        "text.jpg": "unreadable",
        "cut.png": "truncated",
        "print.jpg": "cmyk",
        "small.png": "too_small",
    }
    assert all(len(item["sha256"]) == 64 and item["message"] for item in manifest.facts["quarantined"])
    assert sorted(entry.key for entry in manifest.entries) == ["set-00-000-0", "set-01-000-0"]
    assert verify(manifest.uri).num_samples == 2
    with pytest.raises(PartialResultError, match="5 of 7 samples were quarantined") as caught:
        report_quarantine(config, manifest)
    assert str(caught.value).count("\n") == 2
    allowed = config.model_copy(update={"runtime": config.runtime.model_copy(update={"max_failed_fraction": 0.8})})
    report_quarantine(allowed, manifest)


def test_making_a_shard_again_is_quiet(photos: Path, tmp_path: Path) -> None:
    config = shard_config(photos, tmp_path / "out", degradation="bicubic")
    manifest = make_shard_set(config)
    before = content(manifest.uri)
    assert make_shard_set(config) == manifest
    assert content(manifest.uri) == before


def first_shard(config: ShardConfig) -> Any:
    return plan_shards(list_sources(config.sources), config)[0]


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return join(request.getfixturevalue("s3"), "set") if request.param == "s3" else str(tmp_path / "set")


def test_a_shard_published_before_a_crash_is_taken_over(photos: Path, output: str, tmp_path: Path) -> None:
    """A writer died between publishing the tar and committing its record."""
    reference = make_shard_set(shard_config(photos, tmp_path / "reference", degradation="bicubic"))
    tar = Path(reference.uri, "shards", "000000.tar")
    assert publish_if_absent(tar, join(output, "shards", "000000.tar"))
    manifest = make_shard_set(shard_config(photos, output, degradation="bicubic"))
    assert manifest.dataset_id == reference.dataset_id
    assert verify(output) == manifest


def test_another_shard_in_the_place_is_a_loud_error(photos: Path, output: str) -> None:
    config = shard_config(photos, output, degradation="bicubic")
    write_bytes(join(output, "shards", "000000.tar"), b"something else")
    with pytest.raises(DataError, match="another shard is already there"):
        write_shard(config, resolve_degradation(config), first_shard(config))
    assert read_bytes(join(output, "shards", "000000.tar")) == b"something else"
    assert committed(output) == []


def test_another_record_in_the_place_is_a_loud_error(photos: Path, tmp_path: Path) -> None:
    config = shard_config(photos, tmp_path / "out", degradation="bicubic")
    record = write_shard(config, resolve_degradation(config), first_shard(config))
    place = record_uri(config.output, 0)
    write_bytes(place, record.to_bytes().replace(b'"num_bytes": ', b'"num_bytes": 1'))
    with pytest.raises(DataError, match="different bytes for shard 0"):
        write_shard(config, resolve_degradation(config), first_shard(config))


def test_an_unreadable_source_loses_nothing_that_is_done(photos: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64), (64, 64)])
    config = shard_config(tmp_path / "photos", tmp_path / "out", degradation="bicubic", samples_per_shard=1)
    first, second = plan_shards(list_sources(config.sources), config)
    recipe = resolve_degradation(config)
    record = write_shard(config, recipe, first)
    (tmp_path / "photos" / "01.png").unlink()
    with pytest.raises(StorageError, match="no such file"):
        write_shard(config, recipe, second)
    assert committed(config.output) == [0]
    assert ShardRecord.read(record_uri(config.output, 0)) == record
    assert list(list_files(join(config.output, "shards"))) == [join(config.output, first.name)]


def test_verify_finds_every_change(photos: Path, output: str) -> None:
    manifest = make_shard_set(shard_config(photos, output, degradation="bicubic", samples_per_shard=1))
    assert verify(output) == manifest
    names = [shard["shard"] for shard in manifest.facts["shards"]]
    original = read_bytes(join(output, names[1]))
    flipped = bytearray(original)
    flipped[len(flipped) // 2] ^= 1
    write_bytes(join(output, names[1]), bytes(flipped))
    with pytest.raises(DataError, match=f"^1 faults: {names[1]} has changed\n"):
        verify(output)
    write_bytes(join(output, names[1]), original)
    for stray in ("notes.txt", "shards/000009.tar", "shards/.000000.tar.0a.tmp", "records/000003.json"):
        write_bytes(join(output, stray), b"x")
    with pytest.raises(DataError, match=r"^4 faults: .*notes.txt does not belong.*shards/000009.tar does not belong"):
        verify(output)


def test_verify_finds_a_missing_shard_a_damaged_index_and_a_changed_list(photos: Path, tmp_path: Path) -> None:
    manifest = make_shard_set(shard_config(photos, tmp_path / "set", degradation="bicubic", samples_per_shard=1))
    place = Path(manifest.uri)
    shard = place / manifest.facts["shards"][2]["shard"]
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match=r"000002\.tar is missing"):
        verify(manifest.uri)
    shard.write_bytes(data)
    assert verify(manifest.uri) == manifest
    facts = json.loads((place / "manifest.json").read_text())
    facts["shards"] = facts["shards"][:2]
    (place / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="dataset id"):
        verify(manifest.uri)
    (place / "manifest.json").write_text(json.dumps(manifest.facts))
    (place / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="byte index"):
        verify(manifest.uri)


def test_verify_takes_a_path_in_any_writing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shard_set(shard_config(photos, tmp_path / "set", degradation="bicubic"))
    monkeypatch.chdir(tmp_path)
    for uri in ("set", "./set", "set/", f"{tmp_path}/set/"):
        assert verify(uri).num_samples == 3


def test_sets_on_s3_and_on_disk_are_equal(photos: Path, tmp_path: Path, s3: str) -> None:
    for file in photos.iterdir():
        write_bytes(join(s3, "photos", file.name), file.read_bytes())
    local = make_shard_set(shard_config(photos, tmp_path / "set", degradation="ccsr", samples_per_shard=2))
    remote = make_shard_set(shard_config(f"{s3}/photos", f"{s3}/set", degradation="ccsr", samples_per_shard=2))
    assert content(local.uri) == content(remote.uri)
    assert Manifest.load(f"{s3}/set/").dataset_id == local.dataset_id
    assert exists(join(s3, "set", "manifest.json"))


def crop(image: np.ndarray, scale: int = 4, seed: int = 0, **kind: Any) -> tuple[np.ndarray, dict[str, Any]]:
    file = SourceFile("key", "set", "x.png", "x.png", 1)
    config = shard_config("photos", "out", crop=kind, seed=seed)
    return crop_image(image, plan_shards([file], config)[0].samples[0], config, scale=scale)


def test_a_whole_image_loses_only_what_the_scale_cannot_divide() -> None:
    image = photo(67, 90)
    window, facts = crop(image, kind="whole")
    assert (window == image[:64, :88]).all()
    assert facts == {"kind": "whole", "x": 0, "y": 0, "width": 88, "height": 64}
    assert (crop(image, scale=1, kind="whole")[0] == image).all()


def test_a_center_crop_is_halved_shrunk_and_cut() -> None:
    image = photo(200, 300)
    window, _ = crop(image, kind="center", size_px=48)
    assert window.shape == (48, 48, 3)
    # Two halvings by box to 50 x 75, then bicubic to 48 x 72, then the middle 48 columns.
    expected = Image.fromarray(image)
    for size in ((150, 100), (75, 50)):
        expected = expected.resize(size, Image.Resampling.BOX)
    expected = expected.resize((72, 48), Image.Resampling.BICUBIC)
    assert (window == np.asarray(expected)[:, 12:60]).all()


def test_random_crops_lie_inside_and_depend_on_the_seed() -> None:
    image = photo(64, 80)
    places = set()
    for seed in range(30):
        window, facts = crop(image, kind="random", size_px=60, seed=seed)
        assert (window == image[facts["y"] : facts["y"] + 60, facts["x"] : facts["x"] + 60]).all()
        places.add((facts["y"], facts["x"]))
    assert len(places) > 15
    assert {y for y, _ in places} <= set(range(5))
    assert {x for _, x in places} <= set(range(21))


@pytest.mark.parametrize("kind", [{"kind": "random", "size_px": 64}, {"kind": "whole"}, {"kind": "center"}])
def test_too_small_an_image_is_refused(kind: dict[str, Any]) -> None:
    image = photo(63 if kind["kind"] == "random" else 31, 100)
    if kind["kind"] == "center":  # it is enlarged: a centre crop has its size whatever the image's
        assert crop(image, **kind)[0].shape == (512, 512, 3)
        return
    with pytest.raises(UnusableImageError) as caught:
        crop(image, **kind)
    assert caught.value.reason == "too_small"


def test_a_crop_that_the_degradation_cannot_take_is_told_before_the_start() -> None:
    config = shard_config("photos", "out", degradation="ccsr", crop={"kind": "random", "size_px": 66})
    with pytest.raises(ConfigError, match="no multiple of the degradation's scale, 4") as caught:
        resolve_degradation(config)
    assert "64" in caught.value.todo
    with pytest.raises(ConfigError, match="no degradation preset 'ccrs'"):
        resolve_degradation(shard_config("photos", "out", degradation="ccrs"))


def test_a_grid_is_basicsrs_and_skips_no_pixel(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(100, 130), (40, 90)])
    grid = {"kind": "grid", "size_px": 48, "step_px": 24}
    manifest = make_shard_set(
        shard_config(tmp_path / "photos", tmp_path / "out", crop=grid, draws=2, degradation="ccsr")
    )
    image = photo(100, 130)
    found = []
    for entry in manifest.entries:
        members = read_sample(manifest.uri, entry)
        at = json.loads(members["json"])["crop"]
        found.append((entry.key, at["y"], at["x"]))
        window = image[at["y"] : at["y"] + 48, at["x"] : at["x"] + 48]
        assert (decode_image(members["hr.png"], where="") == window).all()
    places = [(y, x) for y in (0, 24, 48, 52) for x in (0, 24, 48, 72, 82)]
    assert found == [(f"set-00-{n:03d}-{draw}", *at) for n, at in enumerate(places) for draw in (0, 1)]
    # 40 px have no room for a window: each of its samples is set aside.
    assert {(item["source"], item["reason"]) for item in manifest.facts["quarantined"]} == {("01.png", "too_small")}
    wide = {**grid, "rest_px": 10}
    fewer = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "b", crop=wide, degradation=None))
    rows = {json.loads(read_sample(fewer.uri, entry)["json"])["crop"]["y"] for entry in fewer.entries}
    assert rows == {0, 24, 48}  # only 4 px are left below


def test_several_sizes_of_an_image(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(120, 90)])
    changes: dict[str, Any] = {"scales": [1, 0.75, 0.5], "short_side_px": 60, "degradation": None}
    made = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "out", **changes))
    members = [read_sample(made.uri, entry) for entry in made.entries]
    sizes = [decode_image(one["hr.png"], where="").shape[:2] for one in members]
    assert sizes == [(120, 90), (90, 67), (60, 45), (80, 60)]
    half = np.asarray(Image.fromarray(photo(120, 90)).resize((45, 60), Image.Resampling.LANCZOS))
    assert (decode_image(members[2]["hr.png"], where="") == half).all()
    assert [json.loads(one["json"])["crop"].get("resized") for one in members] == [None, [67, 90], [45, 60], [60, 80]]
    crop = {"kind": "random", "size_px": 64, "num_per_image": 2}
    cut = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "cut", **changes, crop=crop))
    assert [entry.key for entry in cut.entries] == [f"set-00-00{number}-0" for number in (0, 1, 2, 3)]
    assert cut.facts["dropped"] == {"too_small": 4}  # the two smaller sizes have no room
    assert cut.facts["quarantined"] == []


def test_flat_windows_are_dropped_and_counted(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 128), (64, 64)])
    sky = np.full((64, 128, 3), 200, np.uint8)
    sky[:, 64:] = photo(64, 64)
    (tmp_path / "photos" / "00.png").write_bytes(encode_png(sky))
    grid = {"kind": "grid", "size_px": 64, "step_px": 64}
    config = shard_config(
        tmp_path / "photos", tmp_path / "out", crop=grid, min_gradient_energy=4, degradation="bicubic"
    )
    manifest = make_shard_set(config)
    assert [entry.key for entry in manifest.entries] == ["set-00-001-0", "set-01-000-0"]
    assert manifest.facts["dropped"] == {"flat": 1}
    assert verify(manifest.uri) == manifest
    report_quarantine(config, manifest)  # no error


def encoded(image: np.ndarray, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_png_or_jpeg_that_is_taken_whole_keeps_its_bytes(tmp_path: Path) -> None:
    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 6, 1
    image = photo(64, 96)
    sources = {
        "plain.png": encoded(image, compress_level=9),
        "grey.png": encoded(image, mode="L"),
        "alpha.png": encoded(image, mode="RGBA"),
        "turned.png": encoded(image, exif=turned),
        "tail.png": encoded(image) + b"more",
        "odd.png": encoded(photo(66, 96)),
        "jplain.jpg": encoded(image, "JPEG"),
        "jupright.jpg": encoded(image, "JPEG", exif=upright, progressive=True),
        "jgrey.jpg": encoded(image, "JPEG", mode="L"),
        "jturned.jpg": encoded(image, "JPEG", exif=turned),
        "jtail.jpg": encoded(image, "JPEG") + b"more",
        "jodd.jpg": encoded(photo(66, 96), "JPEG"),
        "jframes.jpg": encoded(image, "MPO", save_all=True, append_images=[Image.fromarray(image)]),
    }
    (tmp_path / "photos").mkdir()
    for name, data in sources.items():
        (tmp_path / "photos" / name).write_bytes(data)
    kept = {}
    for preset in ("bicubic", "stablesr"):  # StableSR's preset sharpens HR
        made = make_shard_set(shard_config(tmp_path / "photos", tmp_path / preset, degradation=preset))
        assert verify(made.uri) == made
        stored = {entry.key.split("-")[1]: read_sample(made.uri, entry) for entry in made.entries}
        assert stored.keys() == {name[:-4] for name in sources}
        kept[preset] = {name for name, data in sources.items() if image_of(stored[name[:-4]]) == data}
        for name, members in stored.items():
            hr, facts = decode_image(image_of(members), where=name), json.loads(members["json"])
            assert ("hr.jpg" in members) == (f"{name}.jpg" in kept[preset])
            if "hr.jpg" in members:
                assert facts["hr_pixels_sha256"] == hashlib.sha256(hr.tobytes()).hexdigest()
                original = decode_image(sources[f"{name}.jpg"], where=name)
                assert np.array_equal(hr, original)
    assert kept == {"bicubic": {"plain.png", "jplain.jpg", "jupright.jpg"}, "stablesr": set()}


def test_sixteen_bits_are_converted_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    deep = cv2.imencode(".png", photo(64, 96).astype(np.uint16) * 257)[1].tobytes()
    (tmp_path / "photos" / "deep.png").write_bytes(deep)
    (tmp_path / "photos" / "plain.png").write_bytes(encode_png(photo(64, 96)))
    refused, converted = (
        make_shard_set(shard_config(tmp_path / "photos", tmp_path / name, degradation=None, sixteen_bit=name))
        for name in ("quarantine", "convert")
    )
    assert [item["reason"] for item in refused.facts["quarantined"]] == ["sixteen_bit"]
    assert converted.num_samples == 2
    hr = decode_image(read_sample(converted.uri, converted.entries[0])["hr.png"], where="")
    assert np.array_equal(hr[..., ::-1], photo(64, 96))  # OpenCV writes BGR
    parts = [result_part(shard_config("p", "o", sixteen_bit=name)) for name in ("quarantine", "convert")]
    assert "sixteen_bit" not in parts[0], "a set that an earlier version began is resumed"
    assert parts[1] == {**parts[0], "sixteen_bit": "convert"}


def test_every_reader_takes_whole_jpegs(tmp_path: Path) -> None:
    """Training, evaluation, another sharding, the card; an LR image too."""
    hr = photo(64, 96)
    for folder, image in (("hr", hr), ("lr", resized(hr, (16, 24)))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(encoded(image, "JPEG", quality=95))
    pairs = {"kind": "pairs", "name": "p", "hr": str(tmp_path / "hr"), "lr": str(tmp_path / "lr")}
    values = {"job": "shard", "output": str(tmp_path / "set"), "sources": [pairs], "degradation": None}
    made = make_shard_set(ShardConfig.model_validate(values))
    assert set(read_sample(made.uri, made.entries[0])) == {"hr.jpg", "lr.jpg", "json"}
    expected = [decode_image((tmp_path / side / "a.jpg").read_bytes(), where="") for side in ("hr", "lr")]
    sample = SampleReader([made], train_config(made.uri, "o", num_updates=1))(0)
    assert sample.hr.shape == (32, 32, 3)
    (one,) = load_sets([made.uri]).images
    lr, read, _ = one.read()
    assert np.array_equal(read, expected[0])
    assert np.array_equal(lr, expected[1])
    again = {"kind": "shards", "name": "again", "path": made.uri}
    values |= {"output": str(tmp_path / "again"), "sources": [again]}
    other = make_shard_set(ShardConfig.model_validate(values))
    assert image_of(read_sample(other.uri, other.entries[0])) == (tmp_path / "hr" / "a.jpg").read_bytes()
    card = look_at(made.uri, made.entries[0])
    assert (card.height, card.width) == (64, 96)


def test_other_programs_read_a_shard(photos: Path, tmp_path: Path) -> None:
    import webdataset

    made = make_shard_set(shard_config(photos, tmp_path / "out", degradation="bicubic"))
    tar = f"{made.uri}/shards/000000.tar"
    names = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    members = ("hr.png", "lr.png", "json")
    assert names == [f"{entry.key}.{member}" for entry in made.entries for member in members]
    rows = list(webdataset.WebDataset(tar, shardshuffle=False).decode("rgb8"))
    assert [row["__key__"] for row in rows] == [entry.key for entry in made.entries]
    for row, entry in zip(rows, made.entries, strict=True):
        assert (row["hr.png"] == decode_image(read_sample(made.uri, entry)["hr.png"], where="")).all()
        assert row["json"]["degradation"]["clean"] is False


def test_stored_latents_are_the_models_own(photos: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.numpy import load

    from pipelines.sharding.job import latent_encoder
    from training.config import ModelConfig
    from training.data.batches import enlarge
    from training.models import build_model, save_model

    model = build_model(ModelConfig(family="v2"), 0)
    save_model(model, tmp_path / "model")
    latents = {"model": str(tmp_path / "model"), "batch_size": 2}
    crop = {"kind": "random", "size_px": 64}
    config = shard_config(photos, tmp_path / "out", degradation="bicubic", crop=crop, latents=latents)
    encoder, recipe = latent_encoder(config), resolve_degradation(config)
    assert encoder is not None
    assert encoder.encoder_id == model.encoder_id()
    record = write_shard(config, recipe, first_shard(config), encoder)
    assert write_shard(config, recipe, first_shard(config), encoder) == record
    assert len(record.entries) == 3
    for entry in record.entries:
        members = read_sample(config.output, entry)
        assert list(members) == ["hr.png", "lr.png", "latent.safetensors", "json"]
        stored = load(members["latent.safetensors"])
        names = ["hr.mean", "hr.std", "lr.mean", "lr.std"]
        assert sorted(stored) == names
        assert {(array.dtype, array.shape) for array in stored.values()} == {(np.dtype(np.float16), (4, 16, 16))}
        hr, lr = (decode_image(members[name], where="") for name in ("hr.png", "lr.png"))
        for name, image, encode in (
            ("hr", hr, model.encode_moments),
            ("lr", enlarge(lr, 64, 64), model.encode_condition),
        ):
            with torch.inference_mode():
                mean, std = encode(torch.tensor(image).permute(2, 0, 1)[None].float() / 255)
            np.testing.assert_allclose(stored[f"{name}.mean"], mean[0].numpy(), atol=2e-3, rtol=2e-3)
            np.testing.assert_allclose(stored[f"{name}.std"], std[0].numpy(), atol=2e-3, rtol=2e-3)
    with pytest.raises(ConfigError, match="latents need a crop of one size"):
        resolve_degradation(shard_config(photos, "out", degradation="ccsr", latents=latents))
    with pytest.raises(ConfigError, match="this model is of family v2"):
        latent_encoder(config.model_copy(update={"latents": LatentsConfig(**latents, sampled_steps=2)}))


def test_samples_of_a_stablesr_model_are_its_restorations_latents(photos: Path, tmp_path: Path) -> None:
    """The stored sample, decoded, is what the same chain and noise give a restoration of the LR."""
    import torch
    from safetensors.numpy import load

    from pipelines.sharding.job import latent_encoder
    from training.config import ModelConfig, SamplingConfig
    from training.data.samples import SAMPLED
    from training.models import build_model, save_model
    from training.restore.seeded_runs import sample_latents

    model = build_model(ModelConfig(family="stablesr"), 0)
    save_model(model, tmp_path / "model")
    latents = {"model": str(tmp_path / "model"), "batch_size": 2, "sampled_steps": 3}
    crop = {"kind": "random", "size_px": 64}
    config = shard_config(photos, tmp_path / "out", degradation="stablesr", crop=crop, latents=latents, seed=5)
    encoder, recipe = latent_encoder(config), resolve_degradation(config)
    record = write_shard(config, recipe, first_shard(config), encoder)
    assert write_shard(config, recipe, first_shard(config), encoder) == record
    sampling = SamplingConfig(num_steps=3, start="lr")
    for entry in record.entries:
        stored = load(read_sample(config.output, entry)["latent.safetensors"])
        mean, std = (torch.tensor(stored[f"lr.{name}"]).float()[None] for name in ("mean", "std"))
        with torch.inference_mode():
            noise = noise_for(5, [("latent", entry.key)], "cpu", torch.float32)
            expected = sample_latents(model, mean, std, sampling, noise)[0]
        assert stored[SAMPLED].dtype == np.float16
        error = np.abs(stored[SAMPLED] - expected.numpy()).max()
        assert error < 0.02 * expected.abs().max()  # the chain starts from moments that were rounded to float16
        assert np.abs(stored[SAMPLED] - mean[0].numpy()).max() > 0.2 * expected.abs().max()
