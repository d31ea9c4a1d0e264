"""Image sets: from a config's sources to the sorted list of files that they name."""

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from infra.config import load_yaml
from infra.errors import ConfigError, DataError
from infra.images import below, choose_images, list_images
from infra.keys import bounded, tell_apart, with_digest
from infra.locations import check_output
from infra.manifest import Manifest
from infra.pairing import by_pair_name
from infra.shards import Entry
from infra.storage import join
from infra.tars import NUM_LISTED, sizes_of
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
from pipelines.sharding.containers import list_parquet, list_tars
from pipelines.sharding.lists import read_list, resolved
from pipelines.sharding.zips import list_members, split_zip

WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
MAX_KEY_BYTES = 48
CONTACT_SHEET = "contact_sheet.jpg"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One HR file: `key` names it in shards, `name` is its path within its source, `uri` is where it is now.

    `lr_uri` and `scale`: of a pair. `entry`: of a sample of the shard set at `uri`. `identity`: what else it is (the
    LR file, the shard set).
    """

    key: str
    source: str
    name: str
    uri: str
    num_bytes: int
    lr_uri: str = ""
    scale: int = 1
    entry: Entry | None = None
    identity: str = ""


class Found(NamedTuple):
    name: str
    uri: str
    num_bytes: int
    lr_uri: str = ""
    entry: Entry | None = None
    identity: str = ""


def list_sources(sources: Sequence[Source]) -> list[SourceFile]:
    """All files of all sources, in the config's order and sorted within each.

    DataError for a source without images, another number of files than expected, an image without its partner.
    """
    names = Counter(source.name for source in sources)
    if len(names) < len(sources):
        raise DataError(
            f"two sources have the same name {names.most_common(1)[0][0]}",
            where="sources",
            todo="give the sources different names",
        )
    found = [(source, one) for source in sources for one in _list_source(source)]
    paths = [(source.name, one.name) for source, one in found]
    keys = tell_apart(paths, _key, lambda name: with_digest(_key(name), "/".join(name)))
    files = [
        SourceFile(
            key,
            source.name,
            one.name,
            one.uri,
            one.num_bytes,
            one.lr_uri,
            source.scale if isinstance(source, PairsSource | ListSource) and one.lr_uri else 1,
            one.entry,
            one.identity,
        )
        for key, (source, one) in zip(keys, found, strict=True)
    ]
    by_key = {file.key: file for file in files}
    for file in files:
        if (other := by_key[file.key]) is not file:
            raise DataError(
                f"two files would have the same key {file.key}",
                where=f"{file.uri} and {other.uri}",
                todo="give the sources different names, and name no file twice",
            )
    return files


def check_apart(output: str, sources: Sequence[Source]) -> None:
    """ConfigError where a source would list what sharding into `output` writes, of which one file is an image."""
    for source in sources:
        for path in (getattr(source, field, None) for field in ("path", "hr", "lr")):
            if path is None or split_zip(path):
                continue
            root, pattern = _split_pattern(path)
            if pattern is None or pattern.fullmatch(below(join(output, CONTACT_SHEET), root)):
                check_output(output, [root])


def source_facts(sources: Sequence[Source], files: Sequence[SourceFile]) -> list[dict[str, Any]]:
    """What the manifest says of each source: name, kind, dataset, num_files, expected_files, licence."""
    counts = Counter(file.source for file in files)
    facts = []
    for source in sources:
        dataset = getattr(source, "dataset", None)
        layout = _layout(dataset, source.name) if dataset else {}
        facts.append(
            {
                "name": source.name,
                "kind": source.kind,
                "dataset": dataset,
                "num_files": counts[source.name],
                "expected_files": _expected_used(source),
                "licence": source.licence or layout.get("licence"),
            }
        )
    return facts


def _expected_used(source: Source) -> int | None:
    expected = _expected(source)
    first = getattr(source, "first", None)
    return min(expected, first) if expected and first else expected


def _expected(source: Source) -> int | None:
    expected = getattr(source, "expected_files", None)
    dataset = getattr(source, "dataset", None)
    return expected or (_layout(dataset, source.name)["expected_files"] if dataset else None)


def _list_source(source: Source) -> list[Found]:
    if isinstance(source, PackageSource):
        return [_package_file(source, name) for name in source.files]
    if isinstance(source, ShardsSource):
        manifest = Manifest.load(source.path.rstrip("/"))
        identity = manifest.dataset_id
        return [Found(e.key, manifest.uri, e.length_bytes, "", e, identity) for e in manifest.entries]
    if isinstance(source, ListSource):
        return _list_rows(source)
    if isinstance(source, WebDatasetSource):
        return [Found(*member) for member in list_tars(source.path, source.member)]
    if isinstance(source, ParquetSource):
        return [Found(*member) for member in list_parquet(source.path, source.column)]
    if isinstance(source, PairsSource):
        found, where = _list_pairs(source), f"{source.hr} and {source.lr}"
    else:
        found, where = _list_folder(source), source.path
    expected = _expected(source)
    if expected and len(found) != expected:
        raise DataError(
            f"source {source.name} has {len(found)} files, {expected} are expected",
            where=where,
            todo=f"complete it; if it is meant to be so, write `expected_files: {len(found)}`",
        )
    return found[: getattr(source, "first", None)]


def _list_folder(source: FolderSource) -> list[Found]:
    found = _list_place(source.path)
    if source.dataset:
        pattern = re.compile(_layout(source.dataset, source.name)["files"])
        found = [one for one in found if pattern.fullmatch(one.name)]
    return found


def _list_rows(source: ListSource) -> list[Found]:
    rows = read_list(source.path, (source.image, *([source.lr] if source.lr else [])))
    files = [[resolved(name, source.path) for name in row] for row in rows]
    sizes = iter(sizes_of([file for row in files for file in row], source.path))
    found = []
    for (name, *_), (uri, *lr) in zip(rows, files, strict=True):
        size, lr_sizes = next(sizes), [next(sizes) for _ in lr]
        found.append(Found(name, uri, size, "".join(lr), None, " ".join(map(str, lr_sizes))))
    return found


def _list_pairs(source: PairsSource) -> list[Found]:
    sides = []
    for place in (source.hr, source.lr):
        files: dict[str, Found] = {}
        for one in _list_place(place):
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


def _list_place(path: str) -> list[Found]:
    """The image files of a folder, s3:// prefix, zip or pattern, by their names below it."""
    zipped = split_zip(path)
    root, pattern = _split_pattern(zipped[1].strip("/") if zipped else path.rstrip("/"))
    if zipped:
        archive, folder = zipped[0], "" if root in ("", ".") else f"{root}/"
        sizes = list_members(archive)
        names = (name.removeprefix(folder) for name in sizes if name.startswith(folder))
        images = {f"{archive}!{folder}{name}": (name, sizes[f"{folder}{name}"]) for name in choose_images(names, path)}
    else:
        images = {uri: (below(uri, root), size) for uri, size in list_images(root).items()}
    found = [Found(name, uri, size) for uri, (name, size) in images.items() if not pattern or pattern.fullmatch(name)]
    if not found:
        raise DataError("no images here", where=path, todo="check the path, and the pattern if it has one")
    return found


def _split_pattern(path: str) -> tuple[str, re.Pattern[str] | None]:
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


def _layout(dataset: str, source: str) -> dict[str, Any]:
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


def _key(names: tuple[str, str]) -> str:
    """ASCII without dots, which end a key in a WebDataset tar."""
    source, name = names
    stem = name.rsplit(".", 1)[0].rsplit("/", 1)[-1]
    return bounded(re.sub(r"[^A-Za-z0-9_-]", "-", f"{source}-{stem}"), f"{source}/{name}", MAX_KEY_BYTES)
