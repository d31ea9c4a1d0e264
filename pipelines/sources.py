"""Image sets: from a config's sources to the sorted list of files that they name."""

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import DataError
from infra.images import list_images
from pipelines.config import PackageSource, Source


@dataclass(frozen=True)
class SourceFile:
    """One HR file: `key` names it in shards, `name` is its path within its source, `uri` is where it is now."""

    key: str
    source: str
    name: str
    uri: str
    num_bytes: int


def list_sources(sources: Sequence[Source]) -> list[SourceFile]:
    """All files of all sources, in the config's order and sorted within each. DataError for one without images."""
    found = [(source.name, name, uri, size) for source in sources for name, uri, size in _list_source(source)]
    plain = [_plain_key(source, name) for source, name, _, _ in found]
    clashes = {key for key, count in Counter(plain).items() if count > 1}
    files = [
        SourceFile(key if key not in clashes else f"{key}-{_digest(source, name)}", source, name, uri, size)
        for key, (source, name, uri, size) in zip(plain, found, strict=True)
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


def _list_source(source: Source) -> list[tuple[str, str, int]]:
    if isinstance(source, PackageSource):
        return [_package_file(source, name) for name in source.files]
    root = source.path.rstrip("/")
    return [(uri.removeprefix(root).lstrip("/"), uri, size) for uri, size in list_images(root).items()]


def _package_file(source: PackageSource, name: str) -> tuple[str, str, int]:
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
    return name, str(path), path.stat().st_size


def _plain_key(source: str, name: str) -> str:
    stem = name.rsplit(".", 1)[0]
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", f"{source}-{stem.rsplit('/', 1)[-1]}")
    return plain if len(plain) <= 48 else f"{plain[:39]}-{_digest(source, name)}"


def _digest(source: str, name: str) -> str:
    return hashlib.sha256(f"{source}/{name}".encode()).hexdigest()[:8]
