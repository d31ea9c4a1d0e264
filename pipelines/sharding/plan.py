"""Which samples are in which shard, and in what order: a pure function of the file list and the config."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from infra.config import canonical_json
from pipelines.sharding.config import GridCrop, RandomCrop, ShardConfig
from pipelines.sharding.files import FileList, Made, SourceFile

LISTED_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One crop of one file under one draw of the degradation. `variant`: at which of the config's sizes.

    Under a grid the plan does not know how many windows a file has: there it is the whole file, and `grid_samples`
    gives its windows, with their place in `at` (y, x).
    """

    key: str
    crop_key: str
    file: SourceFile
    variant: int = 0
    at: tuple[int, int] | None = None


@dataclass(frozen=True)
class Numbering:
    """Which samples a file has, from 0 to `per_file` - 1."""

    per_file: int
    num_crops: int
    draws: int
    grid: bool

    def sample(self, file: SourceFile, number: int) -> PlannedSample:
        if self.grid:
            return PlannedSample(f"{file.key}-grid", f"{file.key}-grid", file)
        crop, draw = divmod(number, self.draws)
        return PlannedSample(f"{file.key}-{crop:03d}-{draw}", f"{file.key}-{crop:03d}", file, crop // self.num_crops)


@dataclass(frozen=True)
class PlannedShard:
    """A shard's files, and its samples among theirs: `count` from the `start`-th on. The worker lists the samples."""

    index: int
    files: Sequence[SourceFile]
    start: int
    count: int
    numbering: Numbering

    @cached_property
    def samples(self) -> tuple[PlannedSample, ...]:
        places = (divmod(n, self.numbering.per_file) for n in range(self.start, self.start + self.count))
        files = list(self.files)
        return tuple(self.numbering.sample(files[file], number) for file, number in places)

    @property
    def name(self) -> str:
        """The tar's path below the shard set."""
        return f"shards/{self.index:06d}.tar"


def num_variants(config: ShardConfig) -> int:
    """At how many sizes each image is taken."""
    return len(config.scales) + (config.short_side_px is not None)


def plan_shards(files: Sequence[SourceFile], config: ShardConfig) -> Made[int, PlannedShard]:
    """Files in order, each one's sizes and crops in order, each crop's draws in order, cut into shards of equal length.

    Under a grid a shard has `samples_per_shard` whole files. A shard is computed from its number when it is asked for.
    """
    num_crops = config.crop.num_per_image if isinstance(config.crop, RandomCrop) else 1
    grid = isinstance(config.crop, GridCrop)
    per_file = 1 if grid else num_variants(config) * num_crops * config.draws
    numbering = Numbering(per_file, num_crops, config.draws, grid)
    total, size = len(files) * per_file, config.samples_per_shard

    def shard(index: int) -> PlannedShard:
        start, stop = index * size, min((index + 1) * size, total)
        first, end = start // per_file, -(-stop // per_file)
        some = files.part(first, end) if isinstance(files, FileList) else files[first:end]
        return PlannedShard(index, some, start % per_file, stop - start, numbering)

    return Made(range(-(-total // size)), shard)


def grid_samples(
    planned: PlannedSample, crop: GridCrop, sizes: Sequence[tuple[int, int]], draws: int
) -> list[PlannedSample]:
    """A file's windows and their draws, row by row, through the (height, width) of its variants.

    A variant that is too small for a window is there once, with a window that does not fit.
    """
    key = planned.file.key
    places = [
        (variant, (y, x))
        for variant, (height, width) in enumerate(sizes)
        for y, x in product(_starts(height, crop), _starts(width, crop))
    ]
    return [
        PlannedSample(f"{key}-{number:03d}-{draw}", f"{key}-{number:03d}", planned.file, variant, at)
        for number, (variant, at) in enumerate(places)
        for draw in range(draws)
    ]


def _starts(length: int, crop: GridCrop) -> list[int]:
    starts = list(range(0, max(length - crop.size_px, 0) + 1, crop.step_px))
    if length - (starts[-1] + crop.size_px) > crop.rest_px:
        starts.append(length - crop.size_px)
    return starts


def source_id(files: FileList) -> str:
    """Identifies the source list by names and sizes (shard sets: by their ids too), wherever the files are."""
    digest = hashlib.sha256(b"[")
    for start in range(0, len(files), LISTED_AT_ONCE):  # the JSON of ten million takes gigabytes
        stop = min(start + LISTED_AT_ONCE, len(files))
        rows = zip(*files.columns("source", "name", "num_bytes", "identity", start=start, stop=stop), strict=True)
        listed = [row if row[-1] else row[:-1] for row in rows]
        digest.update((b"," if start else b"") + canonical_json(listed)[1:-1])
    digest.update(b"]")
    return digest.hexdigest()[:16]
