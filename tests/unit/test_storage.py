"""Storage, the same on a local folder and on S3: at most one winner, never a part of a file, every error explained."""

import ctypes
import errno
import hashlib
import os
import posix
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import s3fs

from infra import StorageError
from infra.files import publish, storage
from infra.files.publish import (
    download,
    download_folder,
    ensure_writable,
    make_once,
    publish_if_absent,
    put_if_absent,
    shared_copy,
    upload,
    upload_folder,
    write_bytes,
)
from infra.files.storage import exists, join, list_files, read_bytes, read_json, read_range, remove, sha256_file


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, local or on S3."""
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "place")


def race(call: Callable[[int], Any], num_threads: int = 8) -> list[Any]:
    """The results of `call(0)`, `call(1)`, ... begun together."""
    barrier = threading.Barrier(num_threads)
    results: list[Any] = [None] * num_threads

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = call(number)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion on the results
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_of_racing_writers_one_wins(place: str) -> None:
    for attempt in range(3):
        uri = join(place, "records", f"{attempt}.json")
        won = race(lambda number, uri=uri: put_if_absent(uri, b"%d" % number))
        assert sorted(won) == [False] * 7 + [True]
        assert read_bytes(uri) == b"%d" % won.index(True)
    assert len(list_files(place)) == 3


def test_of_racing_publishers_one_wins(place: str, tmp_path: Path) -> None:
    files = []
    for number in range(8):
        files.append(tmp_path / f"{number}.tar")
        files[-1].write_bytes(b"%d" % number * 1000)
    won = race(lambda number: publish_if_absent(files[number], join(place, "shards", "0.tar")))
    assert sorted(won) == [False] * 7 + [True]
    assert read_bytes(join(place, "shards", "0.tar")) == files[won.index(True)].read_bytes()
    assert list(list_files(place)) == [join(place, "shards", "0.tar")]


def test_a_file_in_several_parts_is_published_once_too(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are uploaded in parts; the condition is then on the last request."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    file = tmp_path / "big.tar"
    file.write_bytes(os.urandom(1 << 20) * 11)
    assert publish_if_absent(file, join(s3, "big.tar"))
    etag = storage.s3_filesystem().info(join(s3, "big.tar"))["ETag"]
    assert "-3" in etag, "three parts"
    assert not publish_if_absent(file, join(s3, "big.tar"))
    assert list_files(s3) == {join(s3, "big.tar"): 11 << 20}
    assert hashlib.sha256(read_bytes(join(s3, "big.tar"))).hexdigest() == sha256_file(file)


def test_writing_replaces_and_reading_returns_the_whole(place: str) -> None:
    uri = join(place, "a", "b.bin")
    assert not exists(uri)
    write_bytes(uri, b"old")
    write_bytes(uri, b"new content")
    assert exists(uri)
    assert not exists(join(place, "a"))
    assert read_bytes(uri) == b"new content"
    write_bytes(join(place, "empty"), b"")
    assert read_bytes(join(place, "empty")) == b""


def test_a_range_is_read_exactly_or_not_at_all(place: str) -> None:
    uri = join(place, "x")
    write_bytes(uri, bytes(range(100)))
    assert read_range(uri, 10, 5) == bytes(range(10, 15))
    assert read_range(uri, 0, 100) == bytes(range(100))
    with pytest.raises(StorageError, match="ends 5 bytes early"):
        read_range(uri, 90, 15)
    with pytest.raises(StorageError):
        read_range(uri, 200, 5)


def test_listing_keeps_the_given_name_and_one_order_everywhere(place: str) -> None:
    names = ["a/x.png", "a-b/x.png", "a/b/y.png", "B/z.png", "a.png", "ä/ö.png"]
    for name in names:
        write_bytes(join(place, "set", name), name.encode())
    write_bytes(join(place, "set2", "other.png"), b"")
    expected = {join(place, "set", name): len(name.encode()) for name in sorted(names)}
    for uri in (join(place, "set"), join(place, "set/")):
        assert list(list_files(uri).items()) == list(expected.items())
    assert list_files(join(place, "nothing")) == {}


def test_relative_paths_are_listed_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bytes("out/shards/0.tar", b"x")
    for uri in ("out", "./out", "out/", "out//shards/.."):
        assert list(list_files(uri)) == [join(uri, "shards/0.tar")]


def test_removing_takes_an_emptied_local_folder_along(place: str) -> None:
    for name in ("one", "two"):
        write_bytes(join(place, "folder", name), b"x")
    remove(join(place, "folder", "one"))
    assert list(list_files(place)) == [join(place, "folder", "two")]
    remove(join(place, "folder", "two"))
    assert list_files(place) == {}
    assert not (Path(place) / "folder").exists()


def test_folders_travel_whole_and_the_last_file_last(place: str, tmp_path: Path, monkeypatch: Any) -> None:
    source = tmp_path / "model"
    for name in ("a.json", "part/weights.bin", "z.json"):
        write_bytes(str(source / name), name.encode() * 10)
    order: list[str] = []
    real = publish.upload
    monkeypatch.setattr(publish, "upload", lambda local, uri: (order.append(uri), real(local, uri)))
    upload_folder(source, join(place, "model"), last="a.json")
    assert order[-1] == join(place, "model", "a.json")
    copy = download_folder(join(place, "model"), tmp_path / "copy")
    found = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert found == {name: name.encode() * 10 for name in ("a.json", "part/weights.bin", "z.json")}


def test_an_object_named_out_of_its_folder_is_refused(s3: str, tmp_path: Path) -> None:
    storage.s3_filesystem().pipe_file(f"{s3}/model/part/../../outside", b"x")
    with pytest.raises(StorageError, match="leads out of its folder"):
        download_folder(join(s3, "model"), tmp_path / "in" / "copy")
    assert not (tmp_path / "in" / "outside").exists()
    assert not (tmp_path / "outside").exists()


def test_uploads_replace_and_downloads_are_equal(place: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"first")
    upload(tmp_path / "x", join(place, "x"))
    (tmp_path / "x").write_bytes(b"second")
    upload(tmp_path / "x", join(place, "x"))
    (tmp_path / "here").mkdir()
    assert download(join(place, "x"), tmp_path / "here").read_bytes() == b"second"


def test_what_is_not_there_is_said_to_be_missing(place: str, tmp_path: Path) -> None:
    absent = join(place, "absent")
    calls: list[Callable[[], Any]] = [
        lambda: read_bytes(absent),
        lambda: read_range(absent, 0, 1),
        lambda: download_or_read(absent, tmp_path),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="no such file") as caught:
            call()
        assert caught.value.where == absent
        assert str(caught.value).count("\n") == 2


def download_or_read(uri: str, folder: Path) -> bytes:
    return download(uri, folder).read_bytes() if storage.is_s3(uri) else read_bytes(uri)


def test_damaged_json_is_told(place: str) -> None:
    write_bytes(join(place, "run.json"), b'{"a": 1')
    with pytest.raises(StorageError, match="not JSON"):
        read_json(join(place, "run.json"))


def test_a_place_that_can_be_written_is_left_as_it_was(place: str) -> None:
    ensure_writable(join(place, "out"))
    assert list_files(place) == {}


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for call in (
        lambda: ensure_writable(str(tmp_path / "file" / "out")),
        lambda: write_bytes(str(tmp_path / "file" / "out"), b""),
        lambda: publish_if_absent(tmp_path / "file", str(tmp_path / "file" / "out")),
    ):
        with pytest.raises(StorageError):
            call()


def test_no_permission_is_told() -> None:
    """As root nothing is forbidden, so an ordinary user tries."""
    code = (
        "import os, sys, infra.files.publish\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: infra.files.publish.ensure_writable(sys.argv[1])\n"
        "except infra.StorageError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
        Path(folder).chmod(0o755)
    assert done.stdout.startswith("cannot write: Permission denied\n")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setattr(os, "fsync", full)
    target = str(tmp_path / "out" / "x")
    for call in (
        lambda: put_if_absent(target, b"x"),
        lambda: write_bytes(target, b"x"),
        lambda: publish_if_absent(tmp_path / "source", target),
        lambda: upload(tmp_path / "source", target),
    ):
        with pytest.raises(StorageError, match="No space left"):
            call()
        assert list_files(str(tmp_path / "out")) == {}


def test_a_file_that_vanishes_while_listing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(str(tmp_path / "a"), b"x")
    write_bytes(str(tmp_path / ".b.tmp"), b"x")
    real = os.path.isfile

    def is_file(path: str) -> bool:
        there = real(path)
        if path.startswith(str(tmp_path)) and path.endswith(".tmp"):
            Path(path).unlink(missing_ok=True)
        return there

    monkeypatch.setattr("os.path.isfile", is_file)
    assert list(list_files(str(tmp_path))) == [str(tmp_path / "a")]


def test_s3_errors_are_explained(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        put_if_absent("s3://no-such-bucket-here/x", b"")
    with pytest.raises(StorageError, match="can have this name"):
        put_if_absent("s3://Not_A_Bucket!/x", b"")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setattr(storage, "s3_filesystem", lambda: s3fs.S3FileSystem(skip_instance_cache=True))
    with pytest.raises(StorageError, match="no S3 credentials"):
        exists(join(s3, "x"))


@pytest.mark.parametrize(
    "publish_",
    [
        lambda source, target: write_bytes(target, b"x"),
        lambda source, target: put_if_absent(target, b"x"),
        lambda source, target: publish_if_absent(source, target),
        lambda source, target: upload(source, target),
        lambda source, target: make_once(Path(target), lambda path: path.write_bytes(b"x")),
    ],
)
def test_file_and_folder_are_synced_around_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish_: Callable[[Path, str], Any]
) -> None:
    """Content first, then the name: after a power cut a name without content would pass for a file."""
    source, target = tmp_path / "source", tmp_path / "out" / "x"
    source.write_bytes(b"x")
    synced: list[tuple[bool, bool]] = []

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), target.exists()))
        posix.fsync(descriptor)  # the real one: `no_syncs` replaces that of `os`

    monkeypatch.setattr(os, "fsync", fsync)
    publish_(source, str(target))
    assert synced == [(False, False), (True, True)]


def test_a_file_is_made_once_and_seen_whole(tmp_path: Path) -> None:
    target, made = tmp_path / "cache" / "weights.bin", []

    def make(path: Path) -> None:
        made.append(path)
        for part in range(5):
            with open(path, "ab") as file:
                file.write(b"%d" % part * 1000)
            time.sleep(0.01)

    def use(_: int) -> int:
        make_once(target, make)
        return len(target.read_bytes())

    assert race(use) == [5000] * 8
    assert len(made) == 1


class Counting:
    """The S3 client; `fetched` are the files that were downloaded."""

    def __init__(self) -> None:
        self.client, self.fetched = storage.s3_filesystem(), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def get_file(self, uri: str, path: str) -> None:
        self.fetched.append(uri.rpartition("/")[2])
        self.client.get_file(uri, path)


def test_a_node_shares_one_copy_while_it_is_used(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ccsr.json", "part/weights.bin"):
        write_bytes(join(s3, "model", name), name.encode() * 1000)
    client = Counting()
    monkeypatch.setattr(storage, "s3_filesystem", lambda: client)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    barrier = threading.Barrier(4)

    def use(_: int) -> tuple[Path, bytes]:
        with shared_copy(join(s3, "model"), "ccsr.json") as copy:
            content = (copy / "part" / "weights.bin").read_bytes()
            barrier.wait(60)
        return copy, content

    found = race(use, 4)
    assert {content for _, content in found} == {b"part/weights.bin" * 1000}
    assert sorted(client.fetched) == ["ccsr.json", "weights.bin"]
    assert not found[0][0].exists(), "the last one removes it"
    write_bytes(join(s3, "model", "ccsr.json"), b"another version")
    with shared_copy(join(s3, "model"), "ccsr.json") as other:
        assert other != found[0][0]
        with shared_copy(join(s3, "model"), "ccsr.json", again=True) as same:
            assert same == other
        assert (other / "ccsr.json").read_bytes() == b"another version"
    assert len(client.fetched) == 6
    with shared_copy(str(tmp_path), "any") as local:
        assert local == tmp_path


class Refusing:
    """An S3 client whose calls raise `error` the first `times` times."""

    def __init__(self, error: BaseException, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def info(self, uri: str) -> dict[str, str]:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return {"type": "file", "size": 0}

    pipe_file = put_file = get_file = lambda self, *args, **kwargs: self.info("")


def test_a_busy_server_is_asked_again_and_never_taken_for_an_absent_file(
    monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    client = Refusing(OSError(16, "Please reduce your request rate."), times=3)
    monkeypatch.setattr(storage, "s3_filesystem", lambda: client)
    assert exists("s3://b/x")
    assert client.calls == 4
    assert len(waits) == 3
    client.calls, client.times = 0, 100
    with pytest.raises(StorageError, match="reduce your request rate"):
        exists("s3://b/x")


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_local_disk_is_no_fault_of_s3(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = Refusing(OSError(number, os.strerror(number)), times=100)
    monkeypatch.setattr(storage, "s3_filesystem", lambda: client)
    with pytest.raises(StorageError, match=os.strerror(number)) as caught:
        download("s3://b/x", tmp_path)
    assert client.calls == 1, "it is not tried again"
    assert caught.value.where == str(tmp_path / "x")
    assert "s3://" not in str(caught.value)


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(
    ("error", "present", "outcome"),
    [
        (FileExistsError("pre-conditions"), True, False),  # AWS, moto
        (OSError(22, "PreconditionFailed"), True, False),  # Ceph
        (OSError(22, "BadDigest"), False, None),  # any other bad request: not to be taken for "already there"
        (PermissionError("AccessDenied"), False, None),
    ],
)
def test_a_refused_conditional_put_is_told_from_a_failed_one(
    error: OSError, present: bool, outcome: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = Refusing(error, times=1)
    monkeypatch.setattr(storage, "s3_filesystem", lambda: client)
    monkeypatch.setattr(publish, "exists", lambda uri: present)
    (tmp_path / "x").write_bytes(b"")
    for call in (lambda: put_if_absent("s3://b/x", b""), lambda: publish_if_absent(tmp_path / "x", "s3://b/x")):
        client.calls = 0
        if outcome is None:
            with pytest.raises(StorageError):
                call()
        else:
            assert call() is outcome
        assert client.calls == 1, "such an answer is final"


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "Invalid endpoint: localhost:9000"),
        ("AWS_ENDPOINT_URL", "http://[localhost", "Invalid"),
        ("AWS_PROFILE", "absent", "absent"),
        ("AWS_DEFAULT_REGION", "eu west", "eu west"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "sometimes", "sometimes"),
        ("AWS_MAX_ATTEMPTS", "many", "many"),
    ],
)
def test_a_setting_that_the_s3_client_refuses_is_named(
    name: str, value: str, cause: str, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    for setting in ("AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(setting, "us-east-1" if "REGION" in setting else "test")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "s3_filesystem", storage.s3_filesystem.__wrapped__)
    with pytest.raises(StorageError) as caught:
        read_bytes("s3://bucket/file")
    assert waits == [], "it is not tried again"
    assert cause in caught.value.what
    assert f"{name}={value}" in caught.value.where
    assert "SECRET" not in caught.value.where


def no_renameat2(number: int) -> Any:
    def fail(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    return lambda *_, **__: SimpleNamespace(renameat2=fail)


@pytest.mark.parametrize("rename", ["renameat2", "lock", "no function"])
def test_of_racing_writers_one_publishes_where_there_are_no_hard_links(
    rename: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    if rename == "lock":
        monkeypatch.setattr("ctypes.CDLL", no_renameat2(errno.EINVAL))
    elif rename == "no function":
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    check_races(tmp_path)


def check_races(folder: Path) -> None:
    place = folder / "run.json"
    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n: put_if_absent(str(place), b"%d" % n), range(8)))
        assert sum(won) == 1
        assert place.read_bytes() == b"%d" % won.index(True)
        assert not put_if_absent(str(place), b"later")
        place.unlink()
    with publish.staging(str(folder / "a.tar")) as tar:
        tar.write_bytes(b"shard")
        assert publish_if_absent(tar, str(folder / "a.tar"))
    assert not publish_if_absent(folder / "a.tar", str(folder / "a.tar"))
    assert [path.name for path in folder.iterdir()] == ["a.tar"], "no lock, no temporary file"


def test_a_lock_that_a_killed_writer_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", no_renameat2(errno.EINVAL))
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "not supported")))
    monkeypatch.setattr(publish, "LOCK_SECONDS", 0.1)
    (tmp_path / ".a.json.publishing").touch()
    with pytest.raises(StorageError, match="another writer") as caught:
        put_if_absent(str(tmp_path / "a.json"), b"")
    assert caught.value.where.endswith(".a.json.publishing")


def test_a_real_right_is_still_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
    monkeypatch.setattr("ctypes.CDLL", no_renameat2(errno.EACCES))
    with pytest.raises(StorageError, match="Permission denied"):
        put_if_absent(str(tmp_path / "a.json"), b"")


@pytest.mark.parametrize("kind", ["vfat", "exfat-fuse"])
def test_an_output_without_hard_links(kind: str, tmp_path: Path) -> None:
    """Real file systems, where this machine may mount one: by the kernel, or by FUSE (exfat-fuse, exfatprogs)."""
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 8 << 20)

    def run(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, timeout=30, text=True).stdout.strip()

    device = ""
    try:
        run(f"mkfs.{kind.removesuffix('-fuse')}", image)
        device = run("losetup", "--find", "--show", image)
        run(*(("mount", "-t", kind) if kind == "vfat" else (f"mount.{kind}",)), device, folder)
    except (OSError, subprocess.SubprocessError) as error:
        if device:
            run("losetup", "--detach", device)
        pytest.skip(f"no {kind} can be mounted here: {getattr(error, 'stderr', '') or error}")
    try:
        (folder / "file").touch()
        with pytest.raises(OSError, match="not permitted"):
            (folder / "linked").hardlink_to(folder / "file")
        (folder / "file").unlink()
        check_races(folder)
    finally:
        run("umount", folder)
        run("losetup", "--detach", device)


@pytest.mark.parametrize("error", [requests.ConnectionError("no answer"), BrokenPipeError(errno.EPIPE, "closed")])
def test_a_temporary_folder_is_not_blamed_for_a_server_or_a_pipe(error: OSError) -> None:
    with pytest.raises(type(error)) as caught, publish.temporary_folder("test"):
        raise error
    assert caught.value is error
