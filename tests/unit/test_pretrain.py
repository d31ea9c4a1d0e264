"""Pretraining on two small photographs: it goes on where it stopped and writes a model in half precision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.pretrain import PretrainConfig, draw_crop, encoded_pairs, pretrain, velocity
from infra.images import encode_png
from tests.unit.photos import photo
from training.models import load_model
from training.models.directory import PARTS, WEIGHTS, read_weights
from training.sampling import predict_x0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    place = tmp_path_factory.mktemp("pretrain")
    for name in ("a.png", "b.png"):
        (place / name).write_bytes(encode_png(photo(120, 150, seed=ord(name[0]))))
    return PretrainConfig(
        photos=str(place),
        train=("a.png",),
        validation=("b.png",),
        output=str(place / "out"),
        threads=1,
        vae_minutes=0.01,
        decoder_minutes=0.01,
        denoiser_minutes=0.01,
        short_sides=(110,),
        num_crops=16,
    )


@pytest.fixture(scope="module")
def out(config: PretrainConfig) -> Path:
    pretrain(config)
    return Path(config.output)


def updates(out: Path, phase: str) -> list[int]:
    return [json.loads(line)["update"] for line in (out / f"{phase}.jsonl").read_text().splitlines()]


def test_the_model_is_shipped_in_half_precision_and_loads(out: Path) -> None:
    model = load_model(out / "model")
    assert model.config.prediction == "v"
    assert model.vae.config.scaling_factor != 0.18215  # measured, not diffusers' default
    for name in ("vae", "unet", "controlnet"):
        assert name in PARTS
        assert {tensor.dtype for tensor in read_weights(out / "model" / name / WEIGHTS).values()} == {torch.float16}


def test_a_phase_goes_on_where_it_stopped(config: PretrainConfig, out: Path) -> None:
    before = {phase: updates(out, phase) for phase in ("vae", "decoder", "denoiser")}
    weights = (out / "model" / "vae" / WEIGHTS).read_bytes()
    pretrain(config)  # all minutes are used up
    assert {phase: updates(out, phase) for phase in before} == before
    assert (out / "model" / "vae" / WEIGHTS).read_bytes() == weights
    pretrain(config.model_copy(update={"denoiser_minutes": 0.03}))
    assert updates(out, "vae") == before["vae"]
    assert updates(out, "denoiser")[-1] > before["denoiser"][-1]
    assert (out / "model" / "vae" / WEIGHTS).read_bytes() == weights


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


def test_crops_and_pairs_depend_on_their_generator_alone(out: Path) -> None:
    photos = [photo(120, 150, seed=1), photo(130, 110, seed=2)]
    one, same, other = (draw_crop(photos, 40, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (40, 40, 3)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    model = load_model(out / "model")
    few, more = (encoded_pairs(model, photos, count, 5, "cpu") for count in (3, 5))
    torch.testing.assert_close(few, more[:, :3], rtol=1e-3, atol=1e-3)  # another batch
    assert not torch.allclose(few[0], few[1], atol=1e-2)
