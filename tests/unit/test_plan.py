"""The plan: every crop and draw of every file appears exactly once, under its own key, by a pure function."""

import hashlib
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from photos import save_photos, shard_config

from infra import DataError
from infra.config import canonical_json
from infra.shards.shard import KEY_PATTERN
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.files import FileList, SourceFile
from pipelines.sharding.inputs import listing
from pipelines.sharding.plan import plan_shards, source_id
from pipelines.sharding.sources import list_sources

NAME = st.text(st.sampled_from("ab-_. é/写"), min_size=1, max_size=70).filter(lambda name: "//" not in f"/{name}")
FILES = st.lists(NAME, min_size=1, max_size=12, unique=True)
COUNTS = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 7))


def config(num_crops: int, num_draws: int, samples_per_shard: int) -> ShardConfig:
    crop = {"kind": "random", "size_px": 64, "num_per_image": num_crops}
    return shard_config("photos", "out", crop=crop, draws=num_draws, samples_per_shard=samples_per_shard)


def listed(names: list[str], monkeypatch: pytest.MonkeyPatch, source_names: tuple[str, ...] = ("set",)) -> Any:
    """`list_sources` over sources that all hold the files `names`."""
    folders = [{"kind": "folder", "name": name, "path": f"somewhere/{i}"} for i, name in enumerate(source_names)]
    values = {"job": "shard", "output": "out", "sources": folders}

    def found(path: str, *_: Any) -> list[listing.Found]:
        return [listing.Found(name, f"{path}/{name}", 7) for name in sorted(names)]

    monkeypatch.setattr(listing, "list_place", found)
    return list_sources(ShardConfig.model_validate(values).sources)


@given(FILES, COUNTS)
def test_every_sample_stands_exactly_once(names: list[str], counts: tuple[int, int, int]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        files = listed([f"{name}.png" for name in names], monkeypatch)
    num_crops, num_draws, samples_per_shard = counts
    shards = plan_shards(files, config(*counts))
    assert [shard.samples for shard in shards] == [shard.samples for shard in plan_shards(files, config(*counts))]
    assert [shard.samples for shard in pickle.loads(pickle.dumps(shards[:]))] == [shard.samples for shard in shards]
    samples = [sample for shard in shards for sample in shard.samples]
    assert len(samples) == len(names) * num_crops * num_draws
    assert len({sample.key for sample in samples}) == len(samples)
    assert all(KEY_PATTERN.fullmatch(sample.key) for sample in samples)
    assert all(sample.key.startswith(f"{sample.crop_key}-") for sample in samples)
    assert len({sample.crop_key for sample in samples}) == len(names) * num_crops
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(len(shard.samples) == samples_per_shard for shard in shards[:-1])
    assert [file for file in files for _ in range(num_crops * num_draws)] == [sample.file for sample in samples]


@given(st.lists(st.sampled_from(["a", "b", "dir/a", "other/a", "dir/b", "a-b", "a b", "A"]), min_size=1, unique=True))
def test_clashing_names_get_keys_of_their_own(stems: list[str]) -> None:
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".png", ".jpg")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        files = listed(names, monkeypatch, source_names=("one", "one-a", "two"))
    assert len({file.key for file in files}) == 3 * len(names)


def test_keys_tell_the_file_and_do_not_change_with_its_place(tmp_path: Path) -> None:
    for place in ("x", "y/z"):
        save_photos(tmp_path / place / "sub", [(8, 8)])
    one, other = (list_sources(shard_config(tmp_path / place, "out").sources) for place in ("x", "y/z"))
    assert one[0].key == "set-00"
    assert [(file.key, file.name) for file in one] == [(file.key, file.name) for file in other]
    assert one[0].uri != other[0].uri
    assert source_id(one) == source_id(other)


def test_a_folder_is_the_same_source_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_photos(tmp_path / "photos" / "sub", [(8, 8), (8, 9)])
    monkeypatch.chdir(tmp_path)
    paths = ["photos", "./photos", "photos/", str(tmp_path / "photos")]
    listings = [list_sources(shard_config(path, "out").sources) for path in paths]
    assert {tuple((file.key, file.name) for file in files) for files in listings} == {
        (("set-00", "sub/00.png"), ("set-01", "sub/01.png"))
    }


def test_the_source_id_sees_names_sizes_and_order() -> None:
    file = SourceFile("k", "set", "a.png", "/x/a.png", 7)
    changed = [SourceFile("k", "set", "b.png", "/x/a.png", 7), SourceFile("k", "set", "a.png", "/x/a.png", 8)]
    other = SourceFile("l", "set", "c.png", "/x/c.png", 7)
    ids = [
        source_id(FileList(files)) for files in ([file], [changed[0]], [changed[1]], [file, other], [other, file], [])
    ]
    assert len(set(ids)) == len(ids)
    assert source_id(FileList([SourceFile("other key", "set", "a.png", "s3://b/a.png", 7)])) == ids[0]


def test_the_source_id_is_that_of_the_whole_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sharding.plan.LISTED_AT_ONCE", 2)
    for count in range(6):
        files = [SourceFile(f"k{i}", "set", f"{i}.png", "u", i, identity="x" * (i == 1)) for i in range(count)]
        listed = [[file.source, file.name, file.num_bytes, *filter(None, [file.identity])] for file in files]
        assert source_id(FileList(files)) == hashlib.sha256(canonical_json(listed)).hexdigest()[:16]


def test_a_long_name_is_cut_and_keeps_its_identity() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        files = listed([f"{'x' * 100}{number}.png" for number in range(3)], monkeypatch)
    assert len({file.key for file in files}) == 3
    assert all(len(file.key) <= 48 for file in files)


def test_the_same_file_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="the same name") as caught:
        listed(["a.png"], monkeypatch, source_names=("set", "set"))
    assert "different names" in caught.value.todo


def test_files_of_a_package_are_found_or_named() -> None:
    def files(package: str, *names: str) -> list[SourceFile]:
        source = {"kind": "package", "name": "p", "package": package, "files": names}
        values = {"job": "shard", "output": "out", "sources": [source]}
        return list_sources(ShardConfig.model_validate(values).sources)

    (found,) = files("infra.files", "weights.yaml")
    assert PurePosixPath(found.uri).name == "weights.yaml"
    assert found.num_bytes == Path(found.uri).stat().st_size
    with pytest.raises(DataError, match=r"holds no file nothing\.png"):
        files("infra", "nothing.png")
    with pytest.raises(DataError, match="not installed"):
        files("no_such_package", "x.png")


def test_many_samples_are_cut_into_full_shards() -> None:
    files = [SourceFile(f"k{i}", "s", f"{i}.png", f"/x/{i}.png", 1) for i in range(20_000)]
    shards = plan_shards(files, config(5, 1, 256))
    assert sum(len(shard.samples) for shard in shards) == 100_000
    assert len(shards) == 391
