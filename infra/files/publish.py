"""Files that appear whole or not at all: written, published at most once, uploaded, downloaded."""

import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infra.errors import StorageError
from infra.files.storage import exists, explained, full_disk, is_s3, join, list_files, on_s3, read_bytes, remove

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
AT_FDCWD, RENAME_NOREPLACE = -100, 1  # of Linux's renameat2
LOCK_SECONDS = 60
WHOLE = ".whole"  # present once a shared copy holds all its files


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole file at once, replacing what is there; a reader sees the old or the new, never a part."""
    with explained("cannot write", uri):
        if is_s3(uri):
            on_s3(lambda s3: s3.pipe_file(uri, data))
            return
        with _appearing(Path(uri)) as temporary:
            temporary.write_bytes(data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Create the file with `data` unless it exists; True if this call created it. Of racing writers one wins."""
    with explained("cannot write", uri):
        if is_s3(uri):
            return _create_s3(uri, lambda s3: s3.pipe_file(uri, data, mode="create"))
        with _beside(Path(uri)) as temporary:
            temporary.write_bytes(data)
            return _link(temporary, uri)


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A temporary folder whose name holds `name`, removed at the end. A full disk becomes a StorageError."""
    place = tempfile.gettempdir()
    with full_disk(place), tempfile.TemporaryDirectory(prefix=f"ccsr-{name}-", dir=place) as folder:
        yield Path(folder)


@contextmanager
def staging(uri: str) -> Iterator[Path]:
    """A path to write a file at that `publish_if_absent` is to make appear at `uri`; removed at the end.

    Beside a local `uri`: publishing copies nothing, and `--clean` finds what a killed writer leaves behind. An OSError
    in the block (a full disk) becomes a StorageError.
    """
    if is_s3(uri):
        with temporary_folder("upload") as folder:
            yield folder / uri.rsplit("/", 1)[-1]
    else:
        with explained("cannot write", uri), _beside(Path(uri)) as temporary:
            yield temporary


def publish_if_absent(local: Path, uri: str) -> bool:
    """Make a finished local file appear at `uri` unless it exists there; True if this call published it.

    A file of `staging(uri)` is linked, any other copied.
    """
    with explained("cannot publish", uri):
        if is_s3(uri):
            return _create_s3(uri, lambda s3: s3.put_file(str(local), uri, mode="create"))
        if local.parent == Path(uri).parent:
            return _link(local, uri)
        with _beside(Path(uri)) as temporary:
            shutil.copyfile(local, temporary)
            return _link(temporary, uri)


def upload(local: Path, uri: str) -> None:
    """Copy a finished local file to `uri`, replacing what is there; a reader never sees a part."""
    with explained("cannot write", uri):
        if is_s3(uri):
            on_s3(lambda s3: s3.put_file(str(local), uri))
            return
        with _appearing(Path(uri)) as temporary:
            shutil.copyfile(local, temporary)


def upload_folder(local: Path, uri: str, *, last: str) -> None:
    """Put a folder's files in place of those at `uri`, which is incomplete meanwhile: `last`, whose presence says that
    the rest is there, is removed first and written after all others."""
    if exists(join(uri, last)):
        remove(join(uri, last))
    files = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: (name == last, name)):
        upload(local / name, join(uri, name))


def download_file(uri: str, target: Path) -> None:
    """Copy an S3 object to a local file, replacing what is there; a reader never sees a part."""
    with explained("cannot read", uri, local=target), _appearing(target) as temporary:
        on_s3(lambda s3: s3.get_file(uri, str(temporary)))


def download(uri: str, folder: Path) -> Path:
    """A local copy of one file; a local path is returned as it is."""
    if not is_s3(uri):
        return Path(uri)
    target = folder / uri.rsplit("/", 1)[-1]
    download_file(uri, target)
    return target


def download_folder(uri: str, folder: Path) -> Path:
    """A local copy of all files below `uri`; a local folder is returned as it is."""
    if not is_s3(uri):
        return Path(uri)
    for place in list_files(uri):
        name = place.removeprefix(uri).lstrip("/")
        if ".." in name.split("/"):  # an object may have any name
            raise StorageError("the object's name leads out of its folder", where=place, todo="remove or rename it")
        download_file(place, folder / name)
    return folder


def make_once(target: Path, make: Callable[[Path], object]) -> bool:
    """Let `make` write a temporary file that then appears at `target`, unless that exists; True if this call made it.

    Of a node's processes one makes it and the others wait, by a lock on `.NAME.lock` beside it, which stays.
    """
    if target.exists():
        return False
    with explained("cannot write", str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f".{target.name}.lock"), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:  # a network file system without locks: some make it twice, nobody sees a part
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            if target.exists():
                return False
            with _appearing(target) as temporary:
                make(temporary)
    return True


@contextmanager
def shared_copy(uri: str, record: str, *, again: bool = False) -> Iterator[Path]:
    """A local copy of all files below `uri` while the block runs; a local folder itself.

    The processes of a node that read it at one time share one copy in the temporary folder: one of them downloads it,
    the last one to leave removes it. `record` is the file below `uri` whose bytes name the version of the others.
    `again`: download it once more, since what was read from it is damaged.
    """
    if not is_s3(uri):
        yield Path(uri)
        return
    version = hashlib.sha256(uri.encode() + read_bytes(join(uri, record))).hexdigest()[:32]
    with shared_folder(version, lambda copy: download_folder(uri, copy), again=again) as copy:
        yield copy


@contextmanager
def shared_folder(version: str, fill: Callable[[Path], object], *, again: bool = False) -> Iterator[Path]:
    """A folder in the temporary folder that the processes of a node share while their blocks run.

    One of them fills it, the last one to leave removes it; `version` names its content. `again`: fill it once more.
    """
    home = Path(tempfile.gettempdir()) / f"ccsr-copies-{os.getuid()}"
    copy, lock = home / version, home / f"{version}.lock"

    def make(marker: Path) -> None:
        fill(copy)
        marker.touch()

    with explained("cannot write", str(home)):
        home.mkdir(mode=0o700, exist_ok=True)
        lock.touch()
    with lock.open() as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            if again:
                (copy / WHOLE).unlink(missing_ok=True)
            make_once(copy / WHOLE, make)
            yield copy
        finally:
            with suppress(BlockingIOError):  # others still use it
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copy, ignore_errors=True)


def ensure_writable(uri: str) -> None:
    """Fail now rather than after hours: StorageError unless a file can be created below `uri`."""
    probe = join(uri, f".writable-{secrets.token_hex(6)}")
    put_if_absent(probe, b"")
    remove(probe, keep_folder=True)


def sync(path: Path) -> None:
    """Let a file's content, or a folder's names, outlive a power cut: a record may not outlive what it vouches for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems sync no folders
        if error.errno not in (errno.EBADF, errno.EINVAL) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A temporary sibling for the block to write, which then replaces `target`."""
    with _beside(target) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """The name of a temporary file in `target`'s folder, removed at the end unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, uri: str) -> bool:
    sync(temporary)
    try:
        os.link(temporary, uri)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not _rename_if_absent(temporary, Path(uri)):
            return False
    sync(temporary.parent)
    return True


def _rename_if_absent(temporary: Path, target: Path) -> bool:
    """`_link` on a file system without hard links (exFAT, many FUSE mounts): a rename that replaces nothing, and where
    that is unknown too, a rename under a lock file."""
    with suppress(AttributeError):  # a C library without it
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(temporary), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE) == 0:
            return True
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            return False
        if number not in (errno.EINVAL, errno.ENOSYS, *NO_LINKS):
            raise OSError(number, os.strerror(number), str(target))
    lock = target.with_name(f".{target.name}.publishing")
    deadline = time.monotonic() + LOCK_SECONDS
    while not target.exists():
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"another writer has held this lock for {LOCK_SECONDS} seconds",
                    where=str(lock),
                    todo="remove it if no job runs, then run the same command again",
                ) from None
            time.sleep(0.05)
            continue
        try:
            if not target.exists():
                os.rename(temporary, target)
                return True
        finally:
            lock.unlink()
    return False


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
