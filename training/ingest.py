"""From positions to batches: fetch each sample by byte range, decode, crop, degrade, in order and ahead of the loop."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from degradation import DegradationConfig, degrade, load_preset
from infra.errors import DataError
from infra.images import decode_image
from infra.manifest import Manifest
from infra.seeding import rng_for
from infra.shards import read_sample
from training.config import TrainConfig
from training.order import positions_of, sample_at

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainingSample:
    """`hr` uint8 (S, S, 3) and `lr` uint8 (S / scale, S / scale, 3), RGB; the LR of a clean pair is the HR."""

    key: str
    position: int
    hr: np.ndarray
    lr: np.ndarray


class SampleReader:
    """Samples by position from one or several shard sets, in the seeded order over all of them."""

    def __init__(self, manifests: Sequence[Manifest], config: TrainConfig) -> None:
        self._entries = [(manifest.uri, entry) for manifest in manifests for entry in manifest.entries]
        self._config = config
        self._recipe = _recipe(config, manifests)

    def __call__(self, position: int) -> TrainingSample:
        """The sample at a position. Its crop, flip and degradation depend on (seed, position) alone."""
        config = self._config
        _, index = sample_at(position, len(self._entries), config.seed)
        uri, entry = self._entries[index]
        members = read_sample(uri, entry)
        where = f"{uri}/{entry.shard}: {entry.key}"
        hr = decode_image(members["hr.png"], where=where)
        rng = rng_for(config.seed, "sample", position)
        lr = decode_image(members["lr.png"], where=where) if self._recipe is None else hr
        hr, lr = _crop_pair(hr, lr, config.crop_px, rng, where)
        if rng.random() < 0.5:  # before the degradation, whose drift and block grid have a direction
            hr, lr = hr[:, ::-1], lr[:, ::-1]
        hr, lr = np.ascontiguousarray(hr), np.ascontiguousarray(lr)
        if self._recipe is None:
            clean = json.loads(members["json"])["degradation"]["clean"]
        else:
            pair = degrade(hr, self._recipe, rng)
            hr, lr, clean = pair.hr, pair.lr, pair.trace["clean"]
        return TrainingSample(entry.key, position, hr, hr if clean else lr)


def _recipe(config: TrainConfig, manifests: Sequence[Manifest]) -> DegradationConfig | None:
    if config.degradation is None:
        for manifest in manifests:
            if not manifest.facts["has_lr"]:
                raise DataError(
                    "these shards hold no LR images", where=manifest.uri, todo="name a `degradation` to train with"
                )
        return None
    return load_preset(config.degradation) if isinstance(config.degradation, str) else config.degradation


def _crop_pair(
    hr: np.ndarray, lr: np.ndarray, size: int, rng: np.random.Generator, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """A random window of `size` HR px on the LR grid, and its LR window."""
    scale = hr.shape[0] // lr.shape[0]
    height, width = lr.shape[:2]
    if (height * scale, width * scale) != hr.shape[:2] or size % scale or min(hr.shape[:2]) < size:
        raise DataError(
            f"HR {hr.shape[1]}x{hr.shape[0]} and LR {width}x{height} do not allow a window of {size} px",
            where=where,
            todo="lower crop_px (a multiple of the scale), or shard with larger crops",
        )
    small = size // scale
    y, x = int(rng.integers(height - small + 1)), int(rng.integers(width - small + 1))
    return hr[y * scale :, x * scale :][:size, :size], lr[y:, x:][:small, :small]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `hr` and `lr` float32 (B, 3, S, S) RGB in [0, 1], the LR enlarged to the size of the HR."""

    keys: list[str]
    positions: list[int]
    hr: "Tensor"
    lr: "Tensor"


def collate(samples: Sequence[TrainingSample]) -> Batch:
    """Stack samples; the LR is enlarged bicubically without antialiasing and rounded to 8 bit, as CCSR trains."""
    import torch
    from torch.nn.functional import interpolate

    hr = torch.from_numpy(np.stack([sample.hr for sample in samples])).permute(0, 3, 1, 2).float() / 255
    enlarged = []
    for sample in samples:
        lr = torch.from_numpy(sample.lr).permute(2, 0, 1)[None].float()
        enlarged.append(interpolate(lr, size=hr.shape[-2:], mode="bicubic").round().clamp(0, 255) / 255)
    return Batch([s.key for s in samples], [s.position for s in samples], hr, torch.cat(enlarged))


def updates(
    reader: SampleReader, config: TrainConfig, *, start: int, rank: int, world_size: int
) -> Iterator[list[Batch]]:
    """The micro-batches of `rank` for every update from `start` on, prepared ahead by threads, always in order."""

    def load(update: int) -> list[Batch]:
        micro_steps = positions_of(
            update,
            rank,
            world_size,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.runtime.micro_batch_size,
        )
        return [collate([reader(position) for position in positions]) for positions in micro_steps]

    with ThreadPoolExecutor(config.runtime.prefetch_batches, thread_name_prefix="ingest") as pool:
        ahead: deque[Future[list[Batch]]] = deque()
        try:
            for update in range(start, config.num_updates):
                while len(ahead) <= config.runtime.prefetch_batches and update + len(ahead) < config.num_updates:
                    ahead.append(pool.submit(load, update + len(ahead)))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
