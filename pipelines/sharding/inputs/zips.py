"""Images inside zip archives as distributed, read without unpacking: `PLACE.zip!MEMBER`."""

import os
import zipfile
from functools import lru_cache

from infra.errors import DataError, line_of
from infra.files.storage import explained, open_file
from infra.imaging.images import UnusableImageError, refusing

MAX_MEMBER_BYTES = 2**30
MEMBER = ".zip!"


def split_zip(uri: str) -> tuple[str, str] | None:
    """(archive, path inside) of `X.zip` or `X.zip!PATH`; None for any other place."""
    if uri.lower().endswith(".zip"):
        return uri, ""
    at = uri.lower().find(MEMBER)
    return None if at < 0 else (uri[: at + 4], uri[at + 5 :])


def list_members(archive: str) -> dict[str, int]:
    """Member -> size in bytes of all files of an archive, sorted by name.

    DataError for a damaged archive and for a duplicate name in it.
    """
    members = [info for info in _open(archive).infolist() if not info.is_dir()]
    sizes = {info.filename: info.file_size for info in members}
    if len(sizes) < len(members):
        raise DataError("two members have the same name", where=archive, todo="repack the archive")
    return {name: sizes[name] for name in sorted(sizes)}


def read_member(archive: str, name: str) -> bytes:
    """One member's bytes. UnusableImageError: `truncated` (damaged or encrypted) or `too_large` (over 1 GiB)."""
    where = f"{archive}!{name}"
    with explained("cannot read", where):
        file = _open(archive)
        size = file.getinfo(name).file_size
        if size > MAX_MEMBER_BYTES:  # a zip bomb says its size, or its check sum is wrong once that is read
            raise UnusableImageError(
                f"the member has {size:,} bytes", where=where, todo="unpack it", reason="too_large"
            )
        try:
            return file.read(name)
        except Exception as error:
            if getattr(error, "errno", None) is not None:  # of the storage, not of a decompressor
                raise
            with refusing("truncated", "the archive's member is damaged", where):
                raise


def _open(archive: str) -> zipfile.ZipFile:
    # By process: a handle does not survive a fork. One archive is open at a time in most jobs, a few in others.
    return _opened(archive, os.getpid())


@lru_cache(maxsize=8)
def _opened(archive: str, _: int) -> zipfile.ZipFile:
    with explained("cannot read", archive):
        try:
            return zipfile.ZipFile(open_file(archive))
        except Exception as error:
            if getattr(error, "errno", None) is not None or isinstance(error, MemoryError):
                raise
            raise DataError(f"the zip is damaged ({line_of(error)})", where=archive, todo="fetch it again") from error
