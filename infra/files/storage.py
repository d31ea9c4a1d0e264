"""Files by path or s3:// URI: names, reads by range, listings, and errors that say what failed."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from infra.errors import StorageError, line_of

ResultT = TypeVar("ResultT")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of a local disk alone: no S3 error carries these numbers


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri` and `parts` joined by slashes."""
    return "/".join([uri.rstrip("/"), *parts])


def resolve(uri: str, name: str) -> str:
    """`name` below `uri`, or itself where it is an absolute path or a URI."""
    return name if is_s3(name) or os.path.isabs(name) else join(uri, name)


@cache
def s3_filesystem() -> Any:
    """The S3 client. StorageError for settings that it does not take."""
    import s3fs

    try:
        # No listing cache: another process may have committed a shard a moment ago.
        client = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        client.connect()  # reads every setting, asks no server
    except Exception as error:
        secret = re.compile("KEY|TOKEN")
        names = [name for name in sorted(os.environ) if name.startswith("AWS_") and not secret.search(name)]
        raise StorageError(
            f"the S3 client does not take its settings ({line_of(error)})",
            where=", ".join(f"{name}={os.environ[name]}" for name in names) or "~/.aws",
            todo="correct the setting that is named; an endpoint is written AWS_ENDPOINT_URL=http://HOST:PORT",
        ) from error
    return client


def on_s3(call: Callable[[Any], ResultT]) -> ResultT:
    """`call(client)`, again after the transient failures that s3fs lets through. All errors are OSErrors."""
    from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError
    from s3fs.core import S3_RETRYABLE_ERRORS
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    def attempt() -> ResultT:
        try:
            return call(s3_filesystem())
        except NoCredentialsError as error:
            raise PermissionError(errno.EACCES, "no S3 credentials are configured") from error
        except ParamValidationError as error:
            raise OSError(errno.EINVAL, "no bucket or object can have this name") from error
        except ValueError as error:  # of a proxy's address, for one
            raise OSError(errno.EINVAL, line_of(error)) from error
        except (BotoCoreError, *S3_RETRYABLE_ERRORS) as error:
            raise OSError(errno.EIO, str(error) or type(error).__name__) from error

    def transient(error: BaseException) -> bool:
        permanent = FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError
        if not isinstance(error, OSError) or isinstance(error, permanent):
            return False
        # EINVAL is how s3fs reports that the request itself was refused: 400, 412, 416.
        return error.errno not in (errno.EINVAL, *DISK_ERRORS)

    retrying = Retrying(
        retry=retry_if_exception(transient),
        stop=stop_after_attempt(6),
        wait=wait_random_exponential(multiplier=0.4, max=8),
        reraise=True,
    )
    return retrying(attempt)


@contextmanager
def explained(action: str, uri: str, *, local: Path | None = None) -> Iterator[None]:
    """Turn an OSError in the block into a StorageError about `uri`; a full disk's is about `local`, where the block
    writes what it reads from `uri`. Not a server's, which `requests` raises as OSErrors, nor a closed terminal's."""
    try:
        yield
    except FileNotFoundError as error:
        what = "bucket" if is_s3(uri) and "write" in action else "file"
        raise StorageError(f"{action}: there is no such {what}", where=uri, todo="check the path") from error
    except PermissionError as error:
        raise StorageError(
            f"{action}: {error.strerror or 'permission denied'}",
            where=uri,
            todo="set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to an account that may do this"
            if is_s3(uri)
            else "grant access with chmod or chown, or give another path",
        ) from error
    except OSError as error:
        if type(error).__module__ == "requests.exceptions" or (isinstance(error, BrokenPipeError) and not is_s3(uri)):
            raise
        reason = error.strerror or str(error) or type(error).__name__
        raise disk_error(error, local or uri) or StorageError(
            f"{action}: {reason}",
            where=uri,
            todo="check AWS_ENDPOINT_URL and the bucket's name, and run the same command again"
            if is_s3(uri)
            else "give another path, or run the same command again",
        ) from error


def disk_error(error: OSError, path: Path | str) -> StorageError | None:
    """The user's error where a local disk was full, over its quota or read-only when `path` was written."""
    if error.errno not in DISK_ERRORS:
        return None
    return StorageError(
        f"cannot write: {os.strerror(error.errno)}",
        where=str(path),
        todo="make room there, or use a folder on another disk (TMPDIR for temporary files), and run the same command "
        "again",
    )


@contextmanager
def full_disk(path: Path | str) -> Iterator[None]:
    """Turn what a full local disk raises in the block into a StorageError about `path`; other errors pass."""
    try:
        yield
    except OSError as error:
        if full := disk_error(error, path):
            raise full from error
        raise


def exists(uri: str) -> bool:
    """Whether a file (not a folder) is there."""
    return file_size(uri) is not None


def file_size(uri: str) -> int | None:
    """A file's size in bytes; None where there is none, or a folder."""
    with explained("cannot look", uri):
        try:  # not s3fs's `isfile`, which takes a server that does not answer for a file that is not there
            if is_s3(uri):
                info = on_s3(lambda s3: s3.info(uri))
                return info["size"] if info["type"] == "file" else None
            return os.stat(uri).st_size if os.path.isfile(uri) else None
        except FileNotFoundError:
            return None


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    with explained("cannot read", uri):
        return on_s3(lambda s3: s3.cat_file(uri)) if is_s3(uri) else Path(uri).read_bytes()


def open_file(uri: str, block_bytes: int | None = None) -> BinaryIO:
    """The file, open to be read and sought in: on S3 by ranges of `block_bytes`, by default a few MiB."""
    with explained("cannot read", uri):
        return on_s3(lambda s3: s3.open(uri, "rb", block_size=block_bytes)) if is_s3(uri) else open(uri, "rb")


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; StorageError where the file is shorter."""
    with explained("cannot read", uri):
        if is_s3(uri):
            data = on_s3(lambda s3: s3.cat_file(uri, start=offset, end=offset + length))
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
    return {join(uri, name): size for name, size in sorted(iter_files(uri))}


def iter_files(uri: str, after: str = "") -> Iterator[tuple[str, int]]:
    """(path below the folder, size in bytes) of what `list_files` lists, one by one, sorted by path.

    `after`: on S3, only the paths behind this one; the server sends pages of 1,000.
    """
    with explained("cannot list", uri):
        yield from _objects(uri, after) if is_s3(uri) else _walk(uri)


def _objects(uri: str, after: str) -> Iterator[tuple[str, int]]:
    bucket, _, prefix = join(uri, "").removeprefix("s3://").partition("/")
    more = {"StartAfter": prefix + after} if after else {}
    while True:
        page = on_s3(partial(_page, Bucket=bucket, Prefix=prefix, **more))
        for one in page.get("Contents", []):
            name = one["Key"].removeprefix(prefix)
            marker = one["Size"] == 0 and name.endswith(("/", "_$folder$"))  # a folder's, of consoles and Hadoop
            if name and not marker:
                yield name, one["Size"]
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _page(s3: Any, **request: str) -> Any:
    return s3.call_s3("list_objects_v2", **request)


def _walk(folder: str, below: str = "") -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(folder) as found:
            entries = [(f"{one.name}/" if one.is_dir(follow_symlinks=False) else one.name) for one in found]
    except FileNotFoundError:
        return
    for name in sorted(entries):  # a folder with its slash: so paths come sorted as a whole
        if name.endswith("/"):
            yield from _walk(os.path.join(folder, name), below + name)
        elif os.path.isfile(path := os.path.join(folder, name)):
            with suppress(FileNotFoundError):  # another writer's temporary file, gone by now
                yield below + name, os.stat(path).st_size


def modified_seconds(uri: str) -> float:
    """When the file was last written, in seconds since 1970."""
    with explained("cannot look", uri):
        return on_s3(lambda s3: s3.modified(uri)).timestamp() if is_s3(uri) else os.path.getmtime(uri)


def unfinished_uploads(uri: str) -> list[tuple[str, str, float]]:
    """(name below the s3:// prefix, upload id, seconds since 1970) of multipart uploads that were never completed.

    A listing of objects does not show them. At most the server's first 1000.
    """
    bucket, _, prefix = join(uri, "").removeprefix("s3://").partition("/")
    with explained("cannot list", uri):
        reply = on_s3(lambda s3: s3.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix))
    return [
        (one["Key"].removeprefix(prefix), one["UploadId"], one["Initiated"].timestamp())
        for one in reply.get("Uploads", [])
    ]


def abort_upload(uri: str, upload_id: str) -> None:
    """Drop the parts of an unfinished multipart upload."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    with explained("cannot remove", uri):
        on_s3(lambda s3: s3.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id))


def remove(uri: str, *, keep_folder: bool = False) -> None:
    """Remove one file; locally its folder goes too once it is empty, unless `keep_folder`."""
    with explained("cannot remove", uri):
        if is_s3(uri):
            on_s3(lambda s3: s3.rm_file(uri))
            return
        os.unlink(uri)
        if not keep_folder and not any(Path(uri).parent.iterdir()):
            Path(uri).parent.rmdir()


def name_of(uri: str) -> str:
    """The last part of a path or URI."""
    return uri.rstrip("/").rpartition("/")[2]


def short_hash(uri: str) -> str:
    """The first 16 hex digits of a small file's SHA-256."""
    return hashlib.sha256(read_bytes(uri)).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a local file."""
    with explained("cannot read", str(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
