"""Image sets: from a config's sources to the list of files that they name, in order."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from infra.errors import DataError
from infra.files.locations import check_output
from infra.files.storage import is_s3, join
from infra.imaging.images import below
from infra.shards.keys import bounded, with_digest
from pipelines.sharding.config import Source
from pipelines.sharding.files import FileList, SourceFile
from pipelines.sharding.inputs.listing import Walk, expected_files, layout_of, list_source, split_pattern
from pipelines.sharding.inputs.pages import drop_old_listings, list_in_parts
from pipelines.sharding.inputs.zips import split_zip

SAMPLE_KEY_BYTES = 48
OTHER = re.compile("[^A-Za-z0-9_-]")
CONTACT_SHEET = "contact_sheet.jpg"


def list_sources(sources: Sequence[Source], output: str = "", *, keep: bool = True) -> FileList:
    """All files of all sources, in the config's order and sorted within each. `output`, `keep`: as of `list_in_parts`.

    DataError as of `list_source`, and where two files would have one key.
    """
    names = [source.name for source in sources]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(
            f"two sources have the same name {repeated[0]}",
            where="sources",
            todo="give the sources different names",
        )
    if output and keep and any(map(is_s3, _places(sources))):
        drop_old_listings(output)
    files = FileList(_listed(sources, partial(list_in_parts, output=output, keep=keep)))
    if twice := files.repeated_keys():
        files = FileList(file._replace(key=_digest_key(file)) if file.key in twice else file for file in files)
        _check_keys(files)
    return files


def _listed(sources: Sequence[Source], walk: Walk) -> Iterator[SourceFile]:
    for source in sources:
        for one in list_source(source, walk):
            scale = getattr(source, "scale", 1) if one.lr_uri else 1
            yield SourceFile(
                _key(source.name, one.name),
                source.name,
                one.name,
                one.uri,
                one.num_bytes,
                one.lr_uri,
                scale,
                one.identity,
                one.caption_uri,
                one.entry,
            )


def _check_keys(files: FileList) -> None:
    twice = files.repeated_keys()
    if not twice:
        return
    first = min(twice)
    one, other = [file.uri for file in files if file.key == first][:2]
    raise DataError(
        f"two files would have the same key {first}" + (f", so {len(twice) - 1} more" if len(twice) > 1 else ""),
        where=f"{one} and {other}",
        todo="give the sources different names, and name no file twice",
    )


def check_apart(output: str, sources: Sequence[Source]) -> None:
    """ConfigError where a source would list what sharding into `output` writes, of which one file is an image."""
    for path in _places(sources):
        if split_zip(path):
            continue
        root, pattern = split_pattern(path)
        if pattern is None or pattern.fullmatch(below(join(output, CONTACT_SHEET), root)):
            check_output(output, [root])


def _places(sources: Sequence[Source]) -> Iterator[str]:
    return (path for one in sources for path in (getattr(one, field, None) for field in ("path", "hr", "lr")) if path)


def source_facts(sources: Sequence[Source], files: FileList) -> list[dict[str, Any]]:
    """What the manifest says of each source: name, kind, dataset, num_files, expected_files, licence."""
    counts = files.counts()
    facts = []
    for source in sources:
        dataset = getattr(source, "dataset", None)
        layout = layout_of(dataset, source.name) if dataset else {}
        facts.append(
            {
                "name": source.name,
                "kind": source.kind,
                "dataset": dataset,
                "num_files": counts.get(source.name, 0),
                "expected_files": _expected_used(source),
                "licence": source.licence or layout.get("licence"),
            }
        )
    return facts


def _expected_used(source: Source) -> int | None:
    expected = expected_files(source)
    first = getattr(source, "first", None)
    return min(expected, first) if expected and first else expected


def _key(source: str, name: str) -> str:
    """ASCII without dots, which end a key in a WebDataset tar."""
    stem = name.rsplit(".", 1)[0].rsplit("/", 1)[-1]
    return bounded(OTHER.sub("-", f"{source}-{stem}"), f"{source}/{name}", SAMPLE_KEY_BYTES)


def _digest_key(file: SourceFile) -> str:
    return with_digest(file.key, f"{file.source}/{file.name}")
