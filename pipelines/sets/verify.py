"""`ccsr verify`: does every byte of a shard set agree with its manifest, and is any of it in another set too?"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infra.display.progress import progress
from infra.errors import CcsrError, DataError
from infra.files.publish import download, temporary_folder
from infra.files.storage import is_s3, join, list_files, sha256_file
from infra.imaging.images import below, skip_system_files
from infra.run import MLFLOW_FILE
from infra.shards.manifest import Manifest, ShardRecord, dataset_id_of, index_table, record_uri, summed
from infra.shards.shard import Entry, read_index
from pipelines.sets.append import joined
from pipelines.sharding.inputs.pages import PART
from pipelines.sharding.screening.dedupe import NEAR_DUPLICATES
from pipelines.sharding.screening.phash import NEAR_BITS, near_pairs

FILES = ("run.json", MLFLOW_FILE, "manifest.json", "contact_sheet.jpg", "DATA_CARD.md", NEAR_DUPLICATES)
NUM_THREADS = 8


def verify(uri: str) -> Manifest:
    """Check shards, byte index, records, dataset id against one another, and that no other object is there.

    A shard's hash, and its members against its entries: keys, order, byte spans. Each record against manifest and
    index. Raises DataError with every fault; a byte index that the manifest does not know ends the check at once.
    """
    manifest = Manifest.load(uri)
    if "bases" in manifest.facts:
        return _verify_appended(manifest)
    shards = manifest.shard_facts
    index = manifest.index
    present = set(skip_system_files((below(place, uri) for place in list_files(uri)), uri))
    starts = [0, *accumulate(shard["num_samples"] for shard in shards)]

    def check(number: int) -> tuple[list[str], ShardRecord | None]:
        shard = shards[number]
        rows = index.slice(starts[number], shard["num_samples"])
        entries = [Entry(*row.values()) for row in rows.select(range(4)).to_pylist()]
        faults = _check_tar(uri, shard, entries, folder) if shard["shard"] in present else [_missing(shard)]
        try:
            record = ShardRecord.read(record_uri(uri, number))
        except CcsrError as error:
            return [*faults, f"records/{number:06d}.json: {error.what}"], None
        said = {"shard": record.shard, "sha256": record.sha256, "num_bytes": record.num_bytes}
        written = index_table(record.entries).select(index.column_names)
        if {**said, "num_samples": len(record.entries)} != shard or not written.equals(rows):
            faults.append(f"records/{number:06d}.json disagrees with manifest or index")
        return faults, dataclasses.replace(record, entries=[])

    faults: list[str] = []
    records: list[ShardRecord] = []
    with (
        progress("verifying", len(shards)) as advance,
        temporary_folder("verify") as folder,
        ThreadPoolExecutor(NUM_THREADS) as pool,
    ):
        for found, record in pool.map(check, range(len(shards))):
            faults += found
            records += [record] if record else []
            advance()
    if dataset_id_of(shards) != manifest.dataset_id:
        faults.append("the manifest's list of shards does not match its dataset id")
    if not index.num_rows == starts[-1] == manifest.num_samples:
        faults.append(f"index, shards, manifest count {index.num_rows}, {starts[-1]}, {manifest.num_samples} samples")
    sums = summed(records)
    if len(records) == len(shards) and any(manifest.facts.get(name, type(sums[name])()) != sums[name] for name in sums):
        faults.append("the manifest lists other quarantined or dropped samples or captions than the records")
    known = {*FILES, *(part["name"] for part in manifest.index_parts), *(shard["shard"] for shard in shards)}
    known |= {f"records/{i:06d}.json" for i in range(len(shards))}
    faults += [f"{name} does not belong" for name in sorted(present - known) if not re.fullmatch(PART, name)]
    if faults:
        raise DataError(
            f"{len(faults)} faults: {'; '.join(faults[:5])}{'; ...' if len(faults) > 5 else ''}",
            where=uri,
            todo="make the set again in a new output; `ccsr verify --clean` names what does not belong",
        )
    return manifest


def _verify_appended(manifest: Manifest) -> Manifest:
    """Verify the sets that were appended into one, and that it agrees with them."""
    sets = []
    for base in manifest.facts["bases"]:
        if "dataset_id" not in base:
            what = "this is an index over tars that others made, which carry no hashes"
            raise DataError(what, where=manifest.uri, todo="shard them, for a set that can be verified")
        sets.append(verify(base["uri"]))
        if sets[-1].dataset_id != base["dataset_id"]:
            raise DataError("another set is there now", where=base["uri"], todo="`ccsr append` into a new output")
    expected = joined(sets)
    wrong = ", ".join(name for name in expected if manifest.facts.get(name, 0) != expected[name])
    if wrong:
        raise DataError(
            f"the manifest disagrees with its sets: {wrong}", where=manifest.uri, todo="`ccsr append` into a new output"
        )
    return manifest


def _missing(shard: dict[str, Any]) -> str:
    return f"{shard['shard']} is missing"


def _check_tar(uri: str, shard: dict[str, Any], entries: list[Entry], folder: Path) -> list[str]:
    place = join(uri, shard["shard"])
    local = download(place, folder)
    try:
        if sha256_file(local) != shard["sha256"]:
            return [f"{shard['shard']} has changed"]
        if read_index(local, shard["shard"]) != entries:
            return [f"{shard['shard']} holds other samples, or in other places, than the index says"]
        return []
    finally:
        if is_s3(place):
            local.unlink()


class Duplicate(NamedTuple):
    """Samples of one file in a set and of one in another that show the same: how many of each, one of each, and the
    bits in which their hashes differ (None: it is the same file)."""

    key: str
    other: str
    bits: int | None
    num_samples: int
    num_others: int
    num_pairs: int


def find_duplicates(uri: str, against: str, max_bits: int = NEAR_BITS) -> Iterator[Duplicate]:
    """Files that two sets share; their hashes differ in at most `max_bits`.

    Only the byte indexes are read. Crops of one file are found wherever they are cut; another file's only where both
    show nearly the same window (phash.py), turned and mirrored copies not at all. DataError for a set without hashes.
    """
    (keys, hashes, sources), (other_keys, other_hashes, other_sources) = map(_hashes, (uri, against))
    shared = np.intersect1d(sources, other_sources)
    same = zip(_rows_of(shared, sources), _rows_of(shared, other_sources), strict=True)
    for rows, others in sorted(same, key=lambda pair: int(pair[0][0])):
        key, other = keys[int(rows[0])].as_py(), other_keys[int(others[0])].as_py()
        yield Duplicate(key, other, None, len(rows), len(others), len(rows) * len(others))
    near: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for i, j, bits in near_pairs(hashes, other_hashes, max_bits=max_bits):
        if sources[i] != other_sources[j]:
            near.setdefault((sources[i], other_sources[j]), []).append((bits, i, j))
    for pairs in near.values():
        bits, i, j = min(pairs)
        num_samples, num_others = (len({pair[place] for pair in pairs}) for place in (1, 2))
        yield Duplicate(keys[i].as_py(), other_keys[j].as_py(), bits, num_samples, num_others, len(pairs))


def _rows_of(values: np.ndarray, column: np.ndarray) -> list[np.ndarray]:
    """The rows of `column` that hold each of `values`, in order."""
    order = np.argsort(column, kind="stable")
    first, last = (np.searchsorted(column[order], values, side=side) for side in ("left", "right"))
    return [order[start:end] for start, end in zip(first, last, strict=True)]


def print_duplicates(uri: str, against: str, max_bits: int) -> None:
    """Print a line for each pair of files that two sets share, with the number of samples. DataError if there are
    any."""
    counts = Counter[str]()
    for found in find_duplicates(uri, against, max_bits):
        how = "same source file" if found.bits is None else f"{found.bits} bits"
        crops = [f"{found.num_samples} and {found.num_others} crops"] if found.num_pairs > 1 else []
        counts["of the same source file" if found.bits is None else "alike"] += found.num_pairs
        print(found.key, found.other, how, *crops, sep="\t")
    if counts:
        raise DataError(
            f"{counts.total()} pairs of samples are in both sets: "
            + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())),
            where=f"{uri} and {against}",
            todo="look at the files above; leave them out of one of the sets",
        )
    print("no picture is in both sets")


def _hashes(uri: str) -> tuple[Any, np.ndarray, np.ndarray]:
    index = Manifest.load(uri).index
    if "phash" not in index.column_names:
        raise DataError(
            "this set was made by an earlier version: its index holds no hashes to compare by",
            where=join(uri, "index.parquet"),
            todo="make the set again with `ccsr shard`; the same config gives the same dataset id",
        )
    return index["key"], index["phash"].to_numpy(), index["source_hash"].to_numpy()
