"""A long listing on S3, written beside the output as it comes, so that a stopped run continues it."""

import hashlib
import json
from collections.abc import Iterator
from itertools import count, islice

from infra.files.publish import put_if_absent
from infra.run import has_work
from infra.storage import is_s3, iter_files, join, list_files, read_json, remove

LISTINGS = ".listing"
FILES_A_PART = 100_000


def list_in_parts(uri: str, output: str) -> Iterator[tuple[str, int]]:
    """`iter_files`; for S3 in parts OUT/.listing/HASH-NUMBER.json: [name, size] of 100,000 files, of fewer in the last.

    A listing that was not finished is continued behind its last part. A finished one is used again where shards were
    written by it, which holds their plan; before that, the bucket is listed anew. `output`: "" for no parts.
    """
    if not (output and is_s3(uri)):
        yield from iter_files(uri)
        return
    start = join(output, LISTINGS, hashlib.sha256(uri.encode()).hexdigest()[:16])
    parts = [part for part in list_files(join(output, LISTINGS)) if part.startswith(start)]
    if parts and len(read_json(parts[-1])) < FILES_A_PART and not has_work(output):
        _remove(parts)
        parts = []
    rest, last = None, ""
    for number in count():
        part = f"{start}-{number:06d}.json"
        rows = read_json(part) if part in parts else None
        if rows is None:
            rest = rest or iter_files(uri, last)
            rows = list(islice(rest, FILES_A_PART))
            if not put_if_absent(part, json.dumps(rows).encode()):  # another driver's, which may have begun earlier
                rows, rest = read_json(part), None
        yield from map(tuple, rows)
        if len(rows) < FILES_A_PART:
            return
        last = rows[-1][0]


def remove_listings(output: str) -> None:
    """Remove the parts of a set's listings."""
    _remove(list(list_files(join(output, LISTINGS))))


def _remove(parts: list[str]) -> None:
    for part in parts:
        remove(part)
