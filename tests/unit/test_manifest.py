"""The manifest: what is committed once stays, what disagrees is loud, and a set is the same wherever it is stored."""

import dataclasses
import gc
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra import DataError, PartialResultError, StorageError
from infra.files.publish import write_bytes
from infra.files.storage import exists, join, list_files, read_bytes
from infra.shards.manifest import (
    Manifest,
    Quarantined,
    ShardRecord,
    commit_record,
    committed,
    index_table,
    record_uri,
    write_manifest,
)
from infra.shards.shard import Entry, IndexedEntry

FACTS: dict[str, Any] = {"scale": 4, "has_lr": True, "source_id": "s", "fingerprint": "f"}


def record(index: int, num_samples: int = 2, sha256: str = "5" * 64) -> ShardRecord:
    shard = f"shards/{index:06d}.tar"
    entries = [
        IndexedEntry.of(
            Entry(f"k-{index}-{number}", shard, 1024 * number, 1024),
            2**64 - 1 - number,
            f"{index:064x}",
            (index, 1, 2.5),
        )
        for number in range(num_samples)
    ]
    failed = [Quarantined(f"bad-{index}", "x.png", "empty", "the file is empty", "0" * 64)] if index == 1 else []
    return ShardRecord(index, shard, sha256, 2048, entries, failed)


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return join(request.getfixturevalue("s3"), "set") if request.param == "s3" else str(tmp_path / "set")


def test_a_set_is_what_was_committed(output: str) -> None:
    for index in (2, 0, 1):  # whatever the order
        commit_record(output, record(index))
    manifest = write_manifest(output, 3, **FACTS)
    expected = [entry for index in range(3) for entry in record(index).entries]
    assert manifest.index.to_pylist() == [dataclasses.asdict(entry) for entry in expected]
    assert list(manifest.entries) == [Entry(e.key, e.shard, e.offset_bytes, e.length_bytes) for e in expected]
    assert manifest.index["phash"].to_numpy().dtype == np.uint64
    assert manifest.num_samples == 6
    assert manifest.facts["num_bytes"] == 3 * 2048
    assert [item["reason"] for item in manifest.facts["quarantined"]] == ["empty"]
    assert [shard["num_samples"] for shard in manifest.facts["shards"]] == [2, 2, 2]
    assert manifest.facts["scale"] == 4
    assert Manifest.load(output) == manifest


def test_committing_the_same_twice_is_quiet_and_another_record_is_loud(output: str) -> None:
    commit_record(output, record(0))
    commit_record(output, record(0))
    with pytest.raises(DataError, match="different bytes for shard 0"):
        commit_record(output, record(0, sha256="6" * 64))
    with pytest.raises(DataError, match="different bytes"):
        commit_record(output, record(0, num_samples=1))
    assert committed(output) == [0]
    assert ShardRecord.read(record_uri(output, 0)) == record(0)


def test_records_come_back_whole(output: str) -> None:
    for index in (0, 1):
        commit_record(output, record(index))
        assert ShardRecord.read(record_uri(output, index)) == record(index)


def test_an_incomplete_set_is_no_set(output: str) -> None:
    commit_record(output, record(0))
    commit_record(output, record(2))
    with pytest.raises(PartialResultError, match=r"1 of 3 shards are missing \(first: 1\)"):
        write_manifest(output, 3, **FACTS)
    assert not exists(join(output, "manifest.json"))
    with pytest.raises(DataError, match="no complete shard set"):
        Manifest.load(output)


def test_a_set_of_nothing_is_refused(output: str) -> None:
    commit_record(output, record(0, num_samples=0))
    with pytest.raises(DataError, match="no sample could be used"):
        write_manifest(output, 1, **FACTS)


def test_the_dataset_id_does_not_depend_on_the_place(tmp_path: Path, s3: str) -> None:
    written = []
    for place in (str(tmp_path / "here"), str(tmp_path / "there" / "deep"), join(s3, "set")):
        for index in range(3):
            commit_record(place, record(index))
        manifest = write_manifest(place, 3, **FACTS)
        written.append({name: read_bytes(join(place, name)) for name in ("manifest.json", "index.parquet")})
        assert manifest.uri == place
    assert written[0] == written[1] == written[2]


def test_the_dataset_id_depends_on_every_shard(tmp_path: Path) -> None:
    ids = set()
    for number, (count, sha256) in enumerate([(3, "5"), (2, "5"), (3, "6")]):
        place = str(tmp_path / str(number))
        for index in range(count):
            commit_record(place, record(index, sha256=(sha256 if index == 0 else "5") * 64))
        ids.add(write_manifest(place, count, **FACTS).dataset_id)
    assert len(ids) == 3


def test_closing_twice_is_quiet_and_another_manifest_is_loud(output: str) -> None:
    for index in range(2):
        commit_record(output, record(index))
    first = write_manifest(output, 2, **FACTS)
    before = {place: read_bytes(place) for place in list_files(output)}
    assert write_manifest(output, 2, **FACTS) == first
    with pytest.raises(DataError, match=r"another manifest.json is already there"):
        write_manifest(output, 2, **{**FACTS, "scale": 2})
    assert {place: read_bytes(place) for place in list_files(output)} == before


def test_an_index_of_an_interrupted_run_is_taken_over_if_it_says_the_same(tmp_path: Path) -> None:
    """Another version of the parquet library writes the same rows in other bytes."""
    output = str(tmp_path)
    commit_record(output, record(0))
    pq.write_table(index_table(record(0).entries), tmp_path / "index.parquet", compression="zstd")
    before = (tmp_path / "index.parquet").read_bytes()
    assert write_manifest(output, 1, **FACTS).index == index_table(record(0).entries)
    assert (tmp_path / "index.parquet").read_bytes() == before


def test_an_index_in_parts_is_one_index(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.shards.manifest.SHARDS_PER_PART", 2)
    monkeypatch.setattr("infra.shards.byte_index.ROWS_PER_BATCH", 2)
    counts = (3, 1, 0, 0, 2)  # the second part has no rows and is not written
    for index, count in enumerate(counts):
        commit_record(output, record(index, count))
    manifest = write_manifest(output, len(counts), **FACTS)
    expected = [entry for index, count in enumerate(counts) for entry in record(index, count).entries]
    assert [part["name"] for part in manifest.facts["index"]] == ["index.parquet", "index-000001.parquet"]
    assert [part["num_samples"] for part in manifest.index_parts] == [4, 2]
    assert manifest.index.to_pylist() == [dataclasses.asdict(entry) for entry in expected]
    entries = manifest.entries
    plain = [Entry(e.key, e.shard, e.offset_bytes, e.length_bytes) for e in expected]
    assert list(entries) == [entries[number] for number in range(6)] == plain
    assert (entries[-1], entries[1:6:2], len(entries)) == (plain[-1], plain[1:6:2], 6)
    with pytest.raises(IndexError):
        entries[6]


def test_processes_of_a_node_share_one_copy_that_the_last_one_removes(
    output: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    commit_record(output, record(0))
    manifest = write_manifest(output, 1, **FACTS)
    first = manifest.entries
    (copy,) = tmp_path.glob("ccsr-copies-*/*/index.arrow")
    script = "import sys, pickle; print(pickle.load(sys.stdin.buffer).entries[1].key)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    write_bytes(join(output, "index.parquet"), b"")  # whoever reads it again fails
    other = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(manifest), env=environment, stdout=-1)
    assert other.stdout.decode().split() == [first[1].key]
    assert copy.exists(), "the first one still uses it"
    del first, manifest
    gc.collect()
    assert not copy.exists()


def test_an_index_that_says_something_else_is_refused(tmp_path: Path) -> None:
    commit_record(str(tmp_path), record(0))
    pq.write_table(index_table(record(1).entries), tmp_path / "index.parquet")
    with pytest.raises(DataError, match=r"another index.parquet is already there"):
        write_manifest(str(tmp_path), 1, **FACTS)


def test_a_tampered_index_is_refused(output: str) -> None:
    commit_record(output, record(0))
    manifest = write_manifest(output, 1, **FACTS)
    data = bytearray(read_bytes(join(output, "index.parquet")))
    data[len(data) // 2] ^= 1
    write_bytes(join(output, "index.parquet"), bytes(data))
    with pytest.raises(DataError, match="byte index is not the one"):
        _ = Manifest.load(output).entries
    assert manifest.num_samples == 2


def test_other_formats_and_damaged_files_are_told(tmp_path: Path) -> None:
    place = str(tmp_path / "manifest.json")
    write_bytes(place, json.dumps({"format": "something-2"}).encode())
    with pytest.raises(DataError, match="unknown manifest format 'something-2'"):
        Manifest.load(str(tmp_path))
    write_bytes(place, b'{"format":')
    with pytest.raises(StorageError, match="not JSON"):
        Manifest.load(str(tmp_path))


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    for content in (b"{", b"[]", b'{"index": 0}'):
        write_bytes(record_uri(str(tmp_path), 0), content)
        with pytest.raises(DataError, match="record is damaged") as caught:
            write_manifest(str(tmp_path), 1, **FACTS)
        assert caught.value.where == record_uri(str(tmp_path), 0)
