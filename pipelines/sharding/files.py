"""The list of source files, as columns that are mapped from a file instead of objects in memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from infra.files.publish import temporary_folder
from infra.shards.shard import Entry

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 16_384
KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")


class SourceFile(NamedTuple):
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
    identity: str = ""
    caption_uri: str = ""
    entry: Entry | None = None


NUMBERS = ("num_bytes", "scale", "offset_bytes", "length_bytes")
ENTRY = ("shard", "offset_bytes", "length_bytes")  # columns of `entry`, which is named as the file is


class FileList(Sequence[SourceFile]):
    """Files in order. Their columns are in a nameless file of the temporary folder (TMPDIR), which the system keeps in
    memory or not, as it has room: about 150 bytes a file. A part of a list travels pickled as columns too."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        import pyarrow as pa

        rest = iter(files)
        with temporary_folder("files") as folder:
            place = str(folder / "files.arrow")
            with pa.ipc.new_file(place, _table([]).schema) as file:
                while rows := list(islice(rest, ROWS_AT_ONCE)):
                    file.write_table(_table(rows))
            self._table = pa.ipc.open_file(pa.memory_map(place)).read_all()

    def part(self, start: int, stop: int) -> "FileList":
        """The list of some of these files."""
        part = FileList.__new__(FileList)
        part._table = self._table.slice(start, stop - start)
        return part

    def __getstate__(self) -> bytes:
        import pyarrow as pa

        with pa.BufferOutputStream() as out:
            with pa.ipc.new_stream(out, self._table.schema) as stream:
                stream.write_table(self._table)
            return out.getvalue().to_pybytes()

    def __setstate__(self, state: bytes) -> None:
        import pyarrow as pa

        self._table = pa.ipc.open_stream(state).read_all()

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
        if places.step != 1:
            return [self[place] for place in places]
        columns = self.columns(*SourceFile._fields[:-1], *ENTRY, start=places.start, stop=places.stop)
        return [_file(*row) for row in zip(*columns, strict=True)]

    def columns(self, *names: str, start: int, stop: int) -> list[list[Any]]:
        """Some columns of the files from `start` to `stop`."""
        columns = [column.to_pylist() for column in self._table.select(names).slice(start, stop - start).columns]
        return [
            values if name in NUMBERS else [value.decode(errors="surrogateescape") for value in values]
            for name, values in zip(names, columns, strict=True)
        ]

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

        hashes = np.fromiter(map(hash, every()), np.int64, len(self))
        hashes.sort()
        shared = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
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


def _table(files: Sequence[SourceFile]) -> "pa.Table":
    import pyarrow as pa

    columns: list[Sequence[Any]] = list(zip(*files, strict=True)) or [()] * len(SourceFile._fields)
    entries = columns.pop()
    for name, default in zip(ENTRY, ("", 0, 0), strict=True):
        columns.append(tuple(getattr(entry, name) if entry else default for entry in entries))
    names = [*SourceFile._fields[:-1], *ENTRY]
    return pa.table([_column(column, name in NUMBERS) for name, column in zip(names, columns, strict=True)], names)


def _column(values: Sequence[Any], number: bool) -> "pa.Array":
    import pyarrow as pa

    if number:
        return pa.array(values, pa.int64())
    try:
        return pa.array(values, pa.binary())
    except UnicodeEncodeError:  # a file's name need not be UTF-8
        return pa.array([value.encode(errors="surrogateescape") for value in values], pa.binary())


def _file(*row: Any) -> SourceFile:
    *fields, shard, offset_bytes, length_bytes = row
    file = SourceFile(*fields)
    return file._replace(entry=Entry(file.name, shard, offset_bytes, length_bytes)) if shard else file
