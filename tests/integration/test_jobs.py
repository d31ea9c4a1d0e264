"""Jobs that are interrupted, changed or given bad input: no finished work is lost, and the error says what to do."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from infra.config import parse_config
from infra.errors import ConfigError, DataError, ModelError, PartialResultError
from infra.imaging.images import encode_png
from infra.shards.manifest import Manifest
from pipelines.sets.verify import verify
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import run_shard
from training.config import ModelConfig, TrainConfig
from training.models import build_model, save_model
from training.run.driver import run_train


def photos(folder: Path, num_images: int = 4) -> Path:
    """Noise pictures: what they show does not matter here."""
    folder.mkdir(parents=True)
    for number in range(num_images):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        (folder / f"photo{number}.png").write_bytes(encode_png(pixels))
    return folder


def shard_config(source: Path, output: Path, **changes) -> ShardConfig:
    values = {
        "job": "shard",
        "output": str(output),
        "sources": [{"kind": "folder", "name": "set", "path": str(source)}],
        "degradation": "bicubic",
        "samples_per_shard": 1,
    }
    return parse_config(values | changes, ShardConfig, where="test")


@pytest.mark.usefixtures("without_ray")
def test_sharding_goes_on_where_it_stopped_and_refuses_a_changed_config(tmp_path):
    source = photos(tmp_path / "photos")
    whole = run_shard(shard_config(source, tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    run_shard(shard_config(source, stopped))
    for lost in ("manifest.json", "index.parquet", "records/000002.json"):
        (stopped / lost).unlink()
    kept = {path: path.stat().st_mtime_ns for path in stopped.rglob("*.tar")}
    again = run_shard(shard_config(source, stopped))
    assert again.dataset_id == whole.dataset_id
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*.tar")} == kept
    assert verify(str(stopped)).num_samples == 4
    with pytest.raises(ConfigError, match=r"config\.seed: 0 -> 1"):
        run_shard(shard_config(source, stopped, seed=1))
    (source / "photo9.png").write_bytes((source / "photo0.png").read_bytes())
    with pytest.raises(ConfigError, match="source_id"):
        run_shard(shard_config(source, stopped))
    assert verify(str(stopped)).dataset_id == whole.dataset_id


@pytest.mark.usefixtures("ray_session")
def test_a_strange_file_in_a_shards_place_is_told_by_the_worker(tmp_path):
    source = photos(tmp_path / "photos")
    (tmp_path / "out" / "shards").mkdir(parents=True)
    (tmp_path / "out" / "shards" / "000002.tar").write_bytes(b"not ours")
    with pytest.raises(DataError, match="another shard is already there"):
        run_shard(shard_config(source, tmp_path / "out"))
    assert (tmp_path / "out" / "shards" / "000002.tar").read_bytes() == b"not ours"


@pytest.mark.usefixtures("ray_session")
def test_an_unreadable_photo_is_set_aside_and_said(tmp_path):
    source = photos(tmp_path / "photos")
    good = (source / "photo1.png").read_bytes()
    (source / "photo1.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(PartialResultError, match="1 of 4 samples were quarantined") as caught:
        run_shard(shard_config(source, tmp_path / "out"))
    assert caught.value.exit_code == 1
    assert "photo1.png" in str(caught.value)
    manifest = Manifest.load(str(tmp_path / "out"))
    assert [entry.key for entry in manifest.entries] == [f"set-photo{n}-000-0" for n in (0, 2, 3)]
    (set_aside,) = manifest.facts["quarantined"]
    assert (set_aside["key"], set_aside["reason"]) == ("set-photo1-000-0", "truncated")
    allowed = shard_config(source, tmp_path / "out", runtime={"max_failed_fraction": 0.25})
    assert run_shard(allowed).num_samples == 3


@pytest.mark.usefixtures("without_ray")
def test_evaluation_goes_on_where_it_stopped(tmp_path, database):
    data = run_shard(shard_config(photos(tmp_path / "photos", 3), tmp_path / "data")).uri
    save_model(build_model(ModelConfig(family="v2"), 0), tmp_path / "model")
    values = {
        "job": "evaluate",
        "output": str(tmp_path / "result"),
        "data": [data],
        "num_runs": 2,
        "methods": [
            {"kind": "bicubic"},
            {"kind": "model", "name": "v2", "model": str(tmp_path / "model"), "sampling": {"num_steps": 1}},
        ],
        "tracking": {"uri": database},
    }
    config = parse_config(values, EvaluateConfig, where="test")
    first = run_evaluate(config)
    pictures = {path: path.stat().st_mtime_ns for path in (tmp_path / "result" / "images" / "v2").rglob("*.png")}
    for lost in ("results.parquet", "images.parquet", "records/v2/set-photo1-000-0.json"):
        (tmp_path / "result" / lost).unlink()
    again = run_evaluate(config)
    assert again.summary == first.summary
    anew = {path.name for path in pictures if path.stat().st_mtime_ns != pictures[path]}
    assert anew == {"set-photo1-000-0.png"}
    record = json.loads((tmp_path / "result" / "records" / "v2" / "set-photo1-000-0.json").read_text())
    assert len(record["scores"]["psnr_y"]) == 2


@pytest.mark.usefixtures("without_ray")
def test_a_model_of_another_kind_is_refused_before_anything_starts(tmp_path, database):
    data = run_shard(shard_config(photos(tmp_path / "photos", 1), tmp_path / "data")).uri
    save_model(build_model(ModelConfig(family="v2"), 0), tmp_path / "model")
    values = {
        "job": "train",
        "output": str(tmp_path / "run"),
        "stage": 2,
        "data": [data],
        "init_from": str(tmp_path / "model"),
        "model": {"family": "v1"},
        "crop_px": 64,
        "global_batch_size": 4,
        "num_updates": 1,
        "tracking": {"uri": database},
    }
    with pytest.raises(ModelError, match="the config asks for"):
        run_train(parse_config(values, TrainConfig, where="test"))
    assert not (tmp_path / "run" / "checkpoints").exists()
