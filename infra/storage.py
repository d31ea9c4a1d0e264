"""Files by path or s3:// URI: range reads, atomic writes, and publishing that happens at most once."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

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
    """Run an S3 call, again after the transient failures that its client lets through. All errors are OSErrors."""
    from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError
    from s3fs.core import S3_RETRYABLE_ERRORS
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    def attempt() -> ResultT:
        try:
            return call()
        except NoCredentialsError as error:
            raise PermissionError(errno.EACCES, "no S3 credentials are configured") from error
        except ParamValidationError as error:
            raise OSError(errno.EINVAL, "no bucket or object can have this name") from error
        except (BotoCoreError, *S3_RETRYABLE_ERRORS) as error:
            raise OSError(errno.EIO, str(error) or type(error).__name__) from error

    def transient(error: BaseException) -> bool:
        permanent = FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError
        # EINVAL is how s3fs tells that the request itself was refused: 400, 412, 416.
        return isinstance(error, OSError) and not isinstance(error, permanent) and error.errno != errno.EINVAL

    retrying = Retrying(
        retry=retry_if_exception(transient),
        stop=stop_after_attempt(6),
        wait=wait_random_exponential(multiplier=0.4, max=8),
        reraise=True,
    )
    return retrying(attempt)


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Turn an OSError in the block into a StorageError about `uri`."""
    try:
        yield
    except FileNotFoundError as error:
        what = "bucket" if is_s3(uri) and "write" in action else "file"
        raise StorageError(f"{action}: there is no such {what}", where=uri, todo="check the path") from error
    except PermissionError as error:
        raise StorageError(
            f"{action}: {error.strerror or 'permission denied'}",
            where=uri,
            todo="choose another place or ask for the right to it",
        ) from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(f"{action}: {reason}", where=uri, todo="check the place and retry") from error


def exists(uri: str) -> bool:
    """Whether a file (not a folder) is there."""
    with explained("cannot look", uri):
        if not is_s3(uri):
            return os.path.isfile(uri)
        try:  # not `isfile`, which takes a server that does not answer for a file that is not there
            return _retry(lambda: _s3().info(uri))["type"] == "file"
        except FileNotFoundError:
            return False


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    with explained("cannot read", uri):
        return _retry(lambda: _s3().cat_file(uri)) if is_s3(uri) else Path(uri).read_bytes()


def open_file(uri: str) -> BinaryIO:
    """The file, open to be read and sought in: on S3 by ranges, a few MiB at a time."""
    with explained("cannot read", uri):
        return _retry(lambda: _s3().open(uri, "rb")) if is_s3(uri) else open(uri, "rb")


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; StorageError where the file is shorter."""
    with explained("cannot read", uri):
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


def read_json(uri: str) -> Any:
    """The content of a JSON file; StorageError where it is damaged."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"the file is not JSON ({error})", where=uri, todo="restore it from a copy") from error


def list_files(uri: str) -> dict[str, int]:
    """URI -> size in bytes of all files below a folder, in the same order everywhere; an absent folder has none.

    Each begins with `uri` as it was given. Links to folders are not followed.
    """
    found: dict[str, int] = {}
    with explained("cannot list", uri):
        if is_s3(uri):
            root = uri.removeprefix("s3://").rstrip("/") + "/"
            for name, facts in _retry(lambda: _s3().find(uri, detail=True)).items():
                marker = facts["size"] == 0 and name.endswith(("/", "_$folder$"))  # a folder's, of consoles and Hadoop
                if name.startswith(root) and not marker:
                    found[name.removeprefix(root)] = facts["size"]
        else:
            for folder, _, names in os.walk(uri, onerror=_unless_absent):
                for path in (Path(folder, name) for name in names):
                    if path.is_file():
                        with suppress(FileNotFoundError):  # another writer's temporary file, gone by now
                            found[path.relative_to(uri).as_posix()] = path.stat().st_size
    return {join(uri, name): found[name] for name in sorted(found)}


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def modified_seconds(uri: str) -> float:
    """When the file was last written, in seconds since 1970."""
    with explained("cannot look", uri):
        return _retry(lambda: _s3().modified(uri)).timestamp() if is_s3(uri) else os.path.getmtime(uri)


def unfinished_uploads(uri: str) -> list[tuple[str, str, float]]:
    """(name below the s3:// prefix, upload id, seconds since 1970) of multipart uploads that were never completed.

    A listing of objects does not show them. At most the server's first 1000.
    """
    bucket, _, prefix = join(uri, "").removeprefix("s3://").partition("/")
    with explained("cannot list", uri):
        call = _s3().call_s3
        found = _retry(lambda: call("list_multipart_uploads", Bucket=bucket, Prefix=prefix)).get("Uploads", [])
    return [(one["Key"].removeprefix(prefix), one["UploadId"], one["Initiated"].timestamp()) for one in found]


def abort_upload(uri: str, upload_id: str) -> None:
    """Drop the parts of an unfinished multipart upload."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    with explained("cannot remove", uri):
        call = _s3().call_s3
        _retry(lambda: call("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id))


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole file at once, replacing what is there; a reader sees the old or the new, never a part."""
    with explained("cannot write", uri):
        if is_s3(uri):
            _retry(lambda: _s3().pipe_file(uri, data))
            return
        with _beside(uri) as temporary:
            _write(temporary, data)
            os.replace(temporary, uri)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Create the file with `data` unless it exists; True if this call created it. Of racing writers one wins."""
    with explained("cannot write", uri):
        if is_s3(uri):
            return _create_s3(uri, lambda: _s3().pipe_file(uri, data, mode="create"))
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
            return _create_s3(uri, lambda: _s3().put_file(str(local), uri, mode="create"))
        if local.parent == Path(uri).parent:
            _sync(local)
            return _link(local, uri)
        with _beside(uri) as temporary:
            _copy(local, temporary)
            return _link(temporary, uri)


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


def _create_s3(uri: str, put: Callable[[], Any]) -> bool:
    try:
        _retry(put)
    except FileExistsError:
        return False
    except OSError as error:
        # Some servers' refusal of a conditional put reaches us as EINVAL, like any other bad request.
        if error.errno == errno.EINVAL and exists(uri):
            return False
        raise
    return True


def ensure_writable(uri: str) -> None:
    """Fail now rather than after hours: StorageError unless a file can be created below `uri`."""
    probe = join(uri, f".writable-{secrets.token_hex(6)}")
    put_if_absent(probe, b"")
    with explained("cannot remove", probe):
        # Not `remove`: the folder is to stay.
        _retry(lambda: _s3().rm_file(probe)) if is_s3(probe) else os.unlink(probe)


def upload(local: Path, uri: str) -> None:
    """Copy a finished local file to `uri`, replacing what is there; a reader never sees a part."""
    with explained("cannot write", uri):
        if is_s3(uri):
            _retry(lambda: _s3().put_file(str(local), uri))
            return
        with _beside(uri) as temporary:
            _copy(local, temporary)
            os.replace(temporary, uri)


def remove(uri: str) -> None:
    """Remove one file; locally its folder goes too once it is empty."""
    with explained("cannot remove", uri):
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
        name = place.removeprefix(uri).lstrip("/")
        if ".." in name.split("/"):  # an object may have any name
            raise StorageError("the object's name leads out of its folder", where=place, todo="remove or rename it")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        download(place, target.parent)
    return folder


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a local file."""
    with explained("cannot read", str(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(uri: str, folder: Path) -> Path:
    """A local copy of one file; a local path is returned as it is."""
    if not is_s3(uri):
        return Path(uri)
    target = folder / uri.rsplit("/", 1)[-1]
    with explained("cannot read", uri):
        _retry(lambda: _s3().get_file(uri, str(target)))
    return target
