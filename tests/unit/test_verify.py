"""`ccsr verify`: each kind of fault is found, strays are named, and only our own leftovers are removed."""

import dataclasses
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from photos import make_shard_set, save_photos, shard_config

from infra import DataError
from infra.files.publish import write_bytes
from infra.files.storage import join, list_files, read_bytes, s3_filesystem, sha256_file
from infra.imaging.images import encode_png
from infra.shards.manifest import Manifest, ShardRecord, dataset_id_of, record_uri, write_manifest
from infra.shards.shard import read_index
from pipelines.sets.clean import clean, print_cleaned
from pipelines.sets.verify import find_duplicates, print_duplicates, verify
from pipelines.sharding.job import write_shard
from pipelines.sharding.plan import plan_shards
from pipelines.sharding.recipe import resolve_degradation
from pipelines.sharding.screening.filters import print_stats
from pipelines.sharding.sources import list_sources


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, [(64, 64), (70, 90), (99, 83)])
    return folder


@pytest.fixture
def made(photos: Path, tmp_path: Path) -> Manifest:
    """Two shards; one sample of the three was quarantined."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for place in photos.iterdir():
        (folder / place.name).write_bytes(place.read_bytes())
    (folder / "02.png").write_bytes(b"")
    return make_shard_set(shard_config(folder, tmp_path / "set", degradation="bicubic", samples_per_shard=2))


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return join(request.getfixturevalue("s3"), "set") if request.param == "s3" else str(tmp_path / "set")


def rewrite(manifest: Manifest, change: Callable[[dict], None]) -> None:
    """Change manifest.json so that its dataset id is right again."""
    facts = json.loads(json.dumps(manifest.facts))
    change(facts)
    facts["dataset_id"] = dataset_id_of(facts["shards"])
    write_bytes(join(manifest.uri, "manifest.json"), json.dumps(facts).encode())


def rewrite_record(manifest: Manifest, **changes: object) -> None:
    place = record_uri(manifest.uri, 0)
    write_bytes(place, dataclasses.replace(ShardRecord.read(place), **changes).to_bytes())  # type: ignore[arg-type]


def test_a_tar_with_other_members_than_the_index_says(made: Manifest) -> None:
    """Hashes alone would not tell: they agree with one another."""
    place = Path(made.uri, "shards", "000000.tar")
    swapped = place.with_name("swapped.tar")
    with tarfile.open(place) as old, tarfile.open(swapped, "w", format=tarfile.USTAR_FORMAT) as new:
        members = old.getmembers()
        for member in members[3:] + members[:3]:
            new.addfile(member, old.extractfile(member))
    assert [e.key for e in read_index(swapped, "")] == [e.key for e in reversed(made.entries)]
    swapped.replace(place)
    digest, size = sha256_file(place), place.stat().st_size

    def change(facts: dict) -> None:
        facts["shards"][0].update(sha256=digest, num_bytes=size)

    rewrite(made, change)
    rewrite_record(made, sha256=digest, num_bytes=size)
    with pytest.raises(DataError, match=r"^1 faults: shards/000000.tar holds other samples, or in other places"):
        verify(made.uri)


def test_a_records_disagreement_is_found(made: Manifest) -> None:
    record = ShardRecord.read(record_uri(made.uri, 0))
    first = dataclasses.replace(record.entries[0], phash=1)
    for changes in ({"num_bytes": 1}, {"sha256": "0" * 64}, {"entries": [first, *record.entries[1:]]}):
        rewrite_record(made, **changes)
        with pytest.raises(DataError, match=r"^1 faults: records/000000.json disagrees with manifest or index"):
            verify(made.uri)
        write_bytes(record_uri(made.uri, 0), record.to_bytes())
    Path(record_uri(made.uri, 0)).unlink()
    with pytest.raises(DataError, match=r"^1 faults: records/000000.json: cannot read: there is no such file"):
        verify(made.uri)
    write_bytes(record_uri(made.uri, 0), b"{")
    with pytest.raises(DataError, match=r"^1 faults: records/000000.json: a shard's record is damaged"):
        verify(made.uri)
    write_bytes(record_uri(made.uri, 0), record.to_bytes())
    assert verify(made.uri) == made


def test_a_manifest_that_hides_a_quarantined_file_or_a_sample(made: Manifest) -> None:
    assert made.facts["quarantined"]
    rewrite(made, lambda facts: facts.update(quarantined=[]))
    with pytest.raises(DataError, match=r"^1 faults: the manifest lists other quarantined or dropped"):
        verify(made.uri)
    rewrite(made, lambda facts: facts.update(dropped={"flat": 1}))
    with pytest.raises(DataError, match=r"^1 faults: the manifest lists other quarantined or dropped"):
        verify(made.uri)
    rewrite(made, lambda facts: facts.update(num_samples=1))
    with pytest.raises(DataError, match=r"^1 faults: index, shards, manifest count 2, 2, 1 samples"):
        verify(made.uri)


def test_every_fault_of_a_set_is_named(photos: Path, output: str) -> None:
    manifest = make_shard_set(shard_config(photos, output, degradation="bicubic", samples_per_shard=1))
    for number in (0, 2):
        data = bytearray(read_bytes(join(output, f"shards/00000{number}.tar")))
        data[700 * (number + 1)] ^= 1
        write_bytes(join(output, f"shards/00000{number}.tar"), bytes(data))
    write_bytes(join(output, "DATA_CARD.md"), b"belongs")
    write_bytes(join(output, "shards/DATA_CARD.md"), b"does not")
    with pytest.raises(DataError) as caught:
        verify(output)
    assert caught.value.what == (
        "3 faults: shards/000000.tar has changed; shards/000002.tar has changed; shards/DATA_CARD.md does not belong"
    )
    assert len(manifest.entries) == 3


def strays(output: str) -> list[str]:
    names = [
        ".writable-0123456789ab",
        ".manifest.json.0123456789ab.tmp",
        "shards/.000000.tar.0123456789ab.tmp",
        "records/.000001.json.0123456789ab.tmp",
    ]
    for name in names:
        write_bytes(join(output, name), b"x")
    return sorted(names)


def test_clean_removes_our_own_leftovers_and_names_the_rest(
    photos: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shard_config(photos, output, degradation="bicubic", samples_per_shard=2)
    manifest = make_shard_set(config)
    before = {place: read_bytes(place) for place in list_files(output)}
    assert clean(output) == []
    ours = strays(output)
    foreign = sorted(
        ["notes.txt", ".notes.txt.0123456789ab.tmp", "shards/000009.tar", "records/000009.json", ".writable"]
    )
    for name in foreign:
        write_bytes(join(output, name), b"x")
    found = clean(output)
    assert [stray.name for stray in found if stray.removed] == ours
    assert [stray.name for stray in found if stray.unknown] == foreign
    assert len(found) == len(ours) + len(foreign)
    assert {place.removeprefix(output + "/") for place in list_files(output).keys() - before.keys()} == set(foreign)
    with pytest.raises(DataError, match=r"^5 objects do not belong here: .notes.txt") as caught:
        print_cleaned(output)
    assert "5 strays" in capsys.readouterr().out
    assert caught.value.exit_code == 3
    for name in foreign:
        assert read_bytes(join(output, name)) == b"x"
    assert all(read_bytes(place) == data for place, data in before.items())
    assert manifest == Manifest.load(output)


def test_clean_of_an_unfinished_set_spares_a_writer_at_work(photos: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "set")
    config = shard_config(photos, output, degradation="bicubic", samples_per_shard=1)
    with pytest.raises(DataError, match="no shard set was begun here"):
        clean(output)
    first, second, _ = plan_shards(list_sources(config.sources), config)
    for shard in (first, second):
        write_shard(config, resolve_degradation(config), shard)
    write_bytes(join(output, "run.json"), b"{}")
    os.unlink(record_uri(output, 1))  # its writer was killed between tar and record
    ours = strays(output)
    old = Path(output, ours[0])
    os.utime(old, (time.time() - 7200,) * 2)
    found = clean(output)
    assert [stray.name for stray in found] == sorted([*ours, second.name])
    assert [stray.name for stray in found if stray.removed] == [ours[0]]
    assert not old.exists()
    assert not any(stray.unknown for stray in found)
    assert make_shard_set(config).num_samples == 3
    assert [stray.name for stray in clean(output) if stray.removed] == ours[1:]
    os.unlink(join(output, "run.json"))
    assert verify(output).num_samples == 3


def test_unfinished_uploads_are_named_and_dropped(photos: Path, s3: str) -> None:
    make_shard_set(shard_config(photos, join(s3, "set"), degradation="bicubic"))
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    for name in ("set/shards/000000.tar", "set/film.mkv", "settlement/shards/000000.tar"):
        s3_filesystem().call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/{name}")
    found = clean(join(s3, "set"))
    assert [(stray.name, stray.removed, stray.unknown) for stray in sorted(found, key=lambda stray: stray.name)] == [
        ("film.mkv", False, True),
        ("shards/000000.tar", True, False),
    ]
    left = s3_filesystem().call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)["Uploads"]
    assert sorted(one["Key"] for one in left) == [f"{prefix}/set/film.mkv", f"{prefix}/settlement/shards/000000.tar"]


def other(seed: int) -> np.ndarray:
    """Unlike all the others: every frequency has its own strength."""
    small = np.clip(np.random.Generator(np.random.Philox(seed)).normal(128, 60, (8, 8, 3)), 0, 255)
    return cv2.resize(small.astype(np.uint8), (192, 192), interpolation=cv2.INTER_CUBIC)


def test_near_duplicates_and_crops_of_the_same_file_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, recompressed = other(1), other(2)
    train = {"a": shared, "b": recompressed, "c": other(3), "sky": np.full((192, 192, 3), 200, np.uint8)}
    test = {"d": other(4), "sky2": np.full((192, 192, 3), 90, np.uint8)}
    for name, pictures in (("train", train), ("test", test)):
        (tmp_path / name).mkdir()
        for key, picture in pictures.items():
            (tmp_path / name / f"{key}.png").write_bytes(encode_png(picture))
    (tmp_path / "test" / "renamed.png").write_bytes((tmp_path / "train" / "a.png").read_bytes())
    cv2.imwrite(str(tmp_path / "test" / "again.jpg"), recompressed[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 60])
    crop = {"kind": "random", "size_px": 64, "num_per_image": 1}
    one = make_shard_set(shard_config(tmp_path / "train", tmp_path / "one", name="train", degradation="bicubic"))
    two = make_shard_set(shard_config(tmp_path / "test", tmp_path / "two", name="test", degradation=None))
    cut = make_shard_set(shard_config(tmp_path / "test", tmp_path / "cut", name="test", degradation=None, crop=crop))
    found = list(find_duplicates(one.uri, two.uri))
    same, near = found
    assert same == ("train-a-000-0", "test-renamed-000-0", None, 1, 1, 1)
    assert near[:2] == ("train-b-000-0", "test-again-000-0")
    assert near.bits is not None
    assert 0 <= near.bits <= 6
    assert list(find_duplicates(one.uri, cut.uri)) == [same]  # its window is another; the file is the same
    with pytest.raises(DataError, match="2 pairs of samples are in both sets: 1 alike, 1 of the same source file"):
        print_duplicates(one.uri, two.uri, 6)
    assert "train-a-000-0\ttest-renamed-000-0\tsame source file\n" in capsys.readouterr().out


def test_sets_without_hashes_still_verify_but_cannot_be_compared(photos: Path, tmp_path: Path) -> None:
    """As an earlier version wrote them: neither records nor index know hashes."""
    new = make_shard_set(shard_config(photos, tmp_path / "set", degradation="bicubic", samples_per_shard=2))
    entries = list(new.entries)
    for place in list_files(join(new.uri, "records")):
        values = json.loads(read_bytes(place))
        for entry in values["entries"]:
            del entry["phash"], entry["source_hash"]
            del entry["gradient_energy"], entry["blockiness"], entry["sharpness"]
        write_bytes(place, json.dumps(values).encode())
    for name in ("index.parquet", "manifest.json"):
        Path(new.uri, name).unlink()
    config = shard_config(photos, tmp_path / "set", degradation="bicubic", samples_per_shard=2)
    written = ("format", "dataset_id", "num_samples", "num_bytes", "index", "quarantined", "dropped", "shards")
    facts = {name: value for name, value in new.facts.items() if name not in written}
    old = write_manifest(config.output, 2, **facts)
    assert old.index.column_names == ["key", "shard", "offset_bytes", "length_bytes"]
    assert old.dataset_id == new.dataset_id
    (part,) = old.facts.pop("index")
    old.facts["index_sha256"] = part["sha256"]
    write_bytes(join(old.uri, "manifest.json"), json.dumps(old.facts).encode())
    assert list(old.entries) == entries
    assert verify(old.uri) == old
    with pytest.raises(DataError, match="its index holds no scores"):
        print_stats(old.uri)
    with pytest.raises(DataError, match="holds no hashes to compare by") as caught:
        list(find_duplicates(old.uri, old.uri))
    assert "ccsr shard" in caught.value.todo


def test_folder_markers_and_system_files_are_no_fault(
    photos: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markers are empty objects that S3 consoles and Hadoop create; a local folder has none."""
    manifest = make_shard_set(shard_config(photos, output, degradation="bicubic"))
    if output.startswith("s3://"):
        bucket, _, prefix = output.removeprefix("s3://").partition("/")
        for name in ("/", "/shards/", "/records/", "/shards_$folder$"):
            s3_filesystem().call_s3("put_object", Bucket=bucket, Key=prefix + name, Body=b"")
    for name in (".DS_Store", "shards/._000000.tar", "Thumbs.db"):
        write_bytes(join(output, name), b"x")
    assert verify(output) == manifest
    assert "3 system files left out" in capsys.readouterr().err
    assert clean(output) == []
    assert list_files(output).keys() >= {join(output, name) for name in (".DS_Store", "manifest.json")}


def test_a_file_in_both_sets_is_one_line_however_many_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the file was encoded again: its crops are then found by their hashes."""
    for number in range(2):
        for name in ("same", "other"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "same" / f"{number}.png").write_bytes(encode_png(other(number)))
        cv2.imwrite(str(tmp_path / "other" / f"{number}.jpg"), other(number)[..., ::-1])
    grid = {"kind": "grid", "size_px": 96, "step_px": 32}
    values = {"crop": grid, "degradation": None}
    one, two, again = (
        make_shard_set(shard_config(tmp_path / source, tmp_path / name, name=name, **values))
        for source, name in (("same", "one"), ("same", "two"), ("other", "again"))
    )
    assert one.num_samples == 32
    with pytest.raises(DataError, match="512 pairs of samples are in both sets: 512 of the same source file"):
        print_duplicates(one.uri, two.uri, 6)
    assert capsys.readouterr().out.splitlines() == [
        f"one-{number}-000-0\ttwo-{number}-000-0\tsame source file\t16 and 16 crops" for number in range(2)
    ]
    with pytest.raises(DataError, match=r"\d+ alike"):
        print_duplicates(one.uri, again.uri, 6)
    assert len(capsys.readouterr().out.splitlines()) == 2
