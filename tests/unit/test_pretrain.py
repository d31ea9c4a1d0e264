"""Pretraining on two small photographs: it resumes where it stopped and writes a model in half precision."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.pretrain import PretrainConfig, draw_crop, encoded_pairs, pretrain, velocity
from infra.imaging.images import encode_png
from tests.unit.photos import photo
from training.models import load_model
from training.models.directory import PARTS, WEIGHTS, read_weights
from training.sampling import predict_x0

pytestmark = pytest.mark.slow  # test_pretrain_phase.py has the resume on a toy network


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    place = tmp_path_factory.mktemp("pretrain")
    for name, size in (("a.png", (120, 150)), ("b.png", (400, 410))):
        (place / name).write_bytes(encode_png(photo(*size, seed=ord(name[0]))))
    counts = {"vae_updates": 1, "decoder_updates": 1, "denoiser_updates": 1, "num_crops": 16}
    files = {"photos": str(place), "train": ["a.png"], "validation": ["b.png"], "short_sides": [110]}
    return PretrainConfig.model_validate({**files, **counts, "threads": 1, "validate_every": 1})


@pytest.fixture(scope="module")
def out(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    pretrain(config, out)
    return out


def updates(out: Path, phase: str) -> list[int]:
    return [json.loads(line)["update"] for line in (out / f"{phase}.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, bytes]:
    return {name: (out / "model" / name / WEIGHTS).read_bytes() for name in ("vae", "unet", "controlnet")}


def test_the_model_is_shipped_in_half_precision_and_loads(out: Path) -> None:
    model = load_model(out / "model")
    assert model.config.prediction == "v"
    assert model.vae.config.scaling_factor != 0.18215  # measured, not diffusers' default
    for name in ("vae", "unet", "controlnet"):
        assert name in PARTS
        assert {tensor.dtype for tensor in read_weights(out / "model" / name / WEIGHTS).values()} == {torch.float16}


def test_a_phase_resumes_where_it_stopped(config: PretrainConfig, out: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(out, parts)
    pretrain(config, parts)  # all updates are done
    assert [updates(parts, phase) for phase in ("vae", "decoder", "denoiser")] == [[0, 1]] * 3
    assert weights(parts) == weights(out)
    longer = config.model_copy(update={"denoiser_updates": 3})
    pretrain(longer, parts)
    pretrain(longer, tmp_path / "whole")
    assert updates(parts, "denoiser") == updates(tmp_path / "whole", "denoiser") == [0, 1, 2, 3]
    assert weights(parts) == weights(tmp_path / "whole")
    assert weights(parts)["vae"] == weights(out)["vae"]
    assert weights(parts)["unet"] != weights(out)["unet"]


@torch.no_grad()
def test_blind_rows_see_the_unet_alone(out: Path) -> None:
    model = load_model(out / "model")
    x_t, z_lr = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    t = torch.tensor([500, 500])
    found = velocity(model, x_t, t, z_lr, torch.tensor([True, False]))
    alone = model.unet(x_t, t, model.prompt.expand(2, -1, -1)).sample
    torch.testing.assert_close(found[0], alone[0])
    assert not torch.allclose(found[1], alone[1], atol=1e-2)
    eps = model.denoiser(z_lr)(x_t, t)  # and the model's own denoiser turns the same output into noise
    abar = 1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    abar = abar.cumprod(0)[500]
    x0 = abar.sqrt() * x_t - (1 - abar).sqrt() * found
    torch.testing.assert_close(predict_x0(x_t, eps, t)[1], x0[1].float(), rtol=1e-4, atol=1e-4)


def test_crops_and_pairs_depend_on_their_generator_alone(
    config: PretrainConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [photo(120, 150, seed=1), photo(130, 110, seed=2)]
    one, same, other = (draw_crop(photos, 40, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (40, 40, 3)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    monkeypatch.setattr("benchmarks.pretrain.CHUNK", 2)
    model = load_model(out / "model")
    few = encoded_pairs(model, photos, "train", 3, config, tmp_path)
    kept = sorted(tmp_path.glob("latents*"))
    more = encoded_pairs(model, photos, "train", 5, config, tmp_path)
    assert torch.equal(few, more[:, :3])
    assert len(kept) == 2 < len(sorted(tmp_path.glob("latents*")))
    assert not torch.allclose(few[0], few[1], atol=1e-2)
