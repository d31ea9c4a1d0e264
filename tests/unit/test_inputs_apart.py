"""What a job wrote is never its input, and crops that no image allows are refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from photos import make_shard_set, save_photos, shard_config

from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from infra import ConfigError
from pipelines.convert import run_convert
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import run_shard
from pipelines.sharding.sources import check_apart
from training.config import TrainConfig
from training.run.driver import run_train

FOLDER = {"kind": "folder", "name": "s"}
TRAIN: dict[str, Any] = {"job": "train", "stage": 1, "data": ["a"], "num_updates": 1, "crop_px": 32}
EVALUATE: dict[str, Any] = {"job": "evaluate", "data": ["a"], "methods": [{"kind": "bicubic"}]}


def run(values: dict[str, Any]) -> None:
    jobs: dict[str, Any] = {
        "shard": (ShardConfig, run_shard),
        "train": (TrainConfig, run_train),
        "evaluate": (EvaluateConfig, run_evaluate),
    }
    schema, job = jobs[values["job"]]
    job(schema.model_validate(values))


@pytest.mark.parametrize(
    "values",
    [
        {"job": "shard", "output": "in", "sources": [FOLDER | {"path": "in"}]},
        {"job": "shard", "output": "in/out", "sources": [FOLDER | {"path": "in/"}]},
        {"job": "shard", "output": "link/out", "sources": [FOLDER | {"path": "in/**"}]},
        {"job": "shard", "output": "in/out", "sources": [FOLDER | {"path": "in/*/*.jpg"}]},
        {
            "job": "shard",
            "output": "in/lr/out",
            "degradation": None,
            "sources": [{"kind": "pairs", "name": "p", "hr": "in/hr", "lr": "in/lr"}],
        },
        {"job": "shard", "output": "set/a", "sources": [{"kind": "shards", "name": "s", "path": "set"}]},
        TRAIN | {"output": "set/run", "data": ["set"]},
        TRAIN | {"output": "set/run", "data": ["other"], "validation": {"data": ["set"]}},
        EVALUATE | {"output": "set/result", "data": ["set"]},
        EVALUATE | {"output": "in/lr", "data": [{"lr": "in/lr"}]},
        EVALUATE | {"output": "in/hr/x", "data": [{"lr": "in/lr", "hr": "in/hr"}]},
        EVALUATE | {"output": "in/x", "data": ["set"], "methods": [{"kind": "outputs", "name": "o", "outputs": "in"}]},
    ],
)
def test_an_output_inside_an_input_is_refused(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.png", "in/hr/a.png", "in/lr/a.png"):
        save_photos(Path(name).parent, [(64, 64)])
    Path("link").symlink_to("in")
    for name in ("set", "other"):
        make_shard_set(shard_config("in/hr", name, degradation="bicubic"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="the output is inside an input"):
        run(values)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pattern_that_finds_nothing_of_ours_allows_an_output_beside(tmp_path: Path) -> None:
    source = FOLDER | {"path": f"{tmp_path}/data/*/HR/*.png"}
    config = ShardConfig.model_validate({"job": "shard", "output": f"{tmp_path}/data/shards", "sources": [source]})
    check_apart(config.output, config.sources)


def test_a_model_is_not_converted_into_what_it_is_made_of(tmp_path: Path) -> None:
    (tmp_path / "controlnet").mkdir()
    with pytest.raises(ConfigError, match="the output is inside an input"):
        run_convert(f"{tmp_path}/controlnet", controlnet=f"{tmp_path}/controlnet", vae=f"{tmp_path}/vae")


def test_a_crop_larger_than_the_shards_images_is_refused_at_once(tmp_path: Path) -> None:
    save_photos(tmp_path / "in", [(64, 96), (52, 96)])
    made = make_shard_set(shard_config(tmp_path / "in", tmp_path / "set", degradation="bicubic", samples_per_shard=1))
    assert made.facts["min_side_px"] == 52
    values = {**TRAIN, "data": [str(tmp_path / "set")], "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=r"crop_px = 64 does not fit these shards, .* a side of 52 px") as caught:
        run(values | {"crop_px": 64})
    assert "crop_px: 52" in caught.value.todo
    with pytest.raises(ConfigError, match="crop_px = 48 does not fit"):
        run(values | {"crop_px": 48, "inputs": "latents"})
    assert not (tmp_path / "out").exists()
