"""A shard job on Ray over zip, shard set and pairs, and with latents: the set does not depend on the workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from skimage import data

from infra import ConfigError
from infra.imaging.images import encode_png
from infra.imaging.pictures import resized
from infra.shards.manifest import Manifest
from infra.shards.shard import read_sample
from pipelines.sets.verify import verify
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import run_shard
from training.config import ModelConfig
from training.models import build_model, save_model

pytestmark = pytest.mark.usefixtures("ray_session")


def run(output: Path, *sources: dict[str, Any], **changes: Any) -> Manifest:
    return run_shard(ShardConfig.model_validate({"job": "shard", "output": str(output), "sources": sources, **changes}))


@pytest.mark.slow
def test_latents_of_a_shard_set_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = data.astronaut()
    for number in range(4):
        hr = np.ascontiguousarray(image[number * 96 :][:96, 128:256])
        for name, picture in ((f"HR/{number}.png", hr), (f"LR/{number}x4.png", resized(hr, (24, 32)))):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(encode_png(picture))
    pairs = {"kind": "pairs", "name": "p", "hr": f"{tmp_path}/HR", "lr": f"{tmp_path}/LR", "licence": "ours"}
    made = run(tmp_path / "pairs", pairs, degradation=None)
    assert made.facts["sources"][0]["num_files"] == made.num_samples == 4
    assert "ours" in (tmp_path / "pairs/DATA_CARD.md").read_text()
    model = build_model(ModelConfig(family="v2"), 0)
    monkeypatch.setenv("CCSR_WEIGHTS", str(tmp_path / "weights"))
    save_model(model, tmp_path / "weights" / "test" / "v2")
    again = {"kind": "shards", "name": "again", "path": made.uri}
    changes: dict[str, Any] = {
        "crop": {"kind": "grid", "size_px": 64, "step_px": 32},
        "latents": {"model": "test/v2", "batch_size": 4},
        "degradation": "bicubic",
        "samples_per_shard": 1,
    }
    one, two = (run(tmp_path / f"workers{n}", again, runtime={"num_actors": n}, **changes) for n in (1, 2))
    assert one.dataset_id == two.dataset_id
    assert verify(two.uri).num_samples == 4 * 2 * 3
    assert one.facts["latents_model"] == model.encoder_id()
    stored = load(read_sample(one.uri, one.entries[0])["latent.safetensors"])
    assert stored["lr.mean"].shape == (4, 16, 16)
    save_model(build_model(ModelConfig(family="v2"), 1), tmp_path / "model2")
    with pytest.raises(ConfigError, match=r"inputs\.latents\.model"):
        run(
            tmp_path / "workers1", again, **{**changes, "latents": {"model": str(tmp_path / "model2"), "batch_size": 4}}
        )


def test_near_duplicates_are_left_out_before_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept makes the set that the kept files make alone; shards go to Ray two at a time."""
    monkeypatch.setattr("infra.process.ray_runtime.ITEMS_AT_ONCE", 2)
    photos = tmp_path / "photos"
    photos.mkdir()
    kept, alike = [data.coffee(), data.astronaut(), data.chelsea()], data.astronaut()[8:-8, 8:-8]
    for number, picture in enumerate([*kept[:2], alike, kept[2]]):
        (photos / f"{number}.png").write_bytes(encode_png(np.ascontiguousarray(picture[..., :3])))
    (photos / "4.png").write_bytes(b"no picture")
    source = {"kind": "folder", "name": "p", "path": str(photos)}
    changes: dict[str, Any] = {"crop": {"kind": "center", "size_px": 64}, "degradation": "bicubic"}
    changes["samples_per_shard"] = 1
    changes["runtime"] = {"max_failed_fraction": 1}
    made = run(tmp_path / "out", source, dedupe=6, **changes)
    (line,) = map(json.loads, (tmp_path / "out/near_duplicates.jsonl").read_text().splitlines())
    assert (line["file"], line["like"]) == ("2.png", "1.png")
    assert 0 < line["bits"] <= 6
    assert made.facts["near_duplicates"] == 1
    assert "1 files left out" in (tmp_path / "out/DATA_CARD.md").read_text()
    assert verify(made.uri).num_samples == 3
    assert not list((tmp_path / "out").glob("hashes/*.json"))
    assert run(tmp_path / "out", source, dedupe=6, **changes).dataset_id == made.dataset_id
    (photos / "2.png").unlink()
    assert run(tmp_path / "alone", source, **changes).dataset_id == made.dataset_id
