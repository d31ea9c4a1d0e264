"""What each kind of source lists: its images by name, in order, one by one."""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from infra.config import load_yaml
from infra.errors import ConfigError, DataError
from infra.files.storage import join
from infra.imaging.images import check_folder, choose_images, no_images
from infra.imaging.pairing import by_pair_name
from infra.shards.manifest import Manifest
from infra.shards.shard import Entry
from infra.shards.tars import NUM_LISTED, sizes_of
from pipelines.sharding.config import (
    FolderSource,
    ListSource,
    PackageSource,
    PairsSource,
    ParquetSource,
    ShardsSource,
    Source,
    WebDatasetSource,
)
from pipelines.sharding.inputs.containers import INLINE, list_parquet, list_tars
from pipelines.sharding.inputs.lists import read_list, resolved
from pipelines.sharding.inputs.zips import list_members, split_zip

Walk = Callable[[str], Iterable[tuple[str, int]]]
"""A folder or s3:// prefix -> the files below it as (name, size)."""
WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class Found(NamedTuple):
    """An image of a source; the fields are those of `SourceFile`."""

    name: str
    uri: str
    num_bytes: int
    lr_uri: str = ""
    entry: Entry | None = None
    identity: str = ""
    caption_uri: str = ""


def list_source(source: Source, walk: Walk) -> Iterator[Found]:
    """The images of a source.

    DataError for a source without images or, where it names captions, without a single one; for another number of
    files than expected, an image without its partner.
    """
    number, captions = 0, 0
    first = getattr(source, "first", None)
    for number, one in enumerate(_found(source, walk), 1):
        captions += bool(one.caption_uri)
        if first is None or number <= first:
            yield one
    where = getattr(source, "path", None) or source.name
    expected = expected_files(source)
    if expected and number != expected:
        raise DataError(
            f"source {source.name} has {number} files, {expected} are expected",
            where=f"{source.hr} and {source.lr}" if isinstance(source, PairsSource) else where,
            todo=f"complete it; if it is meant to be so, write `expected_files: {number}`",
        )
    if not number:
        raise DataError("no images here", where=where, todo="check the path and the file")
    if (caption := getattr(source, "caption", None)) and not captions:
        raise DataError(
            f"none of {number} images has a caption ({caption})",
            where=where,
            todo="correct `caption`, or leave it out",
        )


def expected_files(source: Source) -> int | None:
    """How many files a source should have, if it or its dataset says so."""
    expected = getattr(source, "expected_files", None)
    dataset = getattr(source, "dataset", None)
    return expected or (layout_of(dataset, source.name)["expected_files"] if dataset else None)


def _found(source: Source, walk: Walk) -> Iterable[Found]:
    if isinstance(source, PackageSource):
        return (_package_file(source, name) for name in source.files)
    if isinstance(source, ShardsSource):
        manifest = Manifest.load(source.path.rstrip("/"))
        identity = manifest.dataset_id
        return (Found(e.key, manifest.uri, e.length_bytes, "", e, identity) for e in manifest.entries)
    if isinstance(source, ListSource):
        return _list_rows(source)
    if isinstance(source, WebDatasetSource):
        return (
            _captioned(Found(*image), text.uri, text.num_bytes) if text else Found(*image)
            for image, text in list_tars(source.path, source.member, source.caption)
        )
    if isinstance(source, ParquetSource):
        found = list_parquet(source.path, source.column, source.caption)
        return (_captioned(Found(*image), text.uri, text.num_bytes) if text else Found(*image) for image, text in found)
    if isinstance(source, PairsSource):
        return _list_pairs(source, walk)
    return _list_folder(source, walk)


def _captioned(found: Found, uri: str, what: str | int) -> Found:
    """With a caption, whose size or hash is a part of what the source is."""
    return found._replace(caption_uri=uri, identity=f"{found.identity} caption {what}".strip())


def _list_folder(source: FolderSource, walk: Walk) -> Iterator[Found]:
    pattern = re.compile(layout_of(source.dataset, source.name)["files"]) if source.dataset else None
    found = list_place(source.path, walk, source.caption)
    return (one for one in found if pattern is None or pattern.fullmatch(one.name))


def _list_rows(source: ListSource) -> Iterator[Found]:
    columns = [source.image, *([source.lr] if source.lr else [])]
    rows = read_list(source.path, columns, source.caption)
    files = [[resolved(name, source.path) for name in row[: len(columns)]] for row in rows]
    sizes = iter(sizes_of([file for row in files for file in row], source.path))
    for row, (uri, *lr) in zip(rows, files, strict=True):
        size, lr_sizes = next(sizes), [next(sizes) for _ in lr]
        found = Found(row[0], uri, size, "".join(lr), None, " ".join(map(str, lr_sizes)))
        text = row[-1].strip() if source.caption else ""
        yield _captioned(found, INLINE + quote(text), hashlib.sha256(text.encode()).hexdigest()[:16]) if text else found


def _list_pairs(source: PairsSource, walk: Walk) -> list[Found]:
    sides = []
    for place in (source.hr, source.lr):
        files: dict[str, Found] = {}
        for one in list_place(place, walk):
            name = one.name.rsplit(".", 1)[0]
            if name in files:
                raise DataError(
                    f"two files are the image {name}", where=f"{one.uri} and {files[name].uri}", todo="remove one"
                )
            files[name] = one
        sides.append(files)
    hr, lr = by_pair_name(*sides)
    alone = [
        f"{len(names)} {have} images have no {lack}: {', '.join(names[:NUM_LISTED])}"
        for have, lack, names in (
            ("HR", "LR", sorted(hr.keys() - lr.keys())),
            ("LR", "HR", sorted(lr.keys() - hr.keys())),
        )
        if names
    ]
    if alone:
        raise DataError(
            "; ".join(alone),
            where=f"{source.hr} and {source.lr}",
            todo="complete the pairs; a pair has one name, apart from _HR, _LR4, x4, _x1 at its end and the suffix",
        )
    return [
        Found(one.name, one.uri, one.num_bytes, lr[name].uri, None, f"{lr[name].name} {lr[name].num_bytes}")
        for name, one in hr.items()
    ]


def list_place(path: str, walk: Walk, caption: str | None = None) -> Iterator[Found]:
    """The image files of a folder, s3:// prefix, zip or pattern, by their names below it; `caption`: with the text
    files of this suffix beside them."""
    zipped = split_zip(path)
    root, pattern = split_pattern(zipped[1].strip("/") if zipped else path.rstrip("/"))
    files: Iterable[tuple[str, int]]
    if zipped:
        folder = "" if root in ("", ".") else f"{root}/"
        base, members = f"{zipped[0]}!{folder}", list_members(zipped[0]).items()
        files = ((name.removeprefix(folder), size) for name, size in members if name.startswith(folder))
    else:
        check_folder(root)
        base, files = join(root, ""), walk(root)
    texts = {}
    if caption:
        files = list(files)
        texts = {name: size for name, size in files if size and name.endswith(f".{caption}")}
    number, there = 0, False

    def every() -> Iterator[tuple[str, int]]:
        nonlocal there
        for file in files:
            there = True
            yield file

    for name, size in choose_images(every(), path):
        if pattern is None or pattern.fullmatch(name):
            number += 1
            found = Found(name, base + name, size)
            text = f"{name.rpartition('.')[0]}.{caption}" if texts else ""
            yield _captioned(found, base + text, texts[text]) if text in texts else found
    if not number:
        if zipped or (pattern and there):
            raise DataError("no images here", where=path, todo="check the path, and the pattern if it has one")
        raise no_images(root, there=there)


def split_pattern(path: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder before the first `*` or `?`, and what the path below it has to match."""
    if not re.search(r"[*?]", path):
        return path, None
    parts = path.split("/")
    at = next(i for i, part in enumerate(parts) if "*" in part or "?" in part)
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", "/".join(parts[at:]))
    pattern = re.compile("".join(WILDCARDS.get(piece, re.escape(piece)) for piece in pieces))
    return "/".join(parts[:at]) or ("/" if path.startswith("/") else "."), pattern


@cache
def _layouts() -> dict[str, Any]:
    return load_yaml(Path(__file__).with_name("layouts.yaml"))


def layout_of(dataset: str, source: str) -> dict[str, Any]:
    if dataset not in _layouts():
        raise ConfigError(
            f"no dataset {dataset!r} is known",
            where=f"source {source}: dataset",
            todo=f"one of {', '.join(_layouts())}; or leave it out",
        )
    return _layouts()[dataset]


def _package_file(source: PackageSource, name: str) -> Found:
    spec = importlib.util.find_spec(source.package)
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if root is None:
        raise DataError(
            f"the Python package {source.package} is not installed",
            where=f"source {source.name}",
            todo="install it (the demo's photographs come with `pip install 'ccsr-cluster[demo]'`)",
        )
    path = root / name
    if not path.is_file():
        raise DataError(
            f"{source.package} holds no file {name}", where=f"source {source.name}", todo="check its `files`"
        )
    return Found(name, str(path), path.stat().st_size)
