"""Ingest: the batches are a function of the positions, whoever fetches them and however far ahead."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import make_shard_set, save_photos, shard_config

from degradation import degrade, load_preset
from infra import DataError, StorageError, rng_for
from infra.images import decode_image
from infra.manifest import Manifest
from infra.shards import read_sample
from training.config import TrainConfig
from training.ingest import Batch, SampleReader, TrainingSample, collate, updates
from training.order import sample_at


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Two shard sets with stored LR, bicubic x4; the second one's images are larger."""
    folder = tmp_path_factory.mktemp("stored")
    manifests = []
    for name, sizes in (("a", [(64, 72), (60, 64), (80, 48)]), ("b", [(96, 100), (90, 104)])):
        save_photos(folder / name, sizes)
        config = shard_config(
            folder / name, folder / "sets" / name, name=name, degradation="bicubic", samples_per_shard=2
        )
        manifests.append(make_shard_set(config))
    return manifests


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """A shard set without LR."""
    folder = tmp_path_factory.mktemp("bare")
    save_photos(folder / "photos", [(64, 72), (60, 64), (80, 48)])
    return [make_shard_set(shard_config(folder / "photos", folder / "set", degradation=None))]


def config(**changes: Any) -> TrainConfig:
    runtime = {"micro_batch_size": 2, **changes.pop("runtime", {})}
    values = {"job": "train", "output": "o", "stage": 1, "data": ["d"], "num_updates": 4, "global_batch_size": 4}
    return TrainConfig.model_validate({**values, "crop_px": 32, "runtime": runtime, **changes})


def stream(manifests: list[Manifest], settings: TrainConfig, world_size: int = 1, start: int = 0) -> list[list[Batch]]:
    """For each update the micro-batches of all ranks in the order of (micro-step, rank)."""
    reader = SampleReader(manifests, settings)
    ranks = [updates(reader, settings, start=start, rank=rank, world_size=world_size) for rank in range(world_size)]
    return [[batch for step in zip(*shares, strict=True) for batch in step] for shares in zip(*ranks, strict=True)]


def assert_equal(one: list[list[Batch]], other: list[list[Batch]]) -> None:
    assert len(one) == len(other)
    for batches, others in zip(one, other, strict=True):
        for a, b in zip(batches, others, strict=True):
            assert (a.keys, a.positions) == (b.keys, b.positions)
            assert torch.equal(a.hr, b.hr)
            assert torch.equal(a.lr, b.lr)


@pytest.mark.parametrize("degradation", [None, "ccsr"])
def test_batches_are_equal_for_every_prefetch_world_size_and_start(
    stored: list[Manifest], degradation: str | None
) -> None:
    reference = stream(stored, config(degradation=degradation))
    assert [batch.positions for batch in reference[1]] == [[4, 5], [6, 7]]
    keys = [key for batches in reference for batch in batches for key in batch.keys]
    assert [sorted(keys[epoch * 5 : epoch * 5 + 5]) for epoch in range(3)] == [sorted(set(keys))] * 3
    for prefetch in (1, 5):
        settings = config(degradation=degradation, runtime={"prefetch_batches": prefetch})
        assert_equal(stream(stored, settings), reference)
    assert_equal(stream(stored, config(degradation=degradation), world_size=2), reference)
    assert_equal(stream(stored, config(degradation=degradation), start=2), reference[2:])


def test_micro_batches_of_another_size_hold_the_same_samples(stored: list[Manifest]) -> None:
    two, four = (stream(stored, config(runtime={"micro_batch_size": size})) for size in (2, 4))
    for parts, (whole,) in zip(two, four, strict=True):
        assert torch.equal(torch.cat([part.hr for part in parts]), whole.hr)
        assert torch.equal(torch.cat([part.lr for part in parts]), whole.lr)


def test_another_seed_gives_other_crops(stored: list[Manifest]) -> None:
    one, other = (SampleReader(stored[:1], config(seed=seed)) for seed in (0, 1))
    by_key = {one(p).key: one(p) for p in range(3)}
    assert any(not np.array_equal(by_key[other(p).key].hr, other(p).hr) for p in range(3))
    assert any(not np.array_equal(one(p).hr, by_key[one(p + 3).key].hr) for p in range(3)), "each epoch crops anew"


def test_hr_and_lr_show_the_same_place(stored: list[Manifest]) -> None:
    """The LR's window is the stored LR's, at a quarter of the HR window's place, flipped or not as the HR is."""
    reader = SampleReader(stored, config())
    entries = [(manifest.uri, entry) for manifest in stored for entry in manifest.entries]
    flips = set()
    for position in range(25):
        sample = reader(position)
        uri, entry = entries[sample_at(position, 5, 0)[1]]
        assert sample.key == entry.key
        hr, lr = (decode_image(read_sample(uri, entry)[name], where="") for name in ("hr.png", "lr.png"))
        found = [
            (y, x, flip)
            for y in range(0, hr.shape[0] - 31, 4)
            for x in range(0, hr.shape[1] - 31, 4)
            for flip in (1, -1)
            if (hr[y : y + 32, x : x + 32][:, ::flip] == sample.hr).all()
        ]
        ((y, x, flip),) = found
        assert (lr[y // 4 : y // 4 + 8, x // 4 : x // 4 + 8][:, ::flip] == sample.lr).all()
        flips.add(flip)
    assert flips == {1, -1}


def test_degradation_on_the_fly_needs_no_lr(bare: list[Manifest]) -> None:
    sample = SampleReader(bare, config(degradation="ccsr"))(0)
    assert sample.hr.shape == (32, 32, 3)
    assert sample.lr.shape == (8, 8, 3)


def test_a_clean_pairs_lr_is_its_hr(bare: list[Manifest]) -> None:
    recipe = load_preset("stablesr").model_copy(update={"clean": 1.0})
    sample = SampleReader(bare, config(degradation=recipe))(0)
    assert (sample.lr == sample.hr).all()
    batch = collate([sample])
    assert torch.equal(batch.lr, batch.hr)


def test_a_stored_clean_pairs_lr_is_its_hr(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 72)])
    recipe = load_preset("stablesr").model_copy(update={"clean": 1.0})
    manifest = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation=recipe.model_dump()))
    sample = SampleReader([manifest], config())(0)
    assert (sample.lr == sample.hr).all()


def test_clean_and_degraded_samples_share_a_batch(bare: list[Manifest]) -> None:
    recipe = load_preset("stablesr").model_copy(update={"clean": 0.5})
    samples = [SampleReader(bare, config(degradation=recipe))(position) for position in range(12)]
    assert {sample.lr.shape[0] for sample in samples} == {8, 32}
    assert collate(samples).lr.shape == (12, 3, 32, 32)


def test_a_batch_is_float_rgb_and_its_lr_is_enlarged_to_whole_levels() -> None:
    rng = np.random.default_rng(0)
    hr, lr = (rng.integers(0, 256, (side, side, 3)).astype(np.uint8) for side in (32, 8))
    batch = collate([TrainingSample("k", 0, hr, lr)])
    assert batch.hr.shape == batch.lr.shape == (1, 3, 32, 32)
    assert batch.hr.dtype == batch.lr.dtype == torch.float32
    assert torch.equal((batch.hr[0] * 255).round().byte(), torch.from_numpy(hr).permute(2, 0, 1))
    levels = batch.lr * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert batch.lr.min() >= 0
    assert batch.lr.max() <= 1
    flat = collate([TrainingSample("k", 0, hr, np.full_like(lr, 77))])
    assert torch.equal(flat.lr, torch.full_like(flat.lr, 77) / 255)


def test_data_that_cannot_be_used_is_told(stored: list[Manifest], bare: list[Manifest]) -> None:
    with pytest.raises(DataError, match="hold no LR"):
        SampleReader(bare, config())
    with pytest.raises(DataError, match="window of 64 px") as caught:
        list(updates(SampleReader(stored, config(crop_px=64)), config(crop_px=64), start=0, rank=0, world_size=1))
    assert "000-0" in caught.value.where
    with pytest.raises(DataError, match="window of 34 px"):
        SampleReader(stored, config(crop_px=34))(0)


def test_a_lost_shard_stops_the_stream_with_its_place(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)] * 4)
    manifest = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    settings = config(num_updates=50)
    batches = updates(SampleReader([manifest], settings), settings, start=0, rank=0, world_size=1)
    next(batches)
    shard = tmp_path / "set" / "shards" / "000000.tar"
    shard.unlink()
    with pytest.raises(StorageError, match="no such file") as caught:
        for _ in batches:
            pass
    assert caught.value.where == str(shard)


def test_a_stream_that_is_left_stops_its_threads(stored: list[Manifest]) -> None:
    settings = config(num_updates=1000)
    batches = updates(SampleReader(stored, settings), settings, start=0, rank=0, world_size=1)
    next(batches)
    assert any(thread.name.startswith("ingest") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("ingest") for thread in threading.enumerate())


def test_the_lr_is_the_recipes_of_the_crop_that_is_returned(bare: list[Manifest]) -> None:
    reader = SampleReader(bare, config(degradation="bicubic"))
    for position in range(6):
        sample = reader(position)
        again = degrade(sample.hr, load_preset("bicubic"), rng_for(0, "any"))
        assert np.abs(again.lr.astype(int) - sample.lr).max() <= 1  # flipped before or after: rounding may differ
