"""Near-duplicates among the source files, left out before shards are planned: the first of those alike is kept."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra.display.progress import progress
from infra.errors import printable
from infra.files.publish import put_if_absent
from infra.files.storage import exists, join, list_files, read_bytes, read_json, remove
from infra.imaging.images import UnusableImageError
from infra.process.ray_runtime import on_ray
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.files import FileList, Made, SourceFile
from pipelines.sharding.sample import open_source, read_source
from pipelines.sharding.screening.phash import near_pairs, perceptual_hash

NEAR_DUPLICATES = "near_duplicates.jsonl"
HASHES = "hashes"
HASHED_AT_ONCE = 64


def without_near_duplicates(files: FileList, config: ShardConfig, *, write: bool = True) -> FileList:
    """The files that `dedupe` keeps. OUT/near_duplicates.jsonl, which is written once and then read, has a line for
    each of the others: `key`, `file`, the first one that it is `like`, and the `bits` in which their hashes differ.

    All files are hashed by Ray's workers; what a stopped run has hashed is kept below OUT/hashes until then. A file
    that cannot be decoded is like no other: it is quarantined later. Without `write`, all files where none is left out
    yet.
    """
    place = join(config.output, NEAR_DUPLICATES)
    if config.dedupe is None or not (write or exists(place)):
        return files
    if not exists(place):
        lines = near_duplicates(files, _hashes(files, config), config.dedupe)
        put_if_absent(place, "".join(json.dumps(line) + "\n" for line in lines).encode())
    for part in list_files(join(config.output, HASHES)) if write else []:
        remove(part)
    left_out = {json.loads(line)["key"] for line in read_bytes(place).splitlines()}
    return FileList(file for file in files if file.key not in left_out) if left_out else files


def count_near_duplicates(output: str) -> int:
    """How many files were left out."""
    place = join(output, NEAR_DUPLICATES)
    return len(read_bytes(place).splitlines()) if exists(place) else 0


def near_duplicates(files: Sequence[SourceFile], hashes: np.ndarray, max_bits: int) -> list[dict[str, str | int]]:
    left_out = np.zeros(len(hashes), bool)
    like: list[tuple[int, int, int]] = []
    for i, j, bits in near_pairs(hashes, hashes, max_bits=max_bits, skip=left_out):
        if not left_out[i] and not left_out[j]:
            left_out[j] = True
            like.append((j, i, bits))
    return [
        {"key": files[j].key, "file": printable(files[j].name), "like": printable(files[i].name), "bits": bits}
        for j, i, bits in sorted(like)
    ]


def _hashes(files: Sequence[SourceFile], config: ShardConfig) -> np.ndarray:
    """uint64 (N,), 0 where nothing is known."""
    folder = join(config.output, HASHES)
    parts = {join(folder, f"{start:09d}.json"): start for start in range(0, len(files), HASHED_AT_ONCE)}
    done = set(list_files(folder))
    groups = Made(
        [part for part in parts if part not in done],
        lambda part: (part, files[parts[part] : parts[part] + HASHED_AT_ONCE]),
    )
    num_pending = sum(min(HASHED_AT_ONCE, len(files) - parts[part]) for part in groups.keys)

    def hash_group(one: tuple[str, Sequence[SourceFile]]) -> int:
        part, group = one
        put_if_absent(part, json.dumps([hash_file(file, config) for file in group]).encode())
        return len(group)

    with progress("looking for near-duplicates", len(files), done=len(files) - num_pending) as advance:
        for count in on_ray(
            lambda: hash_group,
            groups,
            config=config.runtime.ray,
            num_actors=None,
            num_tasks=config.runtime.num_actors,
            device="cpu",
            numerics=None,
            output=config.output,
        ):
            advance(count)
    with ThreadPoolExecutor(16) as pool:  # on S3 each answer is waited for
        return np.array([value for values in pool.map(read_json, parts) for value in values], np.uint64)


def hash_file(file: SourceFile, config: ShardConfig) -> int:
    """A file's perceptual hash; 0 where it cannot be used."""
    try:
        opened = open_source(file, read_source(file, with_caption=False), convert=config.converted)
    except UnusableImageError:
        return 0
    return perceptual_hash(opened.image)
