"""WebDataset tars that others made: listed, and indexed by reading their headers alone."""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from infra.errors import ConfigError, DataError, line_of
from infra.files.publish import temporary_folder
from infra.files.storage import exists, explained, file_size, join, list_files, name_of, open_file
from infra.imaging.images import IMAGE_SUFFIXES
from infra.shards.byte_index import SHARDS_PER_PART, index_table, put_part
from infra.shards.manifest import Manifest, put_manifest
from infra.shards.shard import CAPTION, IMAGES, IndexedEntry, is_member, split_member

NUM_LISTED = 5
TARS_AT_ONCE = 64  # whose headers are in memory
HEADER_BYTES = 16 * 1024  # of one request: a tar's header, and the small members between two images


class TarSample(NamedTuple):
    """A sample of a tar: WebDataset's key, its members' headers, and the one that is its image."""

    key: str
    members: list[tarfile.TarInfo]
    image: tarfile.TarInfo


def expand(path: str, suffix: str) -> dict[str, int]:
    """The files that `path` names, with their sizes in bytes: with braces (`{000..099}`, `{a,b}`) each of them; below a
    folder those with the suffix; else itself. DataError, with their number, where some or all are missing."""
    try:
        files = list(braceexpand(path)) if "{" in path else [path]
    except ValueError as error:
        raise ConfigError("a brace is not closed", where=path, todo="write {000..099} or {a,b}") from error
    if len(files) == 1 and not path.lower().endswith(suffix):
        files = [file for file in list_files(path) if file.lower().endswith(suffix)]
        if not files:
            raise DataError(f"no {suffix} files here", where=path, todo="check the path")
    return dict(zip(files, sizes_of(files, path), strict=True))


def sizes_of(files: Sequence[str], where: str) -> list[int]:
    """Sizes in bytes. DataError with the number and the first names of files that are missing."""
    with ThreadPoolExecutor(32) as pool:  # on S3 each answer is waited for
        sizes = list(pool.map(file_size, files))
    missing = [file for file, size in zip(files, sizes, strict=True) if size is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files are missing: {', '.join(missing[:NUM_LISTED])}",
            where=where,
            todo="complete them, or take them out",
        )
    return [size or 0 for size in sizes]


def tar_samples(tars: Sequence[str], extension: str | None = None) -> Iterator[list[TarSample]]:
    """The samples of each tar that have an image, in order. It is the member `extension` (`jpg`, `hr.png`); by default
    `hr.png` or `hr.jpg`, or the only member whose suffix is an image's. DataError for a damaged or compressed tar, a
    sample with several images, and at the end for tars without images, with their number."""
    with ThreadPoolExecutor(16) as pool:
        bare = []
        for start in range(0, len(tars), TARS_AT_ONCE):
            some = tars[start : start + TARS_AT_ONCE]
            for tar, samples in zip(some, pool.map(lambda tar: _samples_of(tar, extension), some), strict=True):
                bare += [] if samples else [tar]
                yield samples
    if bare:
        what = f"member .{extension}" if extension else "image"
        names = ", ".join(map(name_of, bare[:NUM_LISTED]))
        raise DataError(
            f"{len(bare)} of {len(tars)} tars hold no {what}: {names}", where=bare[0], todo="check the path"
        )


def _samples_of(tar: str, extension: str | None) -> list[TarSample]:
    try:
        with (
            explained("cannot read", tar),
            open_file(tar, HEADER_BYTES) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            members = [one for one in archive if is_member(one)]
    except tarfile.TarError as error:
        todo = "fetch it again; a compressed tar has to be unpacked"
        raise DataError(f"the tar cannot be read ({line_of(error)})", where=tar, todo=todo) from error
    samples = []
    for key, group in groupby(members, key=lambda one: split_member(one.name)[0]):
        sample = list(group)
        by_extension = {split_member(one.name)[1]: one for one in sample}
        wanted = (extension,) if extension else IMAGES
        images = [by_extension[name] for name in wanted if name in by_extension]
        if not extension and not images:
            images = [one for one in sample if Path(one.name).suffix.lower() in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise DataError(
                f"sample {key} has {len(images)} images: {', '.join(one.name for one in images)}",
                where=tar,
                todo=f"write `member: {split_member(images[0].name)[1]}`, for one, in a source of `ccsr shard`",
            )
        if images:
            samples.append(TarSample(key, sample, images[0]))
    return samples


def open_set(path: str, cache: str, *, write: bool = True) -> Manifest:
    """The shard set at `path`; for a tar or braces a set over these tars where they are, indexed below `cache` once.

    Without `write` the index is not kept, and only the facts are good.
    """
    if "{" not in path and not path.lower().endswith(".tar"):
        return Manifest.load(path)
    if not write:
        with temporary_folder("index") as folder:
            return _index(path, str(folder))
    return _index(path, cache)


def _index(path: str, cache: str) -> Manifest:
    import pyarrow as pa

    found = expand(path, ".tar")
    tars, sizes = list(found), list(found.values())
    output = join(cache, hashlib.sha256(json.dumps([tars, sizes]).encode()).hexdigest()[:16])
    if exists(join(output, "manifest.json")):
        return Manifest.load(output)
    shards, tables, num_captions = [], [], 0
    for tar, size, samples in zip(tars, sizes, tar_samples(tars), strict=True):
        headers = [[one.name, one.offset, one.size] for sample in samples for one in sample.members]
        shards.append(
            {
                "shard": tar.rpartition("/")[2],
                "sha256": hashlib.sha256(json.dumps(headers).encode()).hexdigest(),  # of names, places and sizes
                "num_bytes": size,
                "num_samples": len(samples),
            }
        )
        num_captions += sum(split_member(one.name)[1] == CAPTION for sample in samples for one in sample.members)
        tables.append(index_table([_entry(tar, sample) for sample in samples]))
    starts = range(0, len(tars), SHARDS_PER_PART)
    parts = [pa.concat_tables(tables[start : start + SHARDS_PER_PART]) for start in starts]
    folders = groupby(tar.rpartition("/")[0] for tar in tars)
    facts = {
        "shards": shards,
        "index": [put_part(output, number, rows) for number, rows in enumerate(parts)],
        "bases": [{"uri": folder, "num_shards": len(list(group))} for folder, group in folders],
        "quarantined": [],
        "scale": None,
        "has_lr": False,
        "num_captions": num_captions,
    }
    return put_manifest(output, facts)


def _entry(tar: str, sample: TarSample) -> IndexedEntry:
    last = sample.members[-1]
    start, end = sample.members[0].offset, last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return IndexedEntry(sample.key, tar, start, end - start)
