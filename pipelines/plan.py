"""Which samples stand in which shard, and in what order: a pure function of the file list and the config."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from infra.config import canonical_json
from pipelines.config import RandomCrop, ShardConfig
from pipelines.sources import SourceFile


@dataclass(frozen=True)
class PlannedSample:
    """One crop of one file under one draw of the degradation."""

    key: str
    crop_key: str
    file: SourceFile


@dataclass(frozen=True)
class PlannedShard:
    index: int
    samples: tuple[PlannedSample, ...]

    @property
    def name(self) -> str:
        """The tar's path below the shard set."""
        return f"shards/{self.index:06d}.tar"


def plan_shards(files: Sequence[SourceFile], config: ShardConfig) -> list[PlannedShard]:
    """Files in order, each file's crops in order, each crop's draws in order, cut into shards of equal length."""
    num_crops = config.crop.num_per_image if isinstance(config.crop, RandomCrop) else 1
    samples = [
        PlannedSample(f"{file.key}-{crop:03d}-{draw}", f"{file.key}-{crop:03d}", file)
        for file, crop, draw in product(files, range(num_crops), range(config.draws))
    ]
    groups = [samples[i : i + config.samples_per_shard] for i in range(0, len(samples), config.samples_per_shard)]
    return [PlannedShard(index, tuple(group)) for index, group in enumerate(groups)]


def source_id(files: Sequence[SourceFile]) -> str:
    """Identifies the source list by names and sizes, wherever the files lie."""
    listed = [[file.source, file.name, file.num_bytes] for file in files]
    return hashlib.sha256(canonical_json(listed)).hexdigest()[:16]
