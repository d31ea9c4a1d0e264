"""The list of source files, as columns that are mapped from a file instead of objects in memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar, overload

import numpy as np

from infra.publish import temporary_folder
from infra.shards import Entry

ROWS_AT_ONCE = 16_384
KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One HR file: `key` names it in shards, `name` is its path within its source, `uri` is where it is now.

    `lr_uri` and `scale`: of a pair. `entry`: of a sample of the shard set at `uri`. `identity`: what else it is (the
    LR file, the caption, the shard set). `caption_uri`: where its text is, perhaps `data:,TEXT`.
    """

    key: str
    source: str
    name: str
    uri: str
    num_bytes: int
    lr_uri: str = ""
    scale: int = 1
    entry: Entry | None = None
    identity: str = ""
    caption_uri: str = ""


TEXTS = ("key", "source", "name", "uri", "lr_uri", "identity", "caption_uri", "shard")
NUMBERS = ("num_bytes", "scale", "offset_bytes", "length_bytes")  # shard and the last two: of `entry`


class FileList(Sequence[SourceFile]):
    """Files in order. Their columns are in a nameless file of the temporary folder (TMPDIR), which the system keeps in
    memory or not, as it has room: about 150 bytes a file."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        import pyarrow as pa

        rest = iter(files)
        # Text as bytes: a file's name need not be UTF-8.
        schema = pa.schema([*((name, pa.binary()) for name in TEXTS), *((name, pa.int64()) for name in NUMBERS)])
        with temporary_folder("files") as folder:
            place = str(folder / "files.arrow")
            with pa.ipc.new_file(place, schema) as file:
                while rows := list(islice(rest, ROWS_AT_ONCE)):
                    columns = zip(*map(_row, rows), strict=True)
                    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)]
                    file.write_batch(pa.record_batch(arrays, schema=schema))
            self._table = pa.ipc.open_file(pa.memory_map(place)).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, number: int) -> SourceFile: ...
    @overload
    def __getitem__(self, number: slice) -> list[SourceFile]: ...
    def __getitem__(self, number: int | slice) -> SourceFile | list[SourceFile]:
        if not isinstance(number, slice):
            start = range(len(self))[number]
            return self[start : start + 1][0]
        places = range(len(self))[number]
        if not places:
            return []
        start, stop = min(places), max(places) + 1
        columns = (column.to_pylist() for column in self._table.slice(start, stop - start).columns)
        found = [_file(*row) for row in zip(*columns, strict=True)]
        return found[:: places.step] if places.step > 0 else found[::-1][:: -places.step]

    def __iter__(self) -> Iterator[SourceFile]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self[start : start + ROWS_AT_ONCE]

    def counts(self) -> dict[str, int]:
        """The number of files of each source."""
        return {one["values"].decode(): one["counts"] for one in self._table["source"].value_counts().to_pylist()}

    def repeated_keys(self) -> set[str]:
        """The keys that several files have, found by 8 bytes a file."""
        keys = self._table["key"]

        def every() -> Iterator[bytes]:
            return (key for chunk in keys.chunks for key in chunk.to_pylist())

        hashes, counts = np.unique(np.fromiter(map(hash, every()), np.int64, len(self)), return_counts=True)
        shared = set(hashes[counts > 1].tolist())
        found = Counter(key for key in every() if hash(key) in shared) if shared else {}
        return {key.decode() for key, count in found.items() if count > 1}


class Made(Sequence[ItemT], Generic[KeyT, ItemT]):
    """`make(key)` of each key, made anew at each look."""

    def __init__(self, keys: Sequence[KeyT], make: Callable[[KeyT], ItemT]) -> None:
        self.keys, self.make = keys, make

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, number: int) -> ItemT: ...
    @overload
    def __getitem__(self, number: slice) -> list[ItemT]: ...
    def __getitem__(self, number: int | slice) -> ItemT | list[ItemT]:
        return (
            [self.make(key) for key in self.keys[number]] if isinstance(number, slice) else self.make(self.keys[number])
        )


def _row(file: SourceFile) -> tuple[Any, ...]:
    entry = file.entry
    texts = (file.key, file.source, file.name, file.uri, file.lr_uri, file.identity, file.caption_uri)
    shard, *span = (entry.shard, entry.offset_bytes, entry.length_bytes) if entry else ("", 0, 0)
    return *(text.encode(errors="surrogateescape") for text in (*texts, shard)), file.num_bytes, file.scale, *span


def _file(*row: Any) -> SourceFile:
    texts = (text.decode(errors="surrogateescape") for text in row[: len(TEXTS)])
    key, source, name, uri, lr_uri, identity, caption_uri, shard = texts
    num_bytes, scale, *span = row[len(TEXTS) :]
    entry = Entry(name, shard, *span) if shard else None  # a set's samples are named by their keys
    return SourceFile(key, source, name, uri, num_bytes, lr_uri, scale, entry, identity, caption_uri)
