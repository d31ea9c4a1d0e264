"""`ccsr verify --clean`: name what does not belong to a shard set, and remove what killed writers left behind."""

import re
import time
from dataclasses import dataclass

from infra.errors import DataError
from infra.files.storage import (
    abort_upload,
    exists,
    is_s3,
    join,
    list_files,
    modified_seconds,
    remove,
    unfinished_uploads,
)
from infra.imaging.images import below, skip_system_files
from infra.shards.manifest import Manifest
from pipelines.sets.verify import FILES
from pipelines.sharding.inputs.pages import PART
from pipelines.sharding.screening.dedupe import HASHES

SECONDS_AT_WORK = 3600.0  # of an unfinished set: what is younger may belong to a writer that is at work
INDEX = re.compile(r"index(-\d{6})?\.parquet")
HASHED = re.compile(rf"{HASHES}/\d+\.json")
OURS = re.compile(
    rf"{PART}|shards/\d+\.tar|records/\d+\.json|{HASHED.pattern}|{INDEX.pattern}|{'|'.join(map(re.escape, FILES))}"
)
TEMPORARY = re.compile(r"(?P<folder>(?:.*/)?)\.(?P<name>[^/]+)\.[0-9a-f]{12}\.tmp")
PROBE = re.compile(r"\.writable-[0-9a-f]{12}")


@dataclass(frozen=True)
class Stray:
    """An object that is no part of a shard set; `unknown`: no writer of ours made it."""

    name: str
    what: str
    removed: bool = False
    unknown: bool = False


def clean(uri: str) -> list[Stray]:
    """Name every object at `uri` that no complete set holds; remove the temporary files, probes and unfinished uploads
    of our own writers.

    In an unfinished set these are removed only once they are an hour old, and tars without a record stay: the next run
    takes them over. Files that we did not write are never removed. DataError where no shard set was begun.
    """
    finished = exists(join(uri, "manifest.json"))
    if not finished and not exists(join(uri, "run.json")):
        raise DataError("no shard set was begun here", where=uri, todo="check the path")
    names = list(skip_system_files((below(place, uri) for place in list_files(uri)), uri))
    records = {name for name in names if name.startswith("records/") and OURS.fullmatch(name)}
    shards = {name.replace("records", "shards").replace(".json", ".tar") for name in records}
    parts = set(filter(INDEX.fullmatch, names))
    if finished:
        manifest = Manifest.load(uri)
        shards = {shard["shard"] for shard in manifest.shard_facts}
        parts = {part["name"] for part in manifest.index_parts}
        records = {name.replace("shards", "records").replace(".tar", ".json") for name in shards}
    strays = []
    for name in names:
        if re.fullmatch(PART, name):
            if finished:
                remove(join(uri, name))
                strays.append(_leftover(name, "listing of a finished set", removed=True))
            continue
        temporary = TEMPORARY.fullmatch(name)
        if PROBE.fullmatch(name) or (temporary and OURS.fullmatch(temporary["folder"] + temporary["name"])):
            old = finished or time.time() - modified_seconds(join(uri, name)) > SECONDS_AT_WORK
            if old:
                remove(join(uri, name))
            strays.append(_leftover(name, "temporary file of a stopped writer", removed=old))
        elif not finished and OURS.fullmatch(name) and name.endswith(".tar") and name not in shards:
            strays.append(Stray(name, "shard without a record: the next run takes it over"))
        elif name not in {*FILES, *parts, *shards, *records} and (finished or not HASHED.fullmatch(name)):
            strays.append(Stray(name, "unknown: no writer of this project made it", unknown=True))
    for name, upload, started in unfinished_uploads(uri) if is_s3(uri) else []:
        if not OURS.fullmatch(name):
            strays.append(Stray(name, "unfinished upload: no writer of this project began it", unknown=True))
            continue
        old = finished or time.time() - started > SECONDS_AT_WORK
        if old:
            abort_upload(join(uri, name), upload)
        strays.append(_leftover(name, "unfinished upload of a stopped writer", removed=old))
    return strays


def print_cleaned(uri: str) -> None:
    """Clean, and print a line for every stray. DataError if any is unknown."""
    strays = clean(uri)
    for stray in strays:
        print("removed" if stray.removed else "left", stray.name, stray.what, sep="\t")
    print(f"{sum(stray.removed for stray in strays)} of {len(strays)} strays removed")
    unknown = [stray.name for stray in strays if stray.unknown]
    if unknown:
        raise DataError(
            f"{len(unknown)} objects do not belong here: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}",
            where=uri,
            todo="look at them; move or remove them by hand",
        )


def _leftover(name: str, what: str, *, removed: bool) -> Stray:
    return Stray(name, what if removed else f"{what}, or of one at work: under an hour old", removed)
