"""Shards: deterministic WebDataset tars, and samples read back by one range read each."""

import io
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import DataError
from infra.files.storage import read_range, resolve
from infra.imaging.images import IMAGE_SUFFIXES

IMAGES = ("hr.png", "hr.jpg")  # a sample's HR image; an LR image is `lr.` and the same
CAPTION = "txt"  # the member with a sample's caption, in UTF-8
SCORES = ("gradient_energy", "blockiness", "sharpness")  # of an HR image; pipelines/sharding/screening/filters.py
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True, slots=True)  # a training process holds one per sample, millions of them
class Entry:
    """Where one sample is stored: `shard` (path below the shard set, or an absolute one elsewhere) and the byte span of
    its members in the tar."""

    key: str
    shard: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class IndexedEntry(Entry):
    """An entry as records and the index keep it, with two hashes as uint64: `phash` of the HR image and `source_hash`,
    the first 8 bytes of its source file's SHA-256; and `SCORES`. None in sets of an earlier version."""

    phash: int | None = None
    source_hash: int | None = None
    gradient_energy: float | None = None
    blockiness: float | None = None
    sharpness: float | None = None

    @classmethod
    def of(cls, entry: Entry, phash: int, source_sha256: str, scores: Sequence[float] = ()) -> "IndexedEntry":
        span = entry.offset_bytes, entry.length_bytes
        return cls(entry.key, entry.shard, *span, phash, int(source_sha256[:16], 16), *scores)


def write_tar(path: Path, shard: str, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> list[Entry]:
    """Write samples (key, {extension: bytes}) as KEY.EXTENSION members; returns their index.

    The bytes depend on the samples alone: ustar headers with fixed owner, mode and time, members in the given order.
    """
    entries = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            if not KEY_PATTERN.fullmatch(key):
                raise DataError(
                    f"sample key {key!r} has other characters than letters, digits, - and _ (or over 80)",
                    where=shard,
                    todo="rename the source file",
                )
            start = tar.offset
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
            entries.append(Entry(key, shard, start, tar.offset - start))
    return entries


def read_index(path: Path, shard: str) -> list[Entry]:
    """The entries of a local tar as `write_tar` made them, found by walking its headers. DataError where damaged."""
    entries: list[Entry] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key = split_member(member.name)[0]
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                start = entries.pop().offset_bytes if entries and entries[-1].key == key else member.offset
                entries.append(Entry(key, shard, start, end - start))
    except tarfile.TarError as error:
        raise DataError(f"the tar cannot be read ({error})", where=str(path), todo="`ccsr verify` the set") from error
    return entries


def read_sample(base: str, entry: Entry) -> dict[str, bytes]:
    """The members {extension: bytes} of one sample of the shard set at `base`, by one range read."""
    place = resolve(base, entry.shard)
    span = read_range(place, entry.offset_bytes, entry.length_bytes)
    try:
        with tarfile.open(fileobj=io.BytesIO(span), mode="r:") as tar:
            found = [member for member in tar if is_member(member)]
            names = [split_member(member.name) for member in found]
            members = {name[1]: tar.extractfile(one).read() for name, one in zip(names, found, strict=True)}  # type: ignore[union-attr]
    except (tarfile.TarError, KeyError, AttributeError) as error:
        raise DataError(
            f"sample {entry.key} cannot be read from its shard ({error})", where=place, todo="`ccsr verify` the set"
        ) from error
    if {name[0] for name in names} != {entry.key}:
        raise DataError(
            f"the index promises sample {entry.key}, the shard holds {sorted({name[0] for name in names})} there",
            where=place,
            todo="`ccsr verify` the set",
        )
    return members


def is_member(header: tarfile.TarInfo) -> bool:
    """Whether it is a file of a sample: no folder, none that an operating system left (`._NAME`)."""
    return header.isfile() and not header.name.rpartition("/")[2].startswith(".")


def split_member(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: the base name is cut at its first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension


def image_of(members: Mapping[str, bytes], side: str = "hr") -> bytes:
    """A sample's HR or LR image file, a PNG or JPEG; in tars that others made its only image is the HR one. Empty
    where there is none."""
    named = [members[name] for name in (image.replace("hr", side) for image in IMAGES) if name in members]
    if not named and side == "hr":
        named = [data for name, data in members.items() if Path(f"x.{name}").suffix.lower() in IMAGE_SUFFIXES]
    return named[0] if named else b""
