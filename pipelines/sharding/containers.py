"""Images inside other files, each named by where its bytes are: `X.zip!MEMBER`, `X.tar!OFFSET+LENGTH`,
`X.parquet!ROW_GROUP/ROW/COLUMN`."""

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from infra.errors import DataError, line_of
from infra.storage import explained, open_file, read_bytes, read_range
from infra.tars import expand, tar_samples
from pipelines.sharding.zips import read_member, split_zip

if TYPE_CHECKING:
    import pyarrow as pa

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


def list_tars(path: str, extension: str | None) -> list[Member]:
    """The images of WebDataset tars, in the tars' order; errors as of `tar_samples`."""
    tars = list(expand(path, ".tar"))
    return [
        Member(f"{Path(tar).name}/{one.name}", f"{tar}!{one.offset_data}+{one.size}", one.size)
        for tar, samples in zip(tars, tar_samples(tars, extension), strict=True)
        for one in (sample.image for sample in samples)
    ]


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
