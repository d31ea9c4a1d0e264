"""A shard set's ledger: one committed record per shard, then a manifest and a byte index over all of them."""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from infra.errors import DataError, PartialResultError
from infra.files.publish import put_if_absent
from infra.files.storage import exists, join, list_files, read_bytes, read_json
from infra.shards.byte_index import SHARDS_PER_PART, Entries, index_table, put_part, read_parts
from infra.shards.shard import IndexedEntry

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "ccsr-shards-1"
READ_AT_ONCE = 128


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
    side of its HR images; None for no image, and in sets of an earlier version. `num_captions`: of its samples."""

    index: int
    shard: str
    sha256: str
    num_bytes: int
    entries: list[IndexedEntry]
    quarantined: list[Quarantined] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    min_side_px: int | None = None
    num_captions: int = 0

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()

    @classmethod
    def read(cls, uri: str) -> "ShardRecord":
        """The record at `uri`. DataError where it is damaged."""
        return cls.parse(read_bytes(uri), uri)

    @classmethod
    def parse(cls, data: bytes, uri: str) -> "ShardRecord":
        """A record's bytes, which are at `uri`. DataError where they are damaged."""
        try:
            values = json.loads(data)
            values["entries"] = [IndexedEntry(**entry) for entry in values["entries"]]
            values["quarantined"] = [Quarantined(**item) for item in values["quarantined"]]
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"a shard's record is damaged ({error})",
                where=uri,
                todo="remove it and run the same command again",
            ) from error


def record_uri(output: str, index: int) -> str:
    return join(output, "records", f"{index:06d}.json")


def commit_record(output: str, record: ShardRecord) -> None:
    """Commit a shard's record. A second commit must say the same: a record that disagrees is an error."""
    uri = record_uri(output, record.index)
    if not put_if_absent(uri, record.to_bytes()):
        present = ShardRecord.read(uri)
        if present != record:
            raise DataError(
                f"two runs made different bytes for shard {record.index} "
                f"({present.sha256[:12]} is committed, {record.sha256[:12]} is new)",
                where=uri,
                todo="compare the library versions of the two runs; keep this output as it is and use a new one",
            )


def committed(output: str) -> list[int]:
    """The shards that have a record, from its name alone."""
    names = (place.rpartition("/")[2] for place in list_files(join(output, "records")))
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d+\.json", name))


def write_manifest(output: str, num_shards: int, **facts: Any) -> "Manifest":
    """Close a shard set: the parts of its index, then manifest.json, from the records of all `num_shards` shards.

    One part's records are in memory at a time. Safe to repeat and to race; DataError where another manifest is already
    there.
    """
    import pyarrow as pa

    missing = sorted(set(range(num_shards)) - set(committed(output)))
    if missing:
        raise PartialResultError(
            f"{len(missing)} of {num_shards} shards are missing (first: {missing[0]})",
            where=output,
            todo="run the same command again: it makes only what is missing",
        )

    def read(indexes: range) -> Iterator[tuple[ShardRecord, pa.Table]]:
        for start in range(indexes.start, indexes.stop, READ_AT_ONCE):
            places = [record_uri(output, index) for index in range(start, min(start + READ_AT_ONCE, indexes.stop))]
            for place, data in zip(places, pool.map(read_bytes, places), strict=True):  # threads that parse only wait
                record = ShardRecord.parse(data, place)
                yield dataclasses.replace(record, entries=[]), index_table(record.entries)  # a million are heavy

    records: list[ShardRecord] = []
    shards: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    with ThreadPoolExecutor(16) as pool:  # on S3 each read waits for an answer, and there may be thousands
        for start in range(0, num_shards, SHARDS_PER_PART):
            found = list(read(range(start, min(start + SHARDS_PER_PART, num_shards))))
            rows = pa.concat_tables([table for _, table in found])
            if rows.num_rows:
                parts.append(put_part(output, len(parts), rows))
            records += [record for record, _ in found]
            shards += [
                {"shard": r.shard, "sha256": r.sha256, "num_bytes": r.num_bytes, "num_samples": table.num_rows}
                for r, table in found
            ]
    if not parts:
        raise DataError("no sample could be used", where=output, todo="see the reasons in records/*.json")
    sides = [record.min_side_px for record, shard in zip(records, shards, strict=True) if shard["num_samples"]]
    return put_manifest(
        output,
        {
            "shards": shards,
            "index": parts,
            **summed(records),
            "min_side_px": None if None in sides else min(filter(None, sides)),
            **facts,
        },
    )


def put_manifest(output: str, facts: dict[str, Any]) -> "Manifest":
    """Write manifest.json: `facts` and what follows from their shards. DataError where another one is there."""
    shards = facts["shards"]
    manifest = {
        "format": FORMAT,
        "dataset_id": dataset_id_of(shards),
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "num_bytes": sum(shard["num_bytes"] for shard in shards),
        **facts,
    }
    data, place = json.dumps(manifest, indent=1, sort_keys=True).encode(), join(output, "manifest.json")
    if not put_if_absent(place, data) and read_bytes(place) != data:
        raise DataError(
            "another manifest.json is already there", where=place, todo="`ccsr verify` the set, or use a new output"
        )
    return Manifest.load(output)


def summed(records: Iterable[ShardRecord]) -> dict[str, Any]:
    """What the manifest says of samples that were not taken, the quarantined and how many were dropped, by reason; and
    the number of captions of the others."""
    quarantined: list[dict[str, str]] = []
    dropped = Counter[str]()
    num_captions = 0
    for record in records:
        quarantined += [dataclasses.asdict(item) for item in record.quarantined]
        dropped.update(record.dropped)
        num_captions += record.num_captions
    return {"quarantined": quarantined, "dropped": dict(dropped), "num_captions": num_captions}


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

    @property
    def has_lr(self) -> bool:
        """Whether its samples have LR images; else training degrades their HR."""
        return self.facts["has_lr"]

    @property
    def scale(self) -> int | None:
        """HR pixels per LR pixel, along one side; None without LR images."""
        return self.facts["scale"]

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What was listed: name, kind, licence, number of files."""
        return self.facts["sources"]

    @property
    def quarantined(self) -> list[dict[str, str]]:
        """The samples that were set aside, with the fields of `Quarantined`."""
        return self.facts["quarantined"]

    @property
    def shard_facts(self) -> list[dict[str, Any]]:
        """shard (its name), sha256, num_bytes and num_samples of each shard."""
        return self.facts["shards"]

    @property
    def num_captions(self) -> int:
        """Of its samples; an earlier version's sets have none."""
        return self.facts.get("num_captions", 0)

    @property
    def index_parts(self) -> list[dict[str, Any]]:
        """name, sha256 and num_samples of each part of the index; an earlier version's sets have one."""
        one = {"name": "index.parquet", "sha256": self.facts.get("index_sha256"), "num_samples": self.num_samples}
        return self.facts.get("index", [one])

    @cached_property
    def entries(self) -> Entries:
        """The byte index, one entry per sample in shard order; its hash is checked against the manifest's."""
        counts = [shard["num_samples"] for shard in self.shard_facts]
        return Entries(self.uri, self.index_parts, list(zip(self.shards, counts, strict=True)))

    @property
    def shards(self) -> list[str]:
        """Where the shards are: below the set, or absolute where `bases` has them in other places."""
        names = [shard["shard"] for shard in self.shard_facts]
        places = [base["uri"] for base in self.facts.get("bases", []) for _ in range(base["num_shards"])]
        return [join(place, name) for place, name in zip(places, names, strict=True)] if places else names

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "facts": self.facts}  # each process maps the index for itself

    @property
    def index(self) -> "pa.Table":
        """The index as a table, read anew each time. DataError unless it has the hash in the manifest."""
        return read_parts(self.uri, self.index_parts)
