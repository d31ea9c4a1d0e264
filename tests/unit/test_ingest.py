"""Ingest: the batches are a function of the positions, whoever fetches them and however far ahead."""

import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import make_shard_set, make_two_sets, save_photos, shard_config
from pydantic import ValidationError
from safetensors.numpy import save

import training.run.driver
from degradation import degrade, load_preset
from infra import ConfigError, DataError, StorageError, rng_for
from infra.config import result_part
from infra.files import storage
from infra.files.publish import write_bytes
from infra.files.storage import sha256_file
from infra.imaging.images import decode_image
from infra.shards.manifest import Manifest, ShardRecord, commit_record, write_manifest
from infra.shards.shard import IndexedEntry, read_sample, write_tar
from tests.training_runs import collate
from training.config import ModelConfig, TrainConfig, TrainingSet
from training.data.batches import Batch, check_cpus, updates, window
from training.data.order import Order
from training.data.samples import LATENT_MOMENTS, Place, SampleMaker, SampleReader, TrainingSample, check_stored
from training.models import CcsrModel, build_model
from training.run.step.stages import build_stage


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return make_two_sets(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """A shard set without LR."""
    folder = tmp_path_factory.mktemp("bare")
    save_photos(folder / "photos", [(64, 72), (60, 64), (80, 48)])
    return [make_shard_set(shard_config(folder / "photos", folder / "set", degradation=None))]


def config(**changes: Any) -> TrainConfig:
    runtime = {"micro_batch_size": 2, **changes.pop("runtime", {})}
    values = {
        "job": "train",
        "init_from": "random",
        "output": "o",
        "stage": 1,
        "data": ["d"],
        "num_updates": 4,
        "global_batch_size": 4,
    }
    return TrainConfig.model_validate({**values, "crop_px": 32, "runtime": runtime, **changes})


def reader_of(
    manifests: list[Manifest], settings: TrainConfig, weights: tuple[float, ...] = (1.0, 1.0)
) -> SampleReader:
    data = tuple(
        TrainingSet(path=manifest.uri, weight=weight) for manifest, weight in zip(manifests, weights, strict=False)
    )
    return SampleReader(manifests, settings.model_copy(update={"data": data}))


def stream(manifests: list[Manifest], settings: TrainConfig, world_size: int = 1, start: int = 0) -> list[list[Batch]]:
    """For each update the micro-batches of all ranks in the order of (micro-step, rank)."""
    reader = reader_of(manifests, settings)
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
    one, other = (reader_of(stored[:1], config(seed=seed)) for seed in (0, 1))
    by_key = {one(p).key: one(p) for p in range(3)}
    assert any(not np.array_equal(by_key[other(p).key].hr, other(p).hr) for p in range(3))
    assert any(not np.array_equal(one(p).hr, by_key[one(p + 3).key].hr) for p in range(3)), "each epoch crops anew"


def test_hr_and_lr_show_the_same_place(stored: list[Manifest]) -> None:
    """The LR's window is the stored LR's, at a quarter of the HR window's place, flipped or not as the HR is."""
    reader = reader_of(stored, config())
    entries = [(manifest.uri, entry) for manifest in stored for entry in manifest.entries]
    flips = set()
    for position in range(25):
        sample = reader(position)
        uri, entry = entries[Order(0, (5,), (1.0,)).sample_at(position)[1]]
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


def test_stored_pairs_and_synthetic_ones_mix(stored: list[Manifest], bare: list[Manifest]) -> None:
    data = [stored[0].uri, {"path": bare[0].uri, "degradation": "bicubic"}]
    settings, alone = config(data=data), config(degradation="bicubic")
    reader = SampleReader([stored[0], bare[0]], settings)
    kept = {entry.key for entry in stored[0].entries}
    for position in range(12):
        sample, place = reader(position), reader.place(position)
        recipe = None if sample.key in kept else "bicubic"
        one = SampleReader([stored[0] if recipe is None else bare[0]], alone if recipe else config())
        assert_samples_equal(sample, one.maker(place._replace(number=0)))
    assert {reader(position).key in kept for position in range(12)} == {True, False}
    without, plain = (
        result_part(config(data=each)) for each in (["d", "e"], ["d", {"path": "e", "degradation": None}])
    )
    assert without == plain == {**without, "data": [{"weight": 1.0}] * 2}, "as before there was such a field"
    assert result_part(settings)["data"][1] == {"weight": 1.0, "degradation": "bicubic"}
    with pytest.raises(DataError, match="hold no LR images") as caught:
        SampleReader([stored[0], bare[0]], config(data=["d", "e"]))
    assert caught.value.where == bare[0].uri


def assert_samples_equal(one: TrainingSample, other: TrainingSample) -> None:
    assert one.key == other.key
    assert np.array_equal(one.hr, other.hr)
    assert np.array_equal(one.lr, other.lr)


def test_degradation_on_the_fly_needs_no_lr(bare: list[Manifest]) -> None:
    sample = reader_of(bare, config(degradation="ccsr"))(0)
    assert sample.hr.shape == (32, 32, 3)
    assert sample.lr.shape == (8, 8, 3)


def test_a_clean_pairs_lr_is_its_hr(bare: list[Manifest]) -> None:
    recipe = load_preset("stablesr").model_copy(update={"clean": 1.0})
    sample = reader_of(bare, config(degradation=recipe))(0)
    assert (sample.lr == sample.hr).all()
    batch = collate([sample])
    assert torch.equal(batch.lr, batch.hr)


def test_a_stored_clean_pairs_lr_is_its_hr(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 72)])
    recipe = load_preset("stablesr").model_copy(update={"clean": 1.0})
    manifest = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation=recipe.model_dump()))
    sample = reader_of([manifest], config())(0)
    assert (sample.lr == sample.hr).all()


def test_clean_and_degraded_samples_share_a_batch(bare: list[Manifest]) -> None:
    recipe = load_preset("stablesr").model_copy(update={"clean": 0.5})
    samples = [reader_of(bare, config(degradation=recipe))(position) for position in range(12)]
    assert {sample.lr.shape[0] for sample in samples} == {8, 32}
    assert collate(samples).lr.shape == (12, 3, 32, 32)


def test_a_batch_is_float_rgb_and_its_lr_is_enlarged_to_whole_levels() -> None:
    rng = np.random.default_rng(0)
    hr, lr = (rng.integers(0, 256, (side, side, 3)).astype(np.uint8) for side in (32, 8))
    batch = collate([TrainingSample("k", 0, hr, lr)])
    assert batch.hr.dtype == batch.lr.dtype == torch.uint8
    batch = batch.to("cpu")
    assert batch.hr.shape == batch.lr.shape == (1, 3, 32, 32)
    assert batch.hr.dtype == batch.lr.dtype == torch.float32
    assert torch.equal((batch.hr[0] * 255).round().byte(), torch.from_numpy(hr).permute(2, 0, 1))
    levels = batch.lr * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert batch.lr.min() >= 0
    assert batch.lr.max() <= 1
    flat = collate([TrainingSample("k", 0, hr, np.full_like(lr, 77))]).to("cpu")
    assert torch.equal(flat.lr, torch.full_like(flat.lr, 77) / 255)


def test_data_that_cannot_be_used_is_told(stored: list[Manifest], bare: list[Manifest]) -> None:
    with pytest.raises(DataError, match="hold no LR"):
        reader_of(bare, config())
    with pytest.raises(DataError, match="window of 64 px") as caught:
        list(updates(reader_of(stored, config(crop_px=64)), config(crop_px=64), start=0, rank=0, world_size=1))
    assert "000-0" in caught.value.where
    with pytest.raises(DataError, match="window of 34 px"):
        reader_of(stored, config(crop_px=34))(0)


def test_weights_share_out_the_stream(stored: list[Manifest]) -> None:
    reader = reader_of(stored, config(), weights=(2.0, 0.5))
    keys = [[reader.place(epoch * 7 + offset).entry.key for offset in range(7)] for epoch in range(2)]
    first, second = ({entry.key for entry in manifest.entries} for manifest in stored)
    for epoch in keys:
        assert sorted(key for key in epoch if key in first) == sorted([*first, *first])
    assert {key for epoch in keys for key in epoch if key in second} == second
    assert reader.place(0).uri in {manifest.uri for manifest in stored}


def test_weights_are_part_of_the_result_and_places_are_not() -> None:
    parts = [
        result_part(config(data=data)) for data in (["a"], [{"path": "b"}], [{"path": "a", "weight": 0.5}], ["a", "a"])
    ]
    assert parts[0] == parts[1]
    assert parts[0]["data"] == [{"weight": 1.0}]
    assert parts[2]["data"] == [{"weight": 0.5}]
    assert parts[3] != parts[0]


@dataclass(frozen=True)
class CountedMaker(SampleMaker):
    made: list[int] = field(default_factory=list)

    def __call__(self, place: Place) -> TrainingSample:
        self.made.append(place.position)
        return super().__call__(place)


def test_a_slow_loop_stops_the_ingest_at_its_window(stored: list[Manifest]) -> None:
    settings = config(num_updates=100, global_batch_size=8, runtime={"prefetch_batches": 2})
    reader = reader_of(stored, settings)
    maker = CountedMaker(0, 32, (None, None))
    reader.maker = maker
    batches = updates(reader, settings, start=0, rank=0, world_size=1)
    assert window(settings, 1) == 8
    for taken in (1, 2):
        next(batches)
        deadline = time.monotonic() + 60
        while len(maker.made) < taken * 8 + 16 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert sorted(maker.made) == list(range(taken * 8 + 16)), "the window is full and nothing is beyond it"
    batches.close()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, CcsrModel]:
    """A shard set with the moments that a tiny model's encoder gives, and that model."""
    folder = tmp_path_factory.mktemp("latents")
    save_photos(folder / "photos", [(64, 64)] * 3)
    manifest = make_shard_set(shard_config(folder / "photos", folder / "pixels", degradation="bicubic"))
    model = build_model(ModelConfig(preset="tiny", family="v2"), seed=1)
    samples = []
    for entry in manifest.entries:
        members = read_sample(manifest.uri, entry)
        hr, lr = (decode_image(members[name], where="") for name in ("hr.png", "lr.png"))
        batch = collate([TrainingSample(entry.key, 0, hr, lr)]).to("cpu")
        with torch.no_grad():
            moments = [*model.encode_moments(batch.hr), *model.encode_condition(batch.lr)]
        arrays = {name: moment[0].half().numpy() for name, moment in zip(LATENT_MOMENTS, moments, strict=True)}
        samples.append((entry.key, members | {"latent.safetensors": save(arrays)}))
    tar = folder / "set" / "shards" / "000000.tar"
    tar.parent.mkdir(parents=True)
    entries = [IndexedEntry(*astuple(entry)) for entry in write_tar(tar, "shards/000000.tar", samples)]
    record = ShardRecord(0, "shards/000000.tar", sha256_file(tar), tar.stat().st_size, entries)
    commit_record(str(folder / "set"), record)
    facts = {"scale": 4, "has_lr": True, "latents_model": model.encoder_id()}
    return write_manifest(str(folder / "set"), 1, **facts), model


@pytest.mark.parametrize("number", [1, 2])
def test_stored_latents_take_the_encoders_place(latents: tuple[Manifest, CcsrModel], number: int) -> None:
    manifest, model = latents
    settings = config(inputs="latents", crop_px=64, stage=number, model={"preset": "tiny", "family": "v2"})
    check_stored(settings, [manifest], model.encoder_id())
    batch = collate([reader_of([manifest], settings)(position) for position in range(3)]).to("cpu")
    assert batch.hr.shape == ((3, 3, 64, 64) if number == 2 else (3, 3, 0, 0))
    by_key = {entry.key: read_sample(manifest.uri, entry) for entry in manifest.entries}
    images = [
        TrainingSample(key, position, *(decode_image(by_key[key][name], where="") for name in ("hr.png", "lr.png")))
        for key, position in zip(batch.keys, batch.positions, strict=True)
    ]
    pixels = collate(images).to("cpu")
    stage = build_stage(model, settings)
    for stored, encoded in zip(stage.latents_of(batch), stage.latents_of(pixels), strict=True):
        assert stored.dtype == torch.float32
        assert 0 < (stored - encoded).abs().max() < 2e-3 * encoded.abs().max()  # float16, but the same noise
    if number == 2:
        assert torch.equal(batch.hr, pixels.hr)
        assert torch.equal(batch.lr, pixels.lr)
    else:
        assert float(stage(batch)["loss"].detach()) == pytest.approx(float(stage(pixels)["loss"].detach()), rel=1e-2)


def test_latents_that_do_not_fit_are_refused(latents: tuple[Manifest, CcsrModel], stored: list[Manifest]) -> None:
    manifest, model = latents
    settings = config(inputs="latents", crop_px=64)
    other = build_model(ModelConfig(preset="tiny", family="v2"), seed=2)
    with pytest.raises(ConfigError, match=f"{model.encoder_id()}, the model's encoder is {other.encoder_id()}"):
        check_stored(settings, [manifest], other.encoder_id())
    with pytest.raises(ConfigError, match="hold no latents"):
        check_stored(settings, stored, model.encoder_id())
    check_stored(config(), stored, other.encoder_id())
    with pytest.raises(DataError, match="of 64x64 px, not of crop_px = 32"):
        reader_of([manifest], config(inputs="latents"))(0)
    with pytest.raises(DataError, match="holds no latents"):
        reader_of(stored, settings)(0)
    with pytest.raises(ValidationError, match="leave `degradation` out"):
        config(inputs="latents", degradation="ccsr")


def test_the_encoders_id_leaves_the_decoder_out() -> None:
    model, again = (build_model(ModelConfig(preset="tiny", family="v1"), seed=1) for _ in range(2))
    with torch.no_grad():
        model.vae.decoder.conv_out.bias += 1
    assert model.encoder_id() == again.encoder_id()
    with torch.no_grad():
        model.vae.encoder.conv_in.bias[0] += 1e-6
    assert model.encoder_id() != again.encoder_id()
    again.condition_encoder = model.vae
    assert again.encoder_id() not in (model.encoder_id(), build_model(again.config, seed=1).encoder_id())


def test_a_lost_bucket_stops_the_stream_with_its_place(s3: str, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)] * 4)
    manifest = make_shard_set(shard_config(tmp_path / "photos", f"{s3}/set", degradation="bicubic"))
    settings = config(num_updates=50)
    batches = updates(reader_of([manifest], settings), settings, start=0, rank=0, world_size=1)
    assert next(batches)[0].hr.shape == (2, 3, 32, 32)
    storage.s3_filesystem().rm(s3, recursive=True)
    with pytest.raises(StorageError, match="no such file") as caught:
        for _ in batches:
            pass
    assert caught.value.where == f"{s3}/set/shards/000000.tar"


def test_a_shard_that_changed_is_told(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)] * 4)
    manifest = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    reader = reader_of([manifest], config())
    place = reader.place(0)
    shard = tmp_path / "set" / "shards" / "000000.tar"
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[place.entry.offset_bytes + 1200] ^= 1  # within the first member's pixels
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged") as caught:
        reader(0)
    assert place.entry.key in caught.value.where
    shard.write_bytes(whole)
    with pytest.raises(DataError, match="the index promises sample other"):
        reader.maker(place._replace(entry=replace(place.entry, key="other")))


def test_a_dataset_that_changed_since_the_run_began_is_refused(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.run.driver, "fit", lambda *_: None)
    monkeypatch.setattr(training.run.driver, "export_run", lambda *_: None)
    monkeypatch.setattr(training.run.driver, "ray_cluster", lambda *_, **__: nullcontext())
    save_photos(tmp_path / "photos", [(64, 64)] * 2)
    for name in ("one", "moved", "other"):
        if name == "other":
            save_photos(tmp_path / "photos", [(64, 64)] * 3)
        make_shard_set(shard_config(tmp_path / "photos", tmp_path / name, degradation="bicubic"))
    runs = {
        name: config(
            data=[str(tmp_path / name)],
            output=str(tmp_path / "out"),
            model={"preset": "tiny", "family": "v1"},
            tracking={"uri": database},
        )
        for name in ("one", "moved", "other")
    }
    training.run.driver.run_train(runs["one"])
    training.run.driver.run_train(runs["moved"])
    write_bytes(f"{runs['one'].output}/checkpoints/000000000001/state.json", b"{}")
    with pytest.raises(ConfigError, match=r"made from something else:\n    inputs\.dataset_ids"):
        training.run.driver.run_train(runs["other"])


def test_a_task_does_not_import_the_networks() -> None:
    """They take seconds and some hundred MB of every worker process on every CPU node."""
    code = "import sys, training.data.batches; print(sorted({'diffusers', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_cpus_that_the_cluster_lacks_are_told() -> None:
    settings = config(global_batch_size=8, runtime={"num_workers": 4, "ingest_cpus": 2})
    check_cpus(settings, {"CPU": 12.0})
    with pytest.raises(ConfigError, match="4 workers of 1 CPU and 2 for ingest need 12 CPUs, the cluster has 11"):
        check_cpus(settings, {"CPU": 11.0})
    gpu = config(global_batch_size=8, runtime={"num_workers": 4, "ingest_cpus": 2, "device": "cuda"})
    check_cpus(gpu, {"CPU": 8.0})
    with pytest.raises(ConfigError, match="need 8 CPUs, the cluster has 0"):
        check_cpus(gpu, {})


def test_a_lost_shard_stops_the_stream_with_its_place(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)] * 4)
    manifest = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    settings = config(num_updates=50)
    batches = updates(reader_of([manifest], settings), settings, start=0, rank=0, world_size=1)
    next(batches)
    shard = tmp_path / "set" / "shards" / "000000.tar"
    shard.unlink()
    with pytest.raises(StorageError, match="no such file") as caught:
        for _ in batches:
            pass
    assert caught.value.where == str(shard)


def test_a_stream_that_is_left_stops_its_threads(stored: list[Manifest]) -> None:
    settings = config(num_updates=1000)
    batches = updates(reader_of(stored, settings), settings, start=0, rank=0, world_size=1)
    next(batches)
    assert any(thread.name.startswith("ingest") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("ingest") for thread in threading.enumerate())


def test_the_lr_is_the_recipes_of_the_crop_that_is_returned(bare: list[Manifest]) -> None:
    reader = reader_of(bare, config(degradation="bicubic"))
    for position in range(6):
        sample = reader(position)
        again = degrade(sample.hr, load_preset("bicubic"), rng_for(0, "any"))
        assert np.abs(again.lr.astype(int) - sample.lr).max() <= 1  # flipped before or after: rounding may differ
