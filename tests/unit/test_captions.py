"""Captions: from each kind of source into KEY.txt, through append and export."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from photos import make_shard_set, photo
from test_source_containers import as_csv, as_parquet, jpeg, stored
from test_sources import config_of

from infra import DataError
from infra.files.storage import join, read_bytes
from infra.imaging.images import encode_png
from infra.shards.manifest import Manifest
from infra.shards.shard import read_sample
from pipelines.sets.append import append
from pipelines.sets.export_set import export
from pipelines.sets.verify import verify
from pipelines.sharding.plan import source_id
from pipelines.sharding.sources import list_sources

TEXTS = ["a red, round\nboat", "夕焼け", ""]  # the last image has none


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return join(request.getfixturevalue("s3"), "in") if request.param == "s3" else str(tmp_path / "in")


def make_source(kind: str, folder: Path, texts: list[Any] = TEXTS) -> dict[str, Any]:
    """Three images with `texts`, by the tool that makes such files; what a config's source says of them."""
    folder.mkdir(exist_ok=True)
    path, caption = "", "txt"
    if kind == "webdataset":
        path = "0.tar"
        with webdataset.TarWriter(str(folder / path), encoder=False) as writer:
            for number, text in enumerate(texts):
                data = text if isinstance(text, bytes) else text.encode()
                sample = {"jpg": jpeg(number), "json": json.dumps({"caption": "not this one"}).encode()}
                writer.write({"__key__": f"{number}", **sample, **({"txt": data} if data else {})})
    elif kind == "parquet":
        path, caption = "0.parquet", "text"
        rows = {"image": [jpeg(n) for n in range(3)], caption: pa.array([text or None for text in texts], pa.string())}
        pq.write_table(pa.table(rows), folder / path, row_group_size=2)
    else:
        for number, text in enumerate(texts):
            (folder / f"{number}.png").write_bytes(encode_png(photo(48, 40, number)))
            if kind == "folder" and text:
                (folder / f"{number}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    if kind.startswith("list"):
        path, caption = kind, "title"
        rows = [{"image": f"{number}.png", "title": text} for number, text in enumerate(texts)]
        write = {"list.csv": as_csv, "list.parquet": as_parquet}[kind]
        (folder / kind).write_bytes(write(rows))
    return {"kind": kind.split(".")[0], "path": path, "caption": caption}


def captions_of(made: Manifest) -> list[str | None]:
    members = [read_sample(made.uri, entry) for entry in made.entries]
    return [one["txt"].decode() if "txt" in one else None for one in members]


@pytest.mark.parametrize("kind", ["folder", "list.csv", "list.parquet", "webdataset", "parquet"])
def test_every_kind_of_source_brings_captions(kind: str, place: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path / "made")
    source["path"] = join(stored(tmp_path / "made", place), source["path"]).rstrip("/")
    config = config_of({"name": "s", **source}, output=join(place, "out"), degradation="bicubic")
    made = make_shard_set(config)
    assert captions_of(made) == [*TEXTS[:2], None]
    assert made.num_captions == 2
    assert verify(made.uri) == made
    assert list(read_sample(made.uri, made.entries[0]))[1:] == ["lr.png", "txt", "json"]
    bare = config_of({"name": "s", **source, "caption": None}, output=join(place, "bare"), degradation="bicubic")
    assert captions_of(make_shard_set(bare)) == [None] * 3, "not without being asked for"


@pytest.mark.parametrize("kind", ["folder", "list.csv", "webdataset", "parquet"])
def test_a_changed_caption_is_another_source(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path / "in")
    config = config_of({"name": "s", **source, "path": str(tmp_path / "in" / source["path"])}, output=tmp_path / "out")
    before = source_id(list_sources(config.sources))
    make_source(kind, tmp_path / "in", ["another one", *TEXTS[1:]])
    assert source_id(list_sources(config.sources)) != before


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_caption_that_is_not_utf_8_is_quarantined(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path / "in", ["good", "schön".encode("latin-1"), "good"])
    path = str(tmp_path / "in" / source["path"])
    made = make_shard_set(config_of({"name": "s", **source, "path": path}, output=tmp_path / "out"))
    assert captions_of(made) == ["good", "good"]
    (failed,) = made.facts["quarantined"]
    assert failed["reason"] == "caption"
    assert failed["source"] == ("1.png" if kind == "folder" else "0.tar/1.jpg")
    assert "not UTF-8 (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xf6 in position 3" in failed["message"]


def test_captions_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for kind, caption, message in (
        ("folder", "caption", r"none of 3 images has a caption \(caption\)"),
        ("list.csv", "text", r"none of 3 images has a caption \(text\)"),
        ("webdataset", "cls", "none of 3 images has a caption"),
        ("parquet", "image", "column 'image' is of type binary, not text"),
        ("parquet", "titel", "no column 'titel' here"),
    ):
        source = make_source(kind, tmp_path / kind) | {"name": "s", "caption": caption}
        source["path"] = str(tmp_path / kind / source["path"])
        with pytest.raises(DataError, match=message) as caught:
            list_sources(config_of(source).sources)
        assert str(tmp_path / kind) in caught.value.where
    for kind in ("folder", "webdataset", "parquet"):
        source = make_source(kind, tmp_path / f"no {kind}", [""] * 3) | {"name": "s"}
        source["path"] = str(tmp_path / f"no {kind}" / source["path"])
        with pytest.raises(DataError, match="none of 3 images has a caption"):
            list_sources(config_of(source).sources)
    (tmp_path / "l.jsonl").write_text('{"image": "a", "title": "cut \\ud83d"}\n')
    with pytest.raises(DataError, match=r"1 of 1 rows have a title that is not UTF-8 \(first: row 1\)"):
        list_sources(
            config_of({"kind": "list", "name": "s", "path": str(tmp_path / "l.jsonl"), "caption": "title"}).sources
        )
    (tmp_path / "l.jsonl").write_text('{"image": "a", "title": "x"}\n{"image": "b", "title": ["x", "y"]}\n')
    source = {"kind": "list", "name": "s", "path": str(tmp_path / "l.jsonl"), "caption": "title"}
    with pytest.raises(DataError, match=r"1 of 2 rows have a title that is no text \(first: row 2\)"):
        list_sources(config_of(source).sources)


def test_captions_go_through_sets_append_and_export(place: str, tmp_path: Path) -> None:
    sets = []
    for name in ("a", "b"):
        source = make_source("folder", tmp_path / name) | {"path": str(tmp_path / name), "name": name}
        sets.append(make_shard_set(config_of(source, output=join(place, name), degradation="bicubic")))
    again = config_of({"kind": "shards", "name": "c", "path": sets[0].uri}, output=join(place, "c"))
    assert captions_of(make_shard_set(again)) == captions_of(sets[0])
    both = append([one.uri for one in sets], join(place, "both"))
    assert both.num_captions == 4
    assert verify(both.uri) == both
    assert captions_of(both) == [*TEXTS[:2], None] * 2
    export(both.uri, join(place, "pairs"), "pairs")
    back = {"kind": "folder", "name": "back", "path": join(place, "pairs", "hr"), "caption": "txt"}
    assert [bool(file.caption_uri) for file in list_sources(config_of(back).sources)] == [True, True, False] * 2
    export(both.uri, join(place, "basicsr"), "basicsr")
    key = both.entries[1].key
    assert read_bytes(join(place, "basicsr", "captions", f"{key}.txt")).decode() == TEXTS[1]
