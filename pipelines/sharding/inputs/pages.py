"""A long listing on S3, written beside the output as it comes, so that a stopped run continues it."""

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import count, islice

from infra.files.publish import put_if_absent
from infra.files.storage import is_s3, iter_files, join, list_files, modified_seconds, read_json, remove
from infra.run import has_work

LISTINGS = ".listing"
PART = r"\.listing/[0-9a-f]{16}-\d{6}\.json"
FILES_A_PART = 100_000
SECONDS_CONTINUED = 24 * 3600.0  # an older listing that was stopped may lack what came into the bucket since


def list_in_parts(uri: str, output: str, *, keep: bool = True) -> Iterator[tuple[str, int]]:
    """`iter_files`; for S3 in parts OUT/.listing/HASH-NUMBER.json: [name, size] of 100,000 files, of fewer in the last.

    Parts that are there are taken, with a note, and a listing that was stopped is continued behind the last: after
    `drop_old_listings` they are the plan's own or young. `keep`: write parts; without it, those of shards are read
    alone. `output`: "" for no parts.
    """
    if not (output and is_s3(uri)) or (not keep and not has_work(output)):
        yield from iter_files(uri)
        return
    start = join(output, LISTINGS, hashlib.sha256(uri.encode()).hexdigest()[:16])
    parts = [part for part in list_files(join(output, LISTINGS)) if part.startswith(start)]
    if parts:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(modified_seconds(parts[-1])))
        print(f"note: the list of {uri} of {date} is used (.listing in the output)", file=sys.stderr)
    rest, last = None, ""
    for number in count():
        part = f"{start}-{number:06d}.json"
        rows = read_json(part) if part in parts else None
        if rows is None:
            rest = rest or iter_files(uri, last)
            rows = list(islice(rest, FILES_A_PART))
            if keep and not put_if_absent(part, json.dumps(rows).encode()):
                rows, rest = read_json(part), None  # another driver's, which may have begun earlier
        yield from map(tuple, rows)
        if len(rows) < FILES_A_PART:
            return
        last = rows[-1][0]


def drop_old_listings(output: str) -> None:
    """Where no shard was written yet, remove the listings that are finished or were stopped over a day ago."""
    if has_work(output):
        return
    listings = defaultdict(list)
    for part in list_files(join(output, LISTINGS)):
        listings[part.rpartition("-")[0]].append(part)
    for parts in listings.values():
        finished = len(read_json(parts[-1])) < FILES_A_PART
        if finished or time.time() - modified_seconds(parts[-1]) > SECONDS_CONTINUED:
            _remove(parts)


def remove_listings(output: str) -> None:
    """Remove the parts of a set's listings."""
    _remove(list(list_files(join(output, LISTINGS))))


def _remove(parts: list[str]) -> None:
    for part in parts:
        remove(part)
