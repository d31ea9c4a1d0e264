"""Synthetic photographs and small shard sets for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infra import rng_for
from infra.imaging.images import encode_png
from infra.shards.manifest import Manifest, write_manifest
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import set_facts, write_shard
from pipelines.sharding.plan import plan_shards
from pipelines.sharding.recipe import resolve_degradation
from pipelines.sharding.sources import list_sources


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3): smooth colour with a little noise, another one for every seed."""
    rng = rng_for(seed, "photo")
    y, x = np.mgrid[:height, :width]
    slopes = rng.uniform(0.5, 4, (3, 2))
    base = np.stack([127 + 100 * np.sin((a * x + b * y) / 20) for a, b in slopes], axis=-1)
    return np.clip(base + rng.integers(-8, 9, base.shape), 0, 255).astype(np.uint8)


def save_photos(folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """FOLDER/00.png, 01.png, ... of the given (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(sizes):
        (folder / f"{number:02d}.png").write_bytes(encode_png(photo(height, width, seed=number)))


def shard_config(photos: Path | str, output: Path | str, *, name: str = "set", **changes: Any) -> ShardConfig:
    source = {"kind": "folder", "name": name, "path": str(photos)}
    return ShardConfig.model_validate({"job": "shard", "output": str(output), "sources": [source], **changes})


def make_shard_set(config: ShardConfig) -> Manifest:
    """The shard set of a config, written in this process without Ray."""
    recipe = resolve_degradation(config)
    files = list_sources(config.sources)
    shards = plan_shards(files, config)
    for shard in shards:
        write_shard(config, recipe, shard)
    facts = {"fingerprint": "of a test", **set_facts(config, recipe, files)}
    return write_manifest(config.output, len(shards), **facts)


def make_two_sets(folder: Path) -> list[Manifest]:
    """Two shard sets with stored LR, bicubic x4; the second one's images are larger."""
    manifests = []
    for name, sizes in (("a", [(64, 72), (60, 64), (80, 48)]), ("b", [(96, 100), (90, 104)])):
        save_photos(folder / name, sizes)
        config = shard_config(
            folder / name, folder / "sets" / name, name=name, degradation="bicubic", samples_per_shard=2
        )
        manifests.append(make_shard_set(config))
    return manifests
