"""Lists, foreign WebDataset tars and parquet files as sources, on disk and on S3, made by the tools themselves."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs.core
import webdataset
from photos import make_shard_set, photo, save_photos
from PIL import Image
from test_sources import config_of, listed, save_pairs

from infra import ConfigError, DataError
from infra.files.publish import write_bytes
from infra.files.storage import join
from infra.imaging.images import decode_image, encode_png
from infra.run import has_work
from infra.shards.shard import image_of, read_sample
from infra.shards.tars import open_set
from pipelines.sets.verify import verify
from pipelines.sharding.inputs.containers import read_source_bytes
from pipelines.sharding.plan import source_id
from pipelines.sharding.sources import list_sources
from tests.training_runs import train_config
from training.data.samples import SampleReader


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return join(request.getfixturevalue("s3"), "in") if request.param == "s3" else str(tmp_path / "in")


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo(64, 64, number)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return b"\xef\xbb\xbf" + file.getvalue().encode()  # as Excel writes it


def as_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


LISTS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "l.txt": lambda rows: "\n".join([*(row["image"] for row in rows), ""]).encode(),
    "l.csv": as_csv,
    "l.json": lambda rows: json.dumps([row["image"] for row in rows]).encode(),
    "l.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "l.parquet": as_parquet,
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_names_files_relative_absolute_and_on_s3(name: str, place: str, s3: str, tmp_path: Path) -> None:
    images = {"b/two.png": join(place, "b/two.png"), "a, b/one é.png": join(place, "a, b/one é.png")}
    images |= {str(tmp_path / "three.png"): str(tmp_path / "three.png"), f"{s3}/four.png": f"{s3}/four.png"}
    for number, uri in enumerate(images.values()):
        write_bytes(uri, encode_png(photo(40, 48, number)))
    write_bytes(join(place, name), LISTS[name]([{"image": image, "title": "x"} for image in images]))
    files = listed(kind="list", path=join(place, name))
    assert [(file.name, file.uri) for file in files] == list(images.items()), "in the list's order"
    assert files[0].key == "s-two"
    assert all(file.num_bytes == len(read_source_bytes(file.uri)) for file in files)


def test_a_list_of_pairs_keeps_their_lr(tmp_path: Path) -> None:
    save_pairs(tmp_path)
    rows = [{"gt": f"HR/{n}_HR.png", "lq": f"LR/{n}_LR4.png"} for n in (2, 0)]
    (tmp_path / "pairs.csv").write_bytes(as_csv(rows))
    source = {"kind": "list", "name": "s", "path": str(tmp_path / "pairs.csv"), "image": "gt", "lr": "lq"}
    made = make_shard_set(config_of(source, output=tmp_path / "out", degradation=None))
    assert made.facts["has_lr"]
    assert made.facts["scale"] == 4
    for row, entry in zip(rows, made.entries, strict=True):
        lr = decode_image(read_sample(made.uri, entry)["lr.png"], where="")
        assert (lr == decode_image((tmp_path / row["lq"]).read_bytes(), where="")).all()
    with pytest.raises(ConfigError, match="bring their own LR"):
        make_shard_set(config_of(source, output=tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"there.png\ngone.png\ngone2.png\n", r"2 of 3 files are missing: \S+/gone.png, \S+/gone2.png"),
        ("l.csv", b"path\nthere.png\n", r"1 of 1 rows have no image \(first: row 1; row 1 has path\)"),
        ("l.jsonl", b'{"image": "there.png"}\n{"image": 7}\n', r"1 of 2 rows have no image \(first: row 2"),
        ("l.json", b'{"image": "there.png"}', "a list is expected, not dict"),
        ("l.json", b"[", "cannot be read"),
        ("l.txt", "sch\xf6n.png".encode("latin-1"), "can't decode byte"),
        ("l.parquet", b"PAR1", "cannot be read"),
        ("l.txt", b"\n", "0 of 0 rows"),
        ("l.xls", b"", "no list of a known kind"),
        ("l.txt", b"there.png\nthere.png\n", "two files would have the same key s-there"),
    ],
)
def test_a_wrong_list_is_refused_with_place_and_number(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    save_photos(tmp_path, [(40, 40)])
    (tmp_path / "00.png").rename(tmp_path / "there.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        listed(kind="list", path=str(tmp_path / name))
    assert str(tmp_path) in caught.value.where


def write_tars(folder: Path, count: int = 3) -> list[bytes]:
    """As img2dataset lays them out, by webdataset's own writer: KEY.jpg, KEY.json, KEY.txt, five samples a tar."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [jpeg(number) for number in range(5 * count)]
    for tar in range(count):
        with webdataset.TarWriter(str(folder / f"{tar:05d}.tar"), encoder=False) as writer:
            for number in range(5 * tar, 5 * tar + 5):
                key, facts = f"{number:09d}", {"caption": "a photo", "key": str(number)}
                sample = {"jpg": images[number], "json": json.dumps(facts).encode(), "txt": b"a photo"}
                writer.write({"__key__": key, **sample})
    return images


def stored(folder: Path, place: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            write_bytes(join(place, path.relative_to(folder).as_posix()), path.read_bytes())
    return place


@pytest.mark.parametrize("pattern", ["{00000..00002}.tar", "0000{0,1,2}.tar", ""])
def test_foreign_tars_are_read_by_range(pattern: str, place: str, tmp_path: Path) -> None:
    images = write_tars(tmp_path / "made")
    path = join(stored(tmp_path / "made", place), pattern).rstrip("/")
    files = listed(kind="webdataset", path=path)
    assert [read_source_bytes(file.uri) for file in files] == images
    assert [file.key for file in files] == [f"s-{number:09d}" for number in range(15)]
    assert [file.num_bytes for file in files] == [len(image) for image in images]
    assert files[6].name == "00001.tar/000000006.jpg"


def test_a_tar_is_indexed_by_its_headers_alone(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as writer:
        for number in range(4):
            writer.write({"__key__": str(number), "png": bytes(10**6), "txt": b"x"})
    stored(tmp_path, join(s3, "tars"))
    read: list[int] = []
    fetch = s3fs.core._fetch_range

    def counted(*arguments: Any, **named: Any) -> bytes:
        read.append(len(data := fetch(*arguments, **named)))
        return data

    monkeypatch.setattr("s3fs.core._fetch_range", counted)
    assert len(listed(kind="webdataset", path=join(s3, "tars"))) == 4
    assert 0 < sum(read) < 400_000, "of 4 MB"


def test_samples_of_several_images_need_a_choice(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as writer:
        for number in range(2):
            one, other = (encode_png(photo(side, side, number)) for side in (64, 16))
            writer.write({"__key__": f"d.d/{number}", "a.png": one, "b.png": other})
            writer.write({"__key__": f"d.d/._{number}", "png": b"of macOS"})
    source = {"kind": "webdataset", "path": str(tmp_path / "0.tar")}
    with pytest.raises(DataError, match=r"sample d.d/0 has 2 images: d.d/0.a.png, d.d/0.b.png") as caught:
        listed(**source)
    assert caught.value.todo == "write `member: a.png`, for one, in a source of `ccsr shard`"
    assert [file.name for file in listed(**source, member="a.png")] == ["0.tar/d.d/0.a.png", "0.tar/d.d/1.a.png"]
    with pytest.raises(DataError, match=r"1 of 1 tars hold no member \.jpg: 0\.tar"):
        listed(**source, member="jpg")


@pytest.mark.parametrize("pattern", ["{00000..00002}.tar", "00001.tar"])
def test_training_reads_foreign_tars_where_they_are(
    pattern: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_tars(tmp_path / "made")
    path = join(stored(tmp_path / "made", place), pattern)
    settings = train_config(path, tmp_path / "run", num_updates=4, crop_px=64, degradation="bicubic")
    manifest = open_set(path, str(tmp_path / "run" / ".data"))
    reader = SampleReader([manifest], settings)
    count = manifest.num_samples
    assert count == (15 if "{" in pattern else 5)
    samples = [reader(position) for position in range(count)]
    assert sorted(sample.key for sample in samples) == [entry.key for entry in manifest.entries]
    for sample in samples:
        image = decode_image(images[int(sample.key)], where="")
        assert any(np.array_equal(sample.hr, turned) for turned in (image, image[:, ::-1]))
        assert sample.lr.shape == (16, 16, 3)
    again = open_set(path, str(tmp_path / "other"))
    assert again.dataset_id == manifest.dataset_id
    monkeypatch.setattr("infra.shards.tars.tar_samples", None)  # the index is made once
    assert open_set(path, str(tmp_path / "run" / ".data")) == manifest
    assert not has_work(str(tmp_path / "run")), "the index claims no output"
    with pytest.raises(DataError, match="tars that others made"):
        verify(manifest.uri)
    with pytest.raises(DataError, match="hold no LR images"):
        SampleReader([manifest], settings.model_copy(update={"degradation": None}))


def test_wrong_tars_are_refused(tmp_path: Path) -> None:
    write_tars(tmp_path)
    with pytest.raises(DataError, match=r"2 of 5 files are missing: \S+/00003.tar, \S+/00004.tar"):
        listed(kind="webdataset", path=str(tmp_path / "{00000..00004}.tar"))
    with webdataset.TarWriter(str(tmp_path / "texts.tar"), encoder=False) as writer:
        writer.write({"__key__": "0", "txt": b"x"})
    for name, content, message in (
        ("texts", None, r"1 of 1 tars hold no image: texts\.tar"),
        ("gz", b"\x1f\x8b" + bytes(600), "the tar cannot be read"),
        ("cut", (tmp_path / "00000.tar").read_bytes()[:2000], "the tar cannot be read"),
        ("empty", b"", "the tar cannot be read"),
    ):
        if content is not None:
            (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            listed(kind="webdataset", path=str(tmp_path / f"{name}.tar"))
        assert caught.value.where == str(tmp_path / f"{name}.tar")
    (tmp_path / "more.tar").write_bytes((tmp_path / "texts.tar").read_bytes())
    with pytest.raises(DataError, match=r"2 of 3 tars hold no image: texts\.tar, more\.tar"):
        open_set(str(tmp_path / "{texts,00000,more}.tar"), str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="brace is not closed"):
        listed(kind="webdataset", path=str(tmp_path / "{0,1.tar"))


@pytest.mark.parametrize("form", ["struct", "binary", "large"])
def test_parquet_rows_are_images(form: str, place: str, tmp_path: Path) -> None:
    images = [jpeg(number) for number in range(7)]
    kinds = {"binary": pa.binary(), "large": pa.large_binary()}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)] if form == "struct" else images
    table = pa.table({"image": pa.array(values, kinds.get(form, struct)), "text": ["x"] * 7})
    for name, rows in (("0.parquet", table[:5]), ("1.parquet", table[5:])):
        file = io.BytesIO()
        pq.write_table(rows, file, row_group_size=2)
        write_bytes(join(place, name), file.getvalue())
    files = listed(kind="parquet", path=place)
    assert [read_source_bytes(file.uri) for file in files] == images
    assert files[5].name == "1.parquet/00000000"
    with pytest.raises(DataError, match="column 'text' is of type string, not binary"):
        listed(kind="parquet", path=place, column="text")
    with pytest.raises(DataError, match="no column 'img' here") as caught:
        listed(kind="parquet", path=join(place, "0.parquet"), column="img")
    pq.write_table(table[:0], tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no images here"):
        listed(kind="parquet", path=str(tmp_path / "empty.parquet"))
    assert caught.value.todo == "write `column:` with one of image, text"


def test_sets_of_containers_are_whole_and_verify(tmp_path: Path) -> None:
    """One config over a list, tars and parquet: a bad row and a bad member are quarantined."""
    images = write_tars(tmp_path / "tars", 1)
    rows = [{"image": {"bytes": data, "path": None}} for data in (images[0], b"", b"no image", None)]
    (tmp_path / "p.parquet").write_bytes(as_parquet(rows))
    save_photos(tmp_path / "photos", [(48, 48)])
    (tmp_path / "list.txt").write_text("photos/00.png\n")
    kinds = {"list": "list.txt", "webdataset": "tars/{00000..00000}.tar", "parquet": "p.parquet"}
    config = config_of(
        *({"kind": kind, "name": kind, "path": str(tmp_path / path)} for kind, path in kinds.items()),
        output=tmp_path / "out",
        degradation="bicubic",
        samples_per_shard=3,
    )
    made = make_shard_set(config)
    assert verify(made.uri) == made
    assert made.num_samples == 1 + 5 + 1
    assert [item["reason"] for item in made.facts["quarantined"]] == ["empty", "unreadable", "empty"]
    hr = decode_image(image_of(read_sample(made.uri, made.entries[3])), where="")
    assert np.array_equal(hr, decode_image(images[2], where=""))
    files = list_sources(config.sources)
    assert source_id(files) == made.facts["source_id"]
    assert [fact["kind"] for fact in made.facts["sources"]] == ["list", "webdataset", "parquet"]
