"""Lists of images as other projects ship them: .txt, .csv, .json, .jsonl and .parquet."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from infra.errors import DataError, line_of
from infra.files.locations import location
from infra.files.storage import join, read_bytes
from infra.shards.keys import is_utf8

SUFFIXES = (".txt", ".csv", ".json", ".jsonl", ".parquet")


def read_list(path: str, columns: Sequence[str], caption: str | None = None) -> list[tuple[str, ...]]:
    """The given columns of every row, all text, and the column `caption`, which may be empty. A .txt file has one path
    a line; a list of JSON may hold plain paths.

    DataError, with the row's number, for an empty or missing value, for a caption of another type, and for a file that
    cannot be parsed.
    """
    suffix = next((suffix for suffix in SUFFIXES if path.lower().endswith(suffix)), None)
    if suffix is None:
        raise DataError("no list of a known kind", where=path, todo=f"a list ends in {', '.join(SUFFIXES)}")
    try:
        rows = list(_rows(read_bytes(path), suffix, columns[0]))
    except (ValueError, csv.Error) as error:  # of JSON, UTF-8 and Arrow too
        raise DataError(f"the list cannot be read ({line_of(error)})", where=path, todo="write it in UTF-8") from error
    wrong = [number for number, row in enumerate(rows, 1) if any(not _text(row, column) for column in columns)]
    if wrong or not rows:
        there = ", ".join(rows[0]) if rows and isinstance(rows[0], dict) else "no column names"
        raise DataError(
            f"{len(wrong)} of {len(rows)} rows have no {' or '.join(columns)}"
            + (f" (first: row {wrong[0]}; row 1 has {there})" if wrong else ""),
            where=path,
            todo="complete the list, or name its columns (`image`, `lr`)",
        )
    if caption:
        kinds = [(number, row[caption]) for number, row in enumerate(rows, 1) if row.get(caption) is not None]
        if other := [number for number, value in kinds if not isinstance(value, str)]:
            raise DataError(
                f"{len(other)} of {len(rows)} rows have a {caption} that is no text (first: row {other[0]})",
                where=path,
                todo="write each caption as one text",
            )
        if bad := [number for number, value in kinds if not is_utf8(value)]:
            raise DataError(
                f"{len(bad)} of {len(rows)} rows have a {caption} that is not UTF-8 (first: row {bad[0]})",
                where=path,
                todo="write these rows again as UTF-8: half of a surrogate pair is left where a text was cut",
            )
    every = [*columns, *([caption] if caption else [])]
    return [tuple(_text(row, column) for column in every) for row in rows]


def resolved(name: str, path: str) -> str:
    """Where a list's file is: a relative path is below the list's folder."""
    return location(name if name.startswith(("/", "~")) or ":/" in name else join(path.rpartition("/")[0], name))


def _rows(data: bytes, suffix: str, image: str) -> Iterable[dict[str, Any]]:
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(io.BytesIO(data)).to_pylist()
    text = data.decode("utf-8-sig")
    lines = [line for line in text.splitlines() if line.strip()]
    if suffix == ".txt":
        return [{image: line.strip()} for line in lines]
    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    values = json.loads(text) if suffix == ".json" else [json.loads(line) for line in lines]
    if not isinstance(values, list):
        raise ValueError(f"a list is expected, not {type(values).__name__}")
    return [value if isinstance(value, dict) else {image: value} for value in values]


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    return value if isinstance(value, str) else ""
