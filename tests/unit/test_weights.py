"""Third-party weight files: the table, where they are looked for, fetching, checking, and what is said when missing."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import infra.files.weights
from infra import ConfigError, ModelError, StorageError
from infra.files import storage
from infra.files.publish import upload_folder, write_bytes
from infra.files.weights import (
    BASE_HUB_ID,
    WeightFile,
    check_weights,
    fetch_weights,
    find_weights,
    list_weights,
    weight_files,
)

GOOD = b"weights" * 1000


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three small files in place of the real table; no environment of the machine's."""
    sha256 = hashlib.sha256(GOOD).hexdigest()
    files = [
        WeightFile("known", "test", "known.pth", "https://example.invalid/known.pth", "here", "MIT", sha256),
        WeightFile("pair", "test", "pair/a.bin", "https://huggingface.co/x/y/a.bin", "here", "MIT", None),
        WeightFile("pair", "test", "pair/b.bin", "https://huggingface.co/x/y/b.bin", "here", "MIT", None),
        WeightFile("manual", "test", "manual.ckpt", None, "the authors' drive", "MIT", None),
    ]
    monkeypatch.setattr(infra.files.weights, "weight_files", lambda: files)
    monkeypatch.delenv("CCSR_WEIGHTS", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    place = tmp_path / "mirror"
    (place / "pair").mkdir(parents=True)
    (place / "known.pth").write_bytes(GOOD)
    (place / "pair" / "a.bin").write_bytes(b"a")
    (place / "pair" / "b.bin").write_bytes(b"b")
    return place


@pytest.fixture
def server(mirror: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(mirror))) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def states(folder: Path | str) -> dict[str, str]:
    return {row["path"]: row["state"] for row in check_weights(str(folder))}


def test_fetch_from_a_folder_then_check(mirror: Path, tmp_path: Path) -> None:
    place = tmp_path / "weights"
    assert set(states(place).values()) == {"missing"}
    assert fetch_weights("known", str(place), str(mirror)) == place / "known.pth"
    assert fetch_weights("pair", str(place), str(mirror)) == place / "pair"
    expected = {"known.pth": "ok", "pair/a.bin": "ok", "pair/b.bin": "ok", "manual.ckpt": "missing"}
    assert states(place) == expected
    (place / "pair" / "b.bin").write_bytes(b"c")  # no published sha256, but the one of the first fetch
    assert states(place)["pair/b.bin"] == "wrong"
    (place / "sha256.json").unlink()
    assert states(place) == expected | {"pair/a.bin": "unverified", "pair/b.bin": "unverified"}
    assert [row["state"] for row in list_weights(str(place))] == ["present"] * 3 + ["missing"]


def test_fetch_over_http_and_from_the_hubs_mirror(
    mirror: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "weights"
    fetch_weights("known", str(place), server)
    assert (place / "known.pth").read_bytes() == GOOD
    (mirror / "x").mkdir()
    (mirror / "pair").rename(mirror / "x" / "y")
    monkeypatch.setenv("HF_ENDPOINT", server + "/")
    assert (fetch_weights("pair", str(place)) / "b.bin").read_bytes() == b"b"
    (mirror / "x" / "y" / "b.bin").unlink()
    with pytest.raises(StorageError, match="404"):
        fetch_weights("pair", str(tmp_path / "other"))
    assert not (tmp_path / "other" / "pair" / "b.bin").exists()


def test_a_fetched_file_with_other_bytes_is_refused_and_removed(mirror: Path, tmp_path: Path) -> None:
    (mirror / "known.pth").write_bytes(GOOD[:-1])
    with pytest.raises(ModelError, match="sha256 of what came"):
        fetch_weights("known", str(tmp_path / "weights"), str(mirror))
    assert os.listdir(tmp_path / "weights") == [".known.pth.lock"]


def test_a_file_that_is_there_is_kept_and_verified_when_found(mirror: Path, tmp_path: Path) -> None:
    fetch_weights("known", str(mirror), "http://127.0.0.1:1")
    (mirror / "known.pth").write_bytes(b"cut")
    with pytest.raises(ModelError, match="truncated or another file"):
        find_weights("known", str(mirror))


def test_lookup_order(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="ccsr weights fetch known"):
        find_weights("known")
    fetch_weights("known", mirror=str(mirror))
    assert find_weights("known") == tmp_path / "cache" / "ccsr" / "weights" / "known.pth"
    monkeypatch.setenv("CCSR_WEIGHTS", str(mirror))
    assert find_weights("known") == mirror / "known.pth"
    with pytest.raises(ModelError, match="known is not there"):
        find_weights("known", str(tmp_path / "empty"))


def test_a_prefix_in_s3_is_filled_checked_and_copied_to_the_cache(
    mirror: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cache = f"{s3}/w", tmp_path / "cache" / "ccsr" / "weights"
    monkeypatch.setenv("CCSR_WEIGHTS", place)
    with pytest.raises(ModelError, match="known is not there"):
        find_weights("known")
    assert fetch_weights("known", mirror=str(mirror)) == cache / "known.pth"
    assert fetch_weights("pair", mirror=str(mirror)) == cache / "pair"
    shutil.rmtree(cache)
    assert [row["state"] for row in list_weights()] == ["present"] * 3 + ["missing"]
    expected = {"known.pth": "ok", "pair/a.bin": "ok", "pair/b.bin": "ok", "manual.ckpt": "missing"}
    assert states(place) == expected
    assert (find_weights("pair") / "b.bin").read_bytes() == b"b"
    write_bytes(f"{place}/pair/b.bin", b"c")
    write_bytes(f"{place}/known.pth", GOOD[:-1])
    assert states(place) == expected | {"known.pth": "wrong", "pair/b.bin": "wrong"}
    with pytest.raises(ModelError, match="truncated or another file"):
        find_weights("known")
    assert fetch_weights("pair", str(tmp_path / "weights"), place).is_dir()  # S3 as a mirror


def test_a_download_that_is_interrupted_leaves_nothing_that_counts_as_present(
    mirror: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(mirror, f"{s3}/w", last="known.pth")
    monkeypatch.setenv("CCSR_WEIGHTS", f"{s3}/w")

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def get_file(self, uri: str, path: str) -> None:
            Path(path).write_bytes(GOOD[:10])
            raise KeyboardInterrupt

    client = storage.s3_filesystem()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "s3_filesystem", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            find_weights("known")
        with pytest.raises(KeyboardInterrupt):  # S3 as a mirror
            fetch_weights("pair", str(tmp_path / "weights"), f"{s3}/w")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == GOOD[:10]]
    assert find_weights("known").read_bytes() == GOOD
    assert (fetch_weights("pair", str(tmp_path / "weights"), f"{s3}/w") / "a.bin").read_bytes() == b"a"


def test_a_hub_id_is_a_repository_like_the_base(
    mirror: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [WeightFile("sd21-base", "base", f"sd21-base/{n}/config.json", None, "", "", None) for n in ("unet", "vae")]
    monkeypatch.setattr(infra.files.weights, "weight_files", lambda: files)
    with pytest.raises(ModelError, match="ccsr weights fetch team/base"):
        find_weights("team/base")
    for part in ("unet", "vae"):
        (mirror / "team" / "base" / "resolve" / "main" / part).mkdir(parents=True)
        (mirror / "team" / "base" / "resolve" / "main" / part / "config.json").write_text(part)
    monkeypatch.setenv("HF_ENDPOINT", server)
    found = fetch_weights("team/base")
    assert found == tmp_path / "cache" / "ccsr" / "weights" / "team" / "base" == find_weights("team/base")
    assert (found / "vae" / "config.json").read_text() == "vae"
    (tmp_path / "local" / "sd21-base" / "unet").mkdir(parents=True)
    (tmp_path / "local" / "sd21-base" / "vae").mkdir()
    for part in ("unet", "vae"):
        (tmp_path / "local" / "sd21-base" / part / "config.json").touch()
    assert find_weights(BASE_HUB_ID, str(tmp_path / "local")) == tmp_path / "local" / "sd21-base"


def test_what_a_program_cannot_fetch_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="by hand from the authors' drive"):
        fetch_weights("manual", str(tmp_path))
    with pytest.raises(ConfigError, match="choose one of known, manual, pair"):
        find_weights("vgg")


def test_the_real_table_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = weight_files()
    assert {file.name for file in files} >= {"sd21-base", "vgg16", "lpips-vgg", "dino", "dinov2", "inception"}
    assert len({file.path for file in files}) == len(files)
    for file in files:
        assert file.url is None or file.url.startswith("https://")
        assert file.sha256 is None or (len(file.sha256) == 64 and int(file.sha256, 16) > 0)
        # torch's hub names its files after the first digits of their sha256
        name = Path(file.path).stem
        if file.sha256 and "-" in name:
            assert file.sha256.startswith(name.rsplit("-", 1)[1])
    json.dumps(list_weights("nowhere"))
