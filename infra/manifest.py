"""A shard set's ledger: one committed record per shard, then a manifest and a byte index over all of them."""

import dataclasses
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from infra.errors import DataError, PartialResultError
from infra.publish import put_if_absent
from infra.shards import Entry, IndexedEntry
from infra.storage import exists, join, list_files, read_bytes, read_json

if TYPE_CHECKING:
    import pyarrow as pa

ResultT = TypeVar("ResultT")
FORMAT = "ccsr-shards-1"


@dataclass(frozen=True)
class Quarantined:
    """A sample that was set aside: its key, source, one-word reason, message and the SHA-256 of the source bytes."""

    key: str
    source: str
    reason: str
    message: str
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """What one shard holds; written after the shard's tar is in its place, and only once. `min_side_px`: the shortest
    side of its HR images; None for no image, and in sets of an earlier version."""

    index: int
    shard: str
    sha256: str
    num_bytes: int
    entries: list[IndexedEntry]
    quarantined: list[Quarantined] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    min_side_px: int | None = None

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()

    @classmethod
    def read(cls, place: str) -> "ShardRecord":
        """The record at `place`. DataError where it is damaged."""
        try:
            values = json.loads(read_bytes(place))
            values["entries"] = [IndexedEntry(**entry) for entry in values["entries"]]
            values["quarantined"] = [Quarantined(**item) for item in values["quarantined"]]
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"a shard's record is damaged ({error})",
                where=place,
                todo="remove it and run the same command again",
            ) from error


def record_uri(output: str, index: int) -> str:
    return join(output, "records", f"{index:06d}.json")


def commit_record(output: str, record: ShardRecord) -> None:
    """Commit a shard's record. A second commit must say the same: a record that disagrees is an error."""
    place = record_uri(output, record.index)
    if not put_if_absent(place, record.to_bytes()):
        present = ShardRecord.read(place)
        if present != record:
            raise DataError(
                f"two runs made different bytes for shard {record.index} "
                f"({present.sha256[:12]} is committed, {record.sha256[:12]} is new)",
                where=place,
                todo="compare the library versions of the two runs; keep this output as it is and use a new one",
            )


def committed_records(output: str) -> dict[int, ShardRecord]:
    """Every committed record by shard index."""
    return {record.index: record for record in _from_records(output, ShardRecord.read)}


def _from_records(output: str, read: Callable[[str], ResultT]) -> Iterator[ResultT]:
    places = [place for place in list_files(join(output, "records")) if place.endswith(".json")]
    with ThreadPoolExecutor(16) as pool:  # on S3 each read waits for an answer, and there may be thousands
        yield from pool.map(read, places)


def write_manifest(output: str, num_shards: int, **facts: Any) -> "Manifest":
    """Close a shard set: index.parquet, then manifest.json, from the records of all `num_shards` shards.

    Safe to repeat and to race; DataError where another manifest is already there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(place: str) -> tuple[ShardRecord, pa.Table]:
        record = ShardRecord.read(place)
        return dataclasses.replace(record, entries=[]), index_table(record.entries)  # a million entries are heavy

    found = {record.index: (record, table) for record, table in _from_records(output, read)}
    missing = sorted(set(range(num_shards)) - found.keys())
    if missing:
        raise PartialResultError(
            f"{len(missing)} of {num_shards} shards are missing (first: {missing[0]})",
            where=output,
            todo="run the same command again: it makes only what is missing",
        )
    records = [found[index][0] for index in range(num_shards)]
    tables = [found[index][1] for index in range(num_shards)]
    rows = pa.concat_tables(tables)
    if not rows.num_rows:
        raise DataError("no sample could be used", where=output, todo="see the reasons in records/*.json")
    if rows["phash"].null_count:  # a part of the set was made by an earlier version
        rows = rows.drop_columns(["phash", "source_hash"])
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    index = buffer.getvalue()
    if exists(join(output, "index.parquet")):  # of an interrupted run, maybe by another version of the parquet library
        present = read_bytes(join(output, "index.parquet"))
        if _read_index(present).equals(rows):
            index = present
    shards = [
        {"shard": r.shard, "sha256": r.sha256, "num_bytes": r.num_bytes, "num_samples": table.num_rows}
        for r, table in zip(records, tables, strict=True)
    ]
    sides = [record.min_side_px for record, table in zip(records, tables, strict=True) if table.num_rows]
    manifest = {
        "format": FORMAT,
        "dataset_id": dataset_id_of(shards),
        "num_samples": rows.num_rows,
        "num_bytes": sum(record.num_bytes for record in records),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        **set_aside(records),
        "shards": shards,
        "min_side_px": None if None in sides else min(filter(None, sides)),
        **facts,
    }
    data = json.dumps(manifest, indent=1, sort_keys=True).encode()
    for name, content in (("index.parquet", index), ("manifest.json", data)):
        place = join(output, name)
        if not put_if_absent(place, content) and read_bytes(place) != content:
            raise DataError(
                f"another {name} is already there", where=place, todo="`ccsr verify` the set, or use a new output"
            )
    return Manifest.load(output)


def set_aside(records: Iterable[ShardRecord]) -> dict[str, Any]:
    """What the manifest says of samples that were not taken: the quarantined, and how many were dropped, by reason."""
    quarantined: list[dict[str, str]] = []
    dropped = Counter[str]()
    for record in records:
        quarantined += [dataclasses.asdict(item) for item in record.quarantined]
        dropped.update(record.dropped)
    return {"quarantined": quarantined, "dropped": dict(dropped)}


def dataset_id_of(shards: list[dict[str, Any]]) -> str:
    """Identifies a shard set by its shards' names, hashes and sizes, wherever it is stored."""
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """A complete shard set: `uri` is its folder, `facts` the content of manifest.json."""

    uri: str
    facts: dict[str, Any]

    @classmethod
    def load(cls, uri: str) -> "Manifest":
        """Read manifest.json. DataError if the set is not complete, or of another format."""
        place = join(uri, "manifest.json")
        if not exists(place):
            raise DataError(
                "there is no complete shard set here (manifest.json is missing)",
                where=uri,
                todo="make it with `ccsr shard`, or run the same `ccsr shard` again if it was interrupted",
            )
        facts = read_json(place)
        if facts.get("format") != FORMAT:
            raise DataError(f"unknown manifest format {facts.get('format')!r}", where=place, todo=f"expected {FORMAT}")
        return cls(uri, facts)

    @property
    def dataset_id(self) -> str:
        return self.facts["dataset_id"]

    @property
    def num_samples(self) -> int:
        return self.facts["num_samples"]

    @cached_property
    def entries(self) -> list[Entry]:
        """The byte index, one entry per sample in shard order; its hash is checked against the manifest's."""
        names = [field.name for field in dataclasses.fields(Entry)]
        columns = [column.to_pylist() for column in self.index.select(names).columns]
        return [Entry(key, sys.intern(shard), *span) for key, shard, *span in zip(*columns, strict=True)]

    @property
    def index(self) -> "pa.Table":
        """index.parquet as a table, read anew each time. DataError unless it has the hash in the manifest."""
        data = read_bytes(join(self.uri, "index.parquet"))
        if hashlib.sha256(data).hexdigest() != self.facts["index_sha256"]:
            raise DataError(
                "the byte index is not the one that the manifest was written with",
                where=join(self.uri, "index.parquet"),
                todo="`ccsr verify` the set",
            )
        return _read_index(data)


def index_table(entries: Sequence[IndexedEntry]) -> "pa.Table":
    """Entries as rows of index.parquet."""
    import pyarrow as pa

    kinds = {"key": pa.string(), "shard": pa.string(), "phash": pa.uint64(), "source_hash": pa.uint64()}
    names = [field.name for field in dataclasses.fields(IndexedEntry)]
    return pa.table(
        {name: pa.array([getattr(e, name) for e in entries], kinds.get(name, pa.int64())) for name in names}
    )


def _read_index(data: bytes) -> "pa.Table":
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data))
