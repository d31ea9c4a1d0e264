"""Images inside other files, each named by where its bytes are: `X.zip!MEMBER`, `X.tar!OFFSET+LENGTH`,
`X.parquet!ROW_GROUP/ROW/COLUMN`."""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from braceexpand import braceexpand

from infra.errors import ConfigError, DataError, line_of
from infra.images import IMAGE_SUFFIXES
from infra.storage import explained, file_size, list_files, open_file, read_bytes, read_range
from pipelines.sharding.zips import read_member, split_zip

if TYPE_CHECKING:
    import pyarrow as pa

NUM_LISTED = 5
HEADER_BYTES = 16 * 1024  # of one request: a tar's header, and the small members between two images
IN_TAR = re.compile(r"(?P<tar>.+)!(?P<offset>\d+)\+(?P<length>\d+)")
IN_PARQUET = re.compile(r"(?P<file>.+)!(?P<group>\d+)/(?P<row>\d+)/(?P<column>.+)")


class Member(NamedTuple):
    """An image in a container: its name there, where its bytes are, and their number (of a parquet row: unknown, 0)."""

    name: str
    uri: str
    num_bytes: int


def read_source_bytes(uri: str) -> bytes:
    """The bytes of an image, which is a file or in one of the containers above."""
    if (zipped := split_zip(uri)) and zipped[1]:
        return read_member(*zipped)
    if match := IN_TAR.fullmatch(uri):
        return read_range(match["tar"], int(match["offset"]), int(match["length"]))
    if match := IN_PARQUET.fullmatch(uri):
        cell = _column(match["file"], int(match["group"]), match["column"], os.getpid())[int(match["row"])].as_py()
        return (cell["bytes"] if isinstance(cell, dict) else cell) or b""
    return read_bytes(uri)


def expand(path: str, suffix: str) -> list[str]:
    """The files that `path` names: with braces (`{000..099}`, `{a,b}`) each of them; below a folder those with the
    suffix; else itself. DataError, with their number, where some or all are missing."""
    try:
        files = list(braceexpand(path)) if "{" in path else [path]
    except ValueError as error:
        raise ConfigError("a brace is not closed", where=path, todo="write {000..099} or {a,b}") from error
    if len(files) == 1 and not path.lower().endswith(suffix):
        files = [file for file in list_files(path) if file.lower().endswith(suffix)]
        if not files:
            raise DataError(f"no {suffix} files here", where=path, todo="check the path")
    check_present(files, path)
    return files


def check_present(files: Sequence[str], where: str) -> list[int]:
    """The files' sizes in bytes. DataError with the number and the first names of those that are missing."""
    with ThreadPoolExecutor(32) as pool:  # on S3 each answer is waited for
        sizes = list(pool.map(file_size, files))
    missing = [file for file, size in zip(files, sizes, strict=True) if size is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files are missing: {', '.join(missing[:NUM_LISTED])}",
            where=where,
            todo="complete them, or take them out",
        )
    return [size or 0 for size in sizes]


def list_tars(path: str, extension: str | None) -> list[Member]:
    """The images of WebDataset tars, found by their headers alone, in the tars' order. One image a sample: the member
    `extension` (`jpg`, `hr.png`), by default the only one whose suffix is an image's. DataError for a tar without
    images, a damaged or compressed one, and a sample with several images."""
    tars = expand(path, ".tar")
    with ThreadPoolExecutor(16) as pool:
        return [member for found in pool.map(lambda tar: list(_tar_images(tar, extension)), tars) for member in found]


def _tar_images(tar: str, extension: str | None) -> Iterator[Member]:
    try:
        with (
            explained("cannot read", tar),
            open_file(tar, HEADER_BYTES) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            members = [one for one in archive if one.isfile()]
    except tarfile.TarError as error:
        todo = "fetch it again; a compressed tar has to be unpacked"
        raise DataError(f"the tar cannot be read ({line_of(error)})", where=tar, todo=todo) from error
    images = [one for one in members if _is_chosen(one.name, extension)]
    if not images:
        wanted = f"member .{extension}" if extension else "image"
        raise DataError(f"{len(members)} members, but no {wanted}", where=tar, todo="check the path, or `member`")
    for key, group in groupby(images, key=lambda one: _split_member(one.name)[0]):
        image, *others = group
        if others:
            raise DataError(
                f"sample {key} has {1 + len(others)} images: {', '.join(one.name for one in (image, *others))}",
                where=tar,
                todo=f"write `member: {_split_member(image.name)[1]}`, for one",
            )
        yield Member(f"{Path(tar).name}/{image.name}", f"{tar}!{image.offset_data}+{image.size}", image.size)


def _is_chosen(name: str, extension: str | None) -> bool:
    if Path(name).name.startswith("."):
        return False
    return _split_member(name)[1] == extension if extension else Path(name).suffix.lower() in IMAGE_SUFFIXES


def _split_member(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: the base name is cut at its first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension


def list_parquet(path: str, column: str) -> list[Member]:
    """The images in a column of parquet files: plain binary, or Hugging Face's struct of `bytes` and `path`. DataError
    for a column that is missing or of another type."""
    import pyarrow as pa

    found = []
    for file in expand(path, ".parquet"):
        parquet = _open(file, os.getpid())
        schema = parquet.schema_arrow
        if column not in schema.names:
            todo = f"write `column:` with one of {', '.join(schema.names)}"
            raise DataError(f"no column {column!r} here", where=file, todo=todo)
        kind = schema.field(column).type
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise DataError(
                f"column {column!r} is of type {kind}, not binary or {{bytes, path}}",
                where=file,
                todo="name the column that holds the images; paths are read by `kind: list`",
            )
        groups = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
        rows = [(group, row) for group, count in enumerate(groups) for row in range(count)]
        names = [f"{Path(file).name}/{number:08d}" for number in range(len(rows))]
        found += [Member(name, f"{file}!{g}/{row}/{column}", 0) for name, (g, row) in zip(names, rows, strict=True)]
    return found


@lru_cache(maxsize=8)
def _open(file: str, _: int) -> "pa.parquet.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    with explained("cannot read", file):
        try:
            return pq.ParquetFile(open_file(file))
        except pa.ArrowInvalid as error:
            raise DataError(
                f"the parquet file is damaged ({line_of(error)})", where=file, todo="fetch it again"
            ) from error


@lru_cache(maxsize=1)  # consecutive samples are of one row group, which is decoded once
def _column(file: str, group: int, column: str, pid: int) -> "pa.ChunkedArray":
    with explained("cannot read", file):
        return _open(file, pid).read_row_group(group, columns=[column])[column]
