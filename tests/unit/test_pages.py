"""Long listings on S3 are written as they come and continued; the list of files is mapped."""

import itertools
import json
import pickle
import re
import time
from pathlib import Path

import pytest
from photos import save_photos, shard_config
from test_source_containers import stored

from infra.errors import StorageError
from infra.files.publish import write_bytes
from infra.files.storage import exists, iter_files, join, list_files, read_json
from pipelines.sets.clean import clean
from pipelines.sharding.files import FileList, SourceFile
from pipelines.sharding.inputs import pages
from pipelines.sharding.inputs.pages import PART, drop_old_listings, list_in_parts, remove_listings
from pipelines.sharding.sources import list_sources


def test_a_folders_files_come_in_one_order_everywhere(s3: str, tmp_path: Path) -> None:
    names = ["a.png", "a/b.png", "a-b.png", "a/c/d.png", "a.b/e.png", "ä.png", "z", "a/c.png", "B.png"]
    for place in (str(tmp_path), s3):
        for name in names:
            write_bytes(join(place, name), b"x" * len(name))
        assert list(iter_files(place)) == [(name, len(name)) for name in sorted(names)]
    assert [name for name, _ in iter_files(s3, "a.png")] == sorted(names)[sorted(names).index("a.png") + 1 :]


def test_a_stopped_listing_is_continued_behind_its_last_part(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number:03d}.png" for number in range(25)]
    for name in names:
        write_bytes(join(s3, "in", name), b"x")
    monkeypatch.setattr(pages, "FILES_A_PART", 10)
    begun: list[str] = []

    def stops(uri: str, after: str = "") -> object:
        begun.append(after)
        yield from itertools.islice(iter_files(uri, after), 15 if len(begun) == 1 else None)
        if len(begun) == 1:
            raise StorageError("the server is gone", where=uri, todo="again")

    monkeypatch.setattr(pages, "iter_files", stops)
    uri, output = join(s3, "in"), join(s3, "out")
    with pytest.raises(StorageError, match="the server is gone"):
        list(list_in_parts(uri, output))
    assert [name for name, _ in list_in_parts(uri, output)] == names
    assert begun == ["", "009.png"]
    parts = list(list_files(join(output, ".listing")))
    assert [len(read_json(part)) for part in parts] == [10, 10, 5]

    write_bytes(join(s3, "in", "new.png"), b"x")  # before any shard was written a finished listing is made anew
    assert [name for name, _ in list_in_parts(uri, output, keep=False)] == [*names, "new.png"], "in a dry run too"
    drop_old_listings(output)
    assert [name for name, _ in list_in_parts(uri, output)] == [*names, "new.png"]
    write_bytes(join(output, "shards", "000000.tar"), b"x")
    write_bytes(join(s3, "in", "newer.png"), b"x")
    drop_old_listings(output)
    for keep in (True, False):
        found = [name for name, _ in list_in_parts(uri, output, keep=keep)]
        assert found == [*names, "new.png"], "those that the plan is of"
    remove_listings(output)
    assert list(list_files(output)) == [join(output, "shards", "000000.tar")]


def test_a_listing_that_was_stopped_long_ago_is_made_anew(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lack what came into the bucket since, into the range that it had listed."""
    monkeypatch.setattr(pages, "FILES_A_PART", 2)
    output = join(s3, "out")
    part = join(output, ".listing", "0" * 16 + "-000000.json")
    for age, kept in ((3600, True), (25 * 3600, False)):
        write_bytes(part, json.dumps([["0.png", 1], ["1.png", 1]]).encode())
        monkeypatch.setattr(pages, "modified_seconds", lambda uri, age=age: time.time() - age)
        drop_old_listings(output)
        assert exists(part) == kept


def test_verify_and_clean_know_a_listing(s3: str) -> None:
    """It is there until MLflow has the set's run."""
    assert re.fullmatch(PART, f".listing/{'0a' * 8}-000123.json")
    output = join(s3, "set")
    write_bytes(join(output, "run.json"), b"{}")
    write_bytes(join(output, ".listing", "0" * 16 + "-000000.json"), b"[]")
    assert clean(output) == []


def test_a_racing_driver_takes_the_others_parts(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write_bytes(join(s3, "in", f"{number}.png"), b"x")
    monkeypatch.setattr(pages, "FILES_A_PART", 2)
    one = list_in_parts(join(s3, "in"), join(s3, "out"))
    first = [next(one), next(one)]
    write_bytes(join(s3, "in", "2a.png"), b"x")
    other = list(list_in_parts(join(s3, "in"), join(s3, "out")))
    assert first + list(one) == other
    assert [name for name, _ in other] == ["0.png", "1.png", "2.png", "2a.png", "3.png", "4.png", "5.png"]


def test_sources_on_s3_are_listed_through_parts(s3: str, tmp_path: Path) -> None:
    save_photos(tmp_path / "in", [(40, 40)] * 3)
    source = stored(tmp_path / "in", join(s3, "in"))
    config = shard_config(source, join(s3, "out"))
    files = list_sources(config.sources, config.output)
    assert list(files) == list(list_sources(config.sources))
    assert len(list(list_files(join(config.output, ".listing")))) == 1


def test_a_list_of_files_is_read_like_a_list() -> None:
    plain = [SourceFile(f"k{n}", f"s{n % 3}", f"n\udcff{n}", f"/u{n}", n, identity=f"{n}") for n in range(50)]
    files = FileList(plain)
    assert list(files) == plain
    assert (files[3], files[-1], files[40:60], files[7:7], files[::-7]) == (
        plain[3],
        plain[-1],
        plain[40:60],
        [],
        plain[::-7],
    )
    with pytest.raises(IndexError):
        files[50]
    assert list(pickle.loads(pickle.dumps(files.part(10, 20)))) == plain[10:20]
    assert len(pickle.dumps(files.part(10, 11))) < len(pickle.dumps(files)) / 2
    assert files.counts() == {"s0": 17, "s1": 17, "s2": 16}
    assert files.repeated_keys() == set()
    assert FileList([*plain, plain[4], plain[4]]).repeated_keys() == {"k4"}
