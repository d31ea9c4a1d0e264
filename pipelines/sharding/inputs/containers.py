"""Images inside other files, each named by where its bytes are: `X.zip!MEMBER`, `X.tar!OFFSET+LENGTH`,
`X.parquet!ROW_GROUP/ROW/COLUMN`."""

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote_to_bytes

from infra.errors import DataError, line_of
from infra.files.storage import explained, open_file, read_bytes, read_range
from infra.shards.shard import split_member
from infra.shards.tars import expand, tar_samples
from pipelines.sharding.inputs.zips import read_member, split_zip

if TYPE_CHECKING:
    import pyarrow as pa

INLINE = "data:,"  # a text in the address itself, as of RFC 2397
IN_TAR = re.compile(r"(?P<tar>.+)!(?P<offset>\d+)\+(?P<length>\d+)")
IN_PARQUET = re.compile(r"(?P<file>.+)!(?P<group>\d+)/(?P<row>\d+)/(?P<column>.+)")


class Member(NamedTuple):
    """An image or caption in a container: its name there, where its bytes are, and their number (of an image in a
    parquet row: unknown, 0; of a caption there: its file's)."""

    name: str
    uri: str
    num_bytes: int


def read_source_bytes(uri: str) -> bytes:
    """The bytes of an image or caption, which is a file or in one of the containers above; a caption of a list is
    `data:,TEXT`."""
    if uri.startswith(INLINE):
        return unquote_to_bytes(uri.removeprefix(INLINE))
    if (zipped := split_zip(uri)) and zipped[1]:
        return read_member(*zipped)
    if match := IN_TAR.fullmatch(uri):
        return read_range(match["tar"], int(match["offset"]), int(match["length"]))
    if match := IN_PARQUET.fullmatch(uri):
        cell = _column(match["file"], int(match["group"]), match["column"], os.getpid())[int(match["row"])]
        data = (cell["bytes"] if isinstance(cell, Mapping) else cell).as_buffer() if cell.is_valid else None
        return data.to_pybytes() if data else b""
    return read_bytes(uri)


def list_tars(path: str, extension: str | None, caption: str | None) -> Iterator[tuple[Member, Member | None]]:
    """The images of WebDataset tars, in the tars' order, each with its sample's member `caption`, where there is one;
    errors as of `tar_samples`."""
    tars = list(expand(path, ".tar"))
    for tar, samples in zip(tars, tar_samples(tars, extension), strict=True):
        for sample in samples:
            text = next((one for one in sample.members if split_member(one.name)[1] == caption and one.size), None)
            image, *texts = (
                Member(f"{Path(tar).name}/{one.name}", f"{tar}!{one.offset_data}+{one.size}", one.size)
                for one in (sample.image, *([text] if text else []))
            )
            yield image, texts[0] if texts else None


def list_parquet(path: str, column: str, caption: str | None) -> Iterator[tuple[Member, Member | None]]:
    """The images in a column of parquet files: plain binary, or Hugging Face's struct of `bytes` and `path`; each with
    its text in the column `caption`, but for row groups without any. DataError for a column that is missing or of
    another type."""
    for file, size in expand(path, ".parquet").items():
        parquet = _open(file, os.getpid())
        _check_column(parquet.schema_arrow, column, file)
        if caption:
            _check_column(parquet.schema_arrow, caption, file, text=True)
        number = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group)
            texts = bool(caption) and not _all_null(rows, str(caption))
            for row in range(rows.num_rows):
                name, place = f"{Path(file).name}/{number:08d}", f"{file}!{group}/{row}"
                text = Member(name, f"{place}/{caption}", size) if texts else None
                yield Member(name, f"{place}/{column}", 0), text
                number += 1


def _all_null(rows: "pa.parquet.RowGroupMetaData", column: str) -> bool:
    """Whether the row group's statistics, which a writer may leave out, say that a column has no value."""
    parts = (rows.column(number) for number in range(rows.num_columns))
    found = next((part.statistics for part in parts if part.path_in_schema == column), None)
    return found is not None and found.has_null_count and found.null_count == rows.num_rows


def _check_column(schema: "pa.Schema", column: str, file: str, *, text: bool = False) -> None:
    import pyarrow as pa

    field = "caption" if text else "column"
    if column not in schema.names:
        todo = f"write `{field}:` with one of {', '.join(schema.names)}"
        raise DataError(f"no column {column!r} here", where=file, todo=todo)
    kind = schema.field(column).type
    if text:
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"column {column!r} is of type {kind}, not text", where=file, todo="name the captions' column"
            )
        return
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise DataError(
            f"column {column!r} is of type {kind}, not binary or {{bytes, path}}",
            where=file,
            todo="name the column that holds the images; paths are read by `kind: list`",
        )


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


@lru_cache(maxsize=2)  # consecutive samples are of one row group, whose images and captions are decoded once
def _column(file: str, group: int, column: str, pid: int) -> "pa.ChunkedArray":
    with explained("cannot read", file):
        return _open(file, pid).read_row_group(group, columns=[column])[column]
