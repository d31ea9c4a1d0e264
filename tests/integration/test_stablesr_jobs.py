"""StableSR's journey through the jobs that CCSR takes: base, stage 1, sampled shards, stage 2, evaluation of both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from evaluation.results import EvaluationResult
from infra.config import parse_config
from infra.imaging.images import encode_png
from infra.imaging.pictures import resized
from pipelines.convert import run_convert
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import run_shard
from tests.integration.conftest import REPOSITORY
from tests.training_runs import train_config
from training.config import ModelConfig
from training.models import StableSrModel, build_model, load_model, save_model
from training.run.driver import run_train

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]
TINY_BASE = str(REPOSITORY / "training" / "models" / "tiny_base")
MODEL = {"family": "stablesr", "prediction": "v"}
SETTINGS = {"adaptive": False, "gan_start_update": 1, "discriminator_start_update": 1, "discriminator_width": 16}


def evaluation(folder: Path, model: str, images: object, sampling: object) -> EvaluateConfig:
    """Two runs of CCSR's tiny base and of a StableSR model."""
    values = {
        "job": "evaluate",
        "output": str(folder / "evaluation"),
        "data": [images],
        "num_runs": 2,
        "methods": [
            {"kind": "model", "name": "ccsr", "model": TINY_BASE, "sampling": {"num_steps": 6}},
            {"kind": "model", "name": "stablesr", "model": model, "sampling": sampling},
        ],
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    return parse_config(values, EvaluateConfig, where="test")


def assert_both_are_reported(result: EvaluationResult) -> None:
    for name in ("ccsr", "stablesr"):
        summary = result.summary[name]
        assert summary["num_runs"] == 2
        assert summary["l_std"] > 0
        assert summary["metrics"]["psnr_y"]["g_std"] > 0
    assert result.summary["stablesr"]["l_std"] != result.summary["ccsr"]["l_std"]
    report = (Path(result.folder) / "report.html").read_text()
    assert all(word in report for word in ("stablesr", "G-STD of psnr_y", "L-STD", "95 % intervals"))


def test_stablesr_stands_beside_ccsr_in_one_evaluation(tmp_path: Path) -> None:
    model = build_model(ModelConfig(family="stablesr"), 1)
    model.prepare_stage2(2)
    save_model(model, tmp_path / "model")
    for name, size in (("hr", 64), ("lr", 16)):
        (tmp_path / name).mkdir()
        for key in range(2):
            picture = resized(np.ascontiguousarray(data.astronaut()[:256, key * 256 :][:, :256]), (size, size))
            (tmp_path / name / f"{key}.png").write_bytes(encode_png(picture))
    folders = {"hr": f"{tmp_path}/hr", "lr": f"{tmp_path}/lr"}
    sampling = {"num_steps": 4, "start": "noise", "enlargement": "bilinear"}
    assert_both_are_reported(run_evaluate(evaluation(tmp_path, str(tmp_path / "model"), folders, sampling)))


def test_the_whole_journey_beside_ccsr(tmp_path: Path) -> None:
    base = run_convert(str(tmp_path / "base"), base=TINY_BASE, family="stablesr")
    assert load_model(base).config.prediction == "v"
    source = {"kind": "package", "name": "skimage", "package": "skimage", "files": ["data/astronaut.png"]}

    def shards(name: str, **changes: object) -> str:
        values = {"job": "shard", "output": str(tmp_path / name), "sources": [source], "degradation": "stablesr"}
        crop = {"kind": "random", "size_px": 64, "num_per_image": 4}
        return run_shard(parse_config(values | {"crop": crop} | changes, ShardConfig, where="test")).uri

    common = {"num_updates": 2, "model": MODEL, "crop_px": 64, "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    stage1 = train_config(shards("plain"), tmp_path / "stage1", init_from=base, **common)
    first = run_train(stage1)
    started, adapted = load_model(base), load_model(first)
    found = adapted.unet.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in started.unet.state_dict().items())
    assert not torch.equal(adapted.adapter.encoder.conv_in.weight, started.adapter.encoder.conv_in.weight)

    sampled = shards("sampled", latents={"model": first, "sampled_steps": 3})
    changes = {"stage": 2, "inputs": "latents", "init_from": first, "decoder_loss": SETTINGS}
    second = run_train(train_config(sampled, tmp_path / "stage2", **common, **changes))
    wrapped = load_model(second)
    assert isinstance(wrapped, StableSrModel)
    assert wrapped.wrapping is not None
    for name in ("vae", "unet", "adapter"):
        own = adapted.networks[name].state_dict()
        assert all(torch.equal(value, own[key]) for key, value in wrapped.networks[name].state_dict().items()), name

    assert_both_are_reported(run_evaluate(evaluation(tmp_path, second, sampled, "stablesr_s200")))
