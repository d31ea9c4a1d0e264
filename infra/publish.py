"""Files that appear whole or not at all: written, published at most once, uploaded, downloaded."""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import StorageError
from infra.storage import exists, explained, is_s3, join, list_files, on_s3


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole file at once, replacing what is there; a reader sees the old or the new, never a part."""
    with explained("cannot write", uri):
        if is_s3(uri):
            on_s3(lambda s3: s3.pipe_file(uri, data))
            return
        with _beside(uri) as temporary:
            _write(temporary, data)
            os.replace(temporary, uri)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Create the file with `data` unless it exists; True if this call created it. Of racing writers one wins."""
    with explained("cannot write", uri):
        if is_s3(uri):
            return _create_s3(uri, lambda s3: s3.pipe_file(uri, data, mode="create"))
        with _beside(uri) as temporary:
            _write(temporary, data)
            return _link(temporary, uri)


@contextmanager
def staging(uri: str) -> Iterator[Path]:
    """A path to write a file at that `publish_if_absent` is to make appear at `uri`; removed at the end.

    Beside a local `uri`: publishing copies nothing, and what a killed writer leaves behind lies where it is looked for.
    An OSError in the block (a full disk) becomes a StorageError.
    """
    if is_s3(uri):
        with (
            explained("cannot write", tempfile.gettempdir()),
            tempfile.TemporaryDirectory(prefix="ccsr-upload-") as folder,
        ):
            yield Path(folder) / uri.rsplit("/", 1)[-1]
    else:
        with explained("cannot write", uri), _beside(uri) as temporary:
            yield temporary


def publish_if_absent(local: Path, uri: str) -> bool:
    """Make a finished local file appear at `uri` unless it exists there; True if this call published it.

    A file of `staging(uri)` is linked, any other copied.
    """
    with explained("cannot publish", uri):
        if is_s3(uri):
            return _create_s3(uri, lambda s3: s3.put_file(str(local), uri, mode="create"))
        if local.parent == Path(uri).parent:
            _sync(local)
            return _link(local, uri)
        with _beside(uri) as temporary:
            _copy(local, temporary)
            return _link(temporary, uri)


def upload(local: Path, uri: str) -> None:
    """Copy a finished local file to `uri`, replacing what is there; a reader never sees a part."""
    with explained("cannot write", uri):
        if is_s3(uri):
            on_s3(lambda s3: s3.put_file(str(local), uri))
            return
        with _beside(uri) as temporary:
            _copy(local, temporary)
            os.replace(temporary, uri)


def upload_folder(local: Path, uri: str, *, last: str) -> None:
    """Upload a folder's files, `last` (the one whose presence says that the rest is there) after all others."""
    files = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: (name == last, name)):
        upload(local / name, join(uri, name))


def download(uri: str, folder: Path) -> Path:
    """A local copy of one file; a local path is returned as it is."""
    if not is_s3(uri):
        return Path(uri)
    target = folder / uri.rsplit("/", 1)[-1]
    with explained("cannot read", uri):
        on_s3(lambda s3: s3.get_file(uri, str(target)))
    return target


def download_folder(uri: str, folder: Path) -> Path:
    """A local copy of all files below `uri`; a local folder is returned as it is."""
    if not is_s3(uri):
        return Path(uri)
    for place in list_files(uri):
        name = place.removeprefix(uri).lstrip("/")
        if ".." in name.split("/"):  # an object may have any name
            raise StorageError("the object's name leads out of its folder", where=place, todo="remove or rename it")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        download(place, target.parent)
    return folder


def ensure_writable(uri: str) -> None:
    """Fail now rather than after hours: StorageError unless a file can be created below `uri`."""
    probe = join(uri, f".writable-{secrets.token_hex(6)}")
    put_if_absent(probe, b"")
    with explained("cannot remove", probe):
        # Not `remove`: the folder is to stay.
        on_s3(lambda s3: s3.rm_file(probe)) if is_s3(probe) else os.unlink(probe)


def _create_s3(uri: str, put: Callable[[Any], Any]) -> bool:
    try:
        on_s3(put)
    except FileExistsError:
        return False
    except OSError as error:
        # Some servers' refusal of a conditional put reaches us as EINVAL, like any other bad request.
        if error.errno == errno.EINVAL and exists(uri):
            return False
        raise
    return True


@contextmanager
def _beside(uri: str) -> Iterator[Path]:
    """The name of a temporary file in `uri`'s folder, removed at the end unless it was renamed."""
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    _sync(target)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a record may not outlive, in a power cut, the file that it vouches for


def _link(temporary: Path, uri: str) -> bool:
    try:
        os.link(temporary, uri)
    except FileExistsError:
        return False
    return True
