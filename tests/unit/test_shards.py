"""Shards: the same samples give the same tar, which others read, and each sample is one range of it."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from infra import DataError, StorageError
from infra.files.publish import upload
from infra.files.storage import join, sha256_file
from infra.shards.shard import Entry, read_sample, write_tar

SAMPLES = {
    "a-000-0": {"hr.png": b"\x89PNG" * 400, "lr.png": b"small", "json": b'{"key": "a-000-0"}'},
    "b_1": {"hr.png": b"", "json": b"{}"},
    "C" * 80: {"hr.png": bytes(range(256)) * 5, "json": b"[]"},
}


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, list[Entry]]:
    path = tmp_path / "shards" / "000000.tar"
    path.parent.mkdir()
    return path, write_tar(path, "shards/000000.tar", SAMPLES.items())


def test_equal_samples_give_equal_bytes(shard: tuple[Path, list[Entry]], tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    assert write_tar(again, "shards/000000.tar", SAMPLES.items()) == shard[1]
    assert again.read_bytes() == shard[0].read_bytes()
    # The tar format is fixed, so this hash holds on every machine and for every version of Python.
    assert sha256_file(again) == "14c94c2a388316d414a86afc34f1724a6aadcffc36c3be8e1e0dadec62e8df3e"


def test_members_have_no_owner_and_no_time(shard: tuple[Path, list[Entry]]) -> None:
    with tarfile.open(shard[0]) as tar:
        for member in tar:
            assert (member.uid, member.gid, member.uname, member.gname, member.mtime) == (0, 0, "", "", 0)
            assert member.mode == 0o644


def test_the_webdataset_package_reads_it(shard: tuple[Path, list[Entry]]) -> None:
    dataset = webdataset.WebDataset(str(shard[0]), shardshuffle=False, empty_check=False)
    found = {sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")} for sample in dataset}
    assert found == SAMPLES
    assert list(found) == list(SAMPLES)


def test_tar_lists_it(shard: tuple[Path, list[Entry]]) -> None:
    listed = subprocess.run(["tar", "tf", str(shard[0])], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [f"{key}.{extension}" for key, members in SAMPLES.items() for extension in members]


def test_each_entrys_range_holds_its_members(shard: tuple[Path, list[Entry]], tmp_path: Path) -> None:
    _, entries = shard
    assert [entry.key for entry in entries] == list(SAMPLES)
    for entry in entries:
        assert read_sample(str(tmp_path), entry) == SAMPLES[entry.key]
        assert entry.offset_bytes % 512 == 0
        assert entry.length_bytes % 512 == 0


def test_each_entrys_range_holds_its_members_on_s3(shard: tuple[Path, list[Entry]], s3: str) -> None:
    upload(shard[0], join(s3, "shards/000000.tar"))
    for entry in shard[1]:
        assert read_sample(s3, entry) == SAMPLES[entry.key]


@pytest.mark.parametrize("key", ["", "a/b", "a.b", "ä", "a b", "x" * 81, "../x", "a\n"])
def test_keys_that_would_break_the_format_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample key"):
        write_tar(tmp_path / "x.tar", "x.tar", [(key, {"json": b"{}"})])


def test_an_index_that_does_not_fit_is_refused(shard: tuple[Path, list[Entry]], tmp_path: Path) -> None:
    first, second, last = shard[1]
    wrong = [
        Entry(second.key, first.shard, first.offset_bytes, first.length_bytes),  # another sample's place
        Entry(first.key, first.shard, first.offset_bytes + 512, first.length_bytes),  # data where a header should be
        Entry(first.key, first.shard, first.offset_bytes, first.length_bytes + second.length_bytes),  # two samples
        Entry(first.key, first.shard, first.offset_bytes, 1024),  # the data is cut
        Entry(first.key, first.shard, first.offset_bytes + 100, 1024),  # not on a block
    ]
    for entry in wrong:
        with pytest.raises(DataError, match=r"cannot be read|promises"):
            read_sample(str(tmp_path), entry)
    with pytest.raises(StorageError, match=r"ends .* bytes early"):
        read_sample(str(tmp_path), Entry(last.key, last.shard, last.offset_bytes, 10**6))
    with pytest.raises(StorageError, match="no such file"):
        read_sample(str(tmp_path), Entry("x", "shards/000001.tar", 0, 512))


MEMBERS = st.dictionaries(st.sampled_from(["hr.png", "lr.png", "json"]), st.binary(max_size=1500), min_size=1)
KEYS = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)


@given(st.lists(st.tuples(KEYS, MEMBERS), unique_by=lambda sample: sample[0], max_size=5))
def test_any_samples_come_back(tmp_path_factory: pytest.TempPathFactory, samples: list) -> None:
    folder = tmp_path_factory.mktemp("any")
    entries = write_tar(folder / "x.tar", "x.tar", samples)
    assert [(entry.key, read_sample(str(folder), entry)) for entry in entries] == samples
    assert json.dumps([entry.offset_bytes for entry in entries]) == json.dumps(sorted(e.offset_bytes for e in entries))
