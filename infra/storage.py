"""Files by path or s3:// URI: range reads, atomic writes, and publishing that happens at most once."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from infra.errors import StorageError

ResultT = TypeVar("ResultT")


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri` and `parts` joined by slashes."""
    return "/".join([uri.rstrip("/"), *parts])


@cache
def _s3() -> Any:
    import s3fs

    # No listing cache: another process may have committed a shard a moment ago.
    return s3fs.S3FileSystem(use_listings_cache=False)


def _retry(call: Callable[[], ResultT]) -> ResultT:
    """Run an S3 call, again after the transient failures that its client lets through."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

    def transient(error: BaseException) -> bool:
        permanent = FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError
        text = str(error)
        known = "PreconditionFailed" in text or "pre-conditions" in text
        return isinstance(error, OSError) and not isinstance(error, permanent) and not known

    retrying = Retrying(
        retry=retry_if_exception(transient),
        stop=stop_after_attempt(6),
        wait=wait_exponential_jitter(initial=0.2, max=8),
        reraise=True,
    )
    return retrying(call)


@contextmanager
def _explained(action: str, uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{action}: there is no such file", where=uri, todo="check the path") from error
    except PermissionError as error:
        raise StorageError(
            f"{action}: permission denied", where=uri, todo="choose another place or ask for the right to it"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{action}: {reason}", where=uri, todo="check the place and retry") from error


def exists(uri: str) -> bool:
    """Whether a file (not a folder) is there."""
    with _explained("cannot look", uri):
        return _retry(lambda: _s3().isfile(uri)) if is_s3(uri) else os.path.isfile(uri)


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    with _explained("cannot read", uri):
        return _retry(lambda: _s3().cat_file(uri)) if is_s3(uri) else Path(uri).read_bytes()


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; StorageError where the file is shorter."""
    with _explained("cannot read", uri):
        if is_s3(uri):
            data = _retry(lambda: _s3().cat_file(uri, start=offset, end=offset + length))
        else:
            with open(uri, "rb") as file:
                data = os.pread(file.fileno(), length, offset)
    if len(data) != length:
        raise StorageError(
            f"the file ends {length - len(data)} bytes early", where=f"{uri} at byte {offset}", todo="`ccsr verify` it"
        )
    return data


def list_files(uri: str) -> dict[str, int]:
    """URI -> size in bytes of all files below a folder, sorted by name; an absent folder has none."""
    with _explained("cannot list", uri):
        if is_s3(uri):
            found = _retry(lambda: _s3().find(uri, detail=True))
            return {f"s3://{name}": found[name]["size"] for name in sorted(found)}
        return {str(path): path.stat().st_size for path in sorted(Path(uri).rglob("*")) if path.is_file()}


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole file at once, replacing what is there; a reader sees the old or the new, never a part."""
    with _explained("cannot write", uri):
        if is_s3(uri):
            _retry(lambda: _s3().pipe_file(uri, data))
            return
        temporary = _write_beside(uri, data)
        os.replace(temporary, uri)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Create the file with `data` unless it exists; True if this call created it. Of racing writers one wins."""
    with _explained("cannot write", uri):
        if is_s3(uri):
            return _create_s3(lambda: _s3().pipe_file(uri, data, mode="create"))
        return _link(_write_beside(uri, data), uri)


def publish_if_absent(local: Path, uri: str) -> bool:
    """Make a finished local file appear at `uri` unless it exists there; True if this call published it."""
    with _explained("cannot publish", uri):
        if is_s3(uri):
            return _create_s3(lambda: _s3().put_file(str(local), uri, mode="create"))
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
        shutil.copyfile(local, temporary)
        return _link(temporary, uri)


def _write_beside(uri: str, data: bytes) -> Path:
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _link(temporary: Path, uri: str) -> bool:
    try:
        os.link(temporary, uri)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _create_s3(put: Callable[[], Any]) -> bool:
    try:
        _retry(put)
    except FileExistsError:
        return False
    except OSError as error:
        # s3fs maps a refused conditional put to different errors for different servers.
        if "PreconditionFailed" in str(error) or "pre-conditions" in str(error) or error.errno == 22:
            return False
        raise
    return True


def ensure_writable(uri: str) -> None:
    """Fail now rather than after hours: StorageError unless a file can be created below `uri`."""
    probe = join(uri, f".writable-{secrets.token_hex(6)}")
    put_if_absent(probe, b"")
    with _explained("cannot remove", probe):
        _s3().rm_file(probe) if is_s3(probe) else os.unlink(probe)  # not `remove`: the folder is to stay


def upload(local: Path, uri: str) -> None:
    """Copy a finished local file to `uri`, replacing what is there; a reader never sees a part."""
    with _explained("cannot write", uri):
        if is_s3(uri):
            _retry(lambda: _s3().put_file(str(local), uri))
            return
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
        shutil.copyfile(local, temporary)
        os.replace(temporary, target)


def remove(uri: str) -> None:
    """Remove one file; locally its folder goes too once it is empty."""
    with _explained("cannot remove", uri):
        if is_s3(uri):
            _retry(lambda: _s3().rm_file(uri))
            return
        os.unlink(uri)
        if not any(Path(uri).parent.iterdir()):
            Path(uri).parent.rmdir()


def upload_folder(local: Path, uri: str, *, last: str) -> None:
    """Upload a folder's files, `last` (the one whose presence says that the rest is there) after all others."""
    files = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: (name == last, name)):
        upload(local / name, join(uri, name))


def download_folder(uri: str, folder: Path) -> Path:
    """A local copy of all files below `uri`; a local folder is returned as it is."""
    if not is_s3(uri):
        return Path(uri)
    for place in list_files(uri):
        target = folder / place.removeprefix(uri).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        download(place, target.parent)
    return folder


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(uri: str, folder: Path) -> Path:
    """A local copy of one file; a local path is returned as it is."""
    if not is_s3(uri):
        return Path(uri)
    target = folder / uri.rsplit("/", 1)[-1]
    with _explained("cannot read", uri):
        _retry(lambda: _s3().get_file(uri, str(target)))
    return target
