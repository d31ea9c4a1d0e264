"""A shard set's byte index: parquet parts, and a memory-mapped Arrow copy that the processes of a node share."""

import dataclasses
import hashlib
import io
import weakref
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from infra.errors import DataError
from infra.files.publish import put_if_absent, shared_folder
from infra.files.storage import exists, join, read_bytes, resolve
from infra.shards.shard import SCORES, Entry, IndexedEntry

if TYPE_CHECKING:
    import pyarrow as pa

SHARDS_PER_PART = 4096
ROWS_PER_BATCH = 65536
COLUMNS = ["key", "offset_bytes", "length_bytes"]  # the shard follows from the row and the manifest's counts


def index_table(entries: Sequence[IndexedEntry]) -> "pa.Table":
    """Entries as rows of the index."""
    import pyarrow as pa

    kinds = {"key": pa.string(), "shard": pa.string(), "phash": pa.uint64(), "source_hash": pa.uint64()}
    kinds |= dict.fromkeys(SCORES, pa.float32())
    names = [field.name for field in dataclasses.fields(IndexedEntry)]
    columns = list(zip(*map(attrgetter(*names), entries), strict=True)) or [()] * len(names)
    kinds_in_order = [kinds.get(name, pa.int64()) for name in names]
    return pa.table(list(map(pa.array, columns, kinds_in_order)), names)


def put_part(output: str, number: int, rows: "pa.Table") -> dict[str, Any]:
    """Write one part unless its rows are already there; what the manifest says of it: name, sha256, num_samples."""
    import pyarrow.parquet as pq

    name = f"index-{number:06d}.parquet" if number else "index.parquet"
    place = join(output, name)
    buffer = io.BytesIO()
    pq.write_table(_complete(rows), buffer)
    data = buffer.getvalue()
    if exists(place):  # of an interrupted run, maybe by another version of the parquet library
        present = read_bytes(place)
        if _parse(present).equals(_parse(data)):
            data = present
    if not put_if_absent(place, data) and read_bytes(place) != data:
        raise DataError(
            f"another {name} is already there", where=place, todo="`ccsr verify` the set, or use a new output"
        )
    return {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "num_samples": rows.num_rows}


def read_parts(uri: str, parts: Sequence[dict[str, Any]]) -> "pa.Table":
    """All columns of all parts. DataError unless each has its hash."""
    import pyarrow as pa

    return _complete(pa.concat_tables([_parse(_read(uri, part)) for part in parts], promote_options="default"))


def _read(uri: str, part: dict[str, Any]) -> bytes:
    place = resolve(uri, part["name"])
    data = read_bytes(place)
    if hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise DataError(
            "the byte index is not the one that the manifest was written with",
            where=place,
            todo="`ccsr verify` the set",
        )
    return data


def _parse(data: bytes) -> "pa.Table":
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data))


def _complete(rows: "pa.Table") -> "pa.Table":
    """Without the columns that a part of the set, made by an earlier version, has no values of."""
    return rows.drop_columns([name for name in rows.column_names if rows[name].null_count])


class Entries(Sequence[Entry]):
    """The entries of a set by number, in shard order, read from a file that is mapped, not loaded: a lookup takes
    microseconds, and the processes of a node that are at work at one time share its memory.

    The file is made from the parts by the first process that opens it, in the temporary folder, and removed by the
    last one that ends. `shards`: name (or absolute URI) and number of samples of each. DataError for a part without its
    hash.
    """

    def __init__(self, uri: str, parts: Sequence[dict[str, Any]], shards: Sequence[tuple[str, int]]) -> None:
        import pyarrow as pa

        self._shards = [name for name, _ in shards]
        self._starts = list(accumulate((count for _, count in shards), initial=0))
        version = hashlib.sha256("".join(["index-1", *(part["sha256"] for part in parts)]).encode()).hexdigest()[:32]
        with ExitStack() as stack:
            folder = stack.enter_context(shared_folder(version, lambda folder: _write_arrow(uri, parts, folder)))
            file = pa.ipc.open_file(pa.memory_map(str(folder / "index.arrow")))
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
            weakref.finalize(self, stack.pop_all().close)
        self._keys = [batch["key"] for batch in batches]
        self._spans = [(batch["offset_bytes"].to_numpy(), batch["length_bytes"].to_numpy()) for batch in batches]
        self._firsts = list(accumulate((batch.num_rows for batch in batches), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, number: int) -> Entry: ...
    @overload
    def __getitem__(self, number: slice) -> list[Entry]: ...
    def __getitem__(self, number: int | slice) -> Entry | list[Entry]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        row = range(len(self))[number]
        batch = bisect(self._firsts, row) - 1
        at = row - self._firsts[batch]
        offsets, lengths = self._spans[batch]
        return Entry(self._keys[batch][at].as_py(), self._shard(row), int(offsets[at]), int(lengths[at]))

    def __iter__(self) -> Iterator[Entry]:
        for first, keys, spans in zip(self._firsts, self._keys, self._spans, strict=False):
            for row, (key, *span) in enumerate(zip(keys.to_pylist(), *(s.tolist() for s in spans), strict=True), first):
                yield Entry(key, self._shard(row), *span)

    def _shard(self, row: int) -> str:
        return self._shards[bisect(self._starts, row) - 1]


def _write_arrow(uri: str, parts: Sequence[dict[str, Any]], folder: Path) -> None:
    """All parts as one Arrow file, a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("key", pa.string()), ("offset_bytes", pa.int64()), ("length_bytes", pa.int64())])
    with pa.ipc.new_file(str(folder / "index.arrow"), schema) as file:
        for part in parts:
            for batch in pq.ParquetFile(io.BytesIO(_read(uri, part))).iter_batches(ROWS_PER_BATCH, columns=COLUMNS):
                file.write_batch(batch)
    pa.default_memory_pool().release_unused()  # what decoding took: a training process lives long
