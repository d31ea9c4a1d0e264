"""CcsrModel: reproducible weights, what a denoiser computes, model directories that come back whole or not at all."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra import ConfigError, ModelError, StorageError
from training.config import FAMILIES, ModelConfig
from training.method import METHODS
from training.models import (
    CcsrModel,
    build_model,
    load_model,
    save_model,
)
from training.models.build import MODELS
from training.models.directory import WEIGHTS
from training.models.library import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from training.models.networks import build_networks
from training.run.cost.parameters import PAPER_MILLIONS, parameter_table, v1_parts


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> CcsrModel:
    """A tiny model whose ControlNet has an effect: no weight of it is zero."""
    model = build_model(ModelConfig(), seed=3)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.controlnet.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def states(model: CcsrModel) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, part in model.networks.items() for key, value in part.state_dict().items()}


def test_weights_are_a_function_of_the_seed_and_leave_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (build_model(ModelConfig(), seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    again = states(same)
    assert all(torch.equal(value, again[key]) for key, value in states(one).items())
    assert not torch.equal(one.unet.conv_in.weight, other.unet.conv_in.weight)


def test_custom_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="custom"):
        build_model(ModelConfig(preset="custom"), seed=0)


@torch.no_grad()
def test_a_new_controlnet_copies_the_encoder_and_changes_nothing() -> None:
    model = build_model(ModelConfig(), seed=3)
    unet, controlnet = model.unet.state_dict(), model.controlnet.state_dict()
    shared = [key for key in controlnet if key in unet]
    assert {key.split(".")[0] for key in shared} == {"conv_in", "time_embedding", "down_blocks", "mid_block"}
    assert all(torch.equal(controlnet[key], unet[key]) for key in shared)
    assert not any(value.any() for key, value in controlnet.items() if key not in unet)
    x, t = draw(2, 4, 8, 8), torch.tensor([1, 999])
    plain = model.unet(x, t, model.prompt.expand(2, -1, -1)).sample
    assert torch.equal(model.denoiser(draw(2, 4, 8, 8, seed=1))(x, t), plain)


def test_condition_gets_a_gradient_once_an_output_convolution_is_not_zero() -> None:
    model = build_model(ModelConfig(), seed=3)
    nn.init.ones_(model.controlnet.controlnet_mid_block.weight)
    denoise = model.denoiser(draw(1, 4, 8, 8, seed=1))
    denoise(draw(1, 4, 8, 8), torch.tensor([500])).square().mean().backward()
    assert model.controlnet.controlnet_cond_embedding.weight.grad.abs().max() > 0


@torch.no_grad()
def test_denoiser_is_the_unet_under_the_controlnets_residuals(model: CcsrModel) -> None:
    x, t, z_lr, text = draw(2, 4, 8, 8), torch.tensor([17, 999]), draw(2, 4, 8, 8, seed=1), draw(1, 5, 16, seed=2)
    words = text.expand(2, -1, -1)
    down, middle = model.controlnet(x, t, words, controlnet_cond=z_lr, return_dict=False)
    expected = model.unet(
        x, t, words, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    assert torch.equal(model.denoiser(z_lr, text)(x, t), expected)
    assert not torch.allclose(model.denoiser(z_lr)(x, t), expected)
    assert not torch.allclose(model.denoiser(z_lr + 1, text)(x, t), expected)


@torch.no_grad()
def test_condition_is_repeated_over_runs(model: CcsrModel) -> None:
    x, t, z_lr = draw(6, 4, 8, 8), torch.full((6,), 400), draw(2, 4, 8, 8, seed=1)
    together = model.denoiser(z_lr)(x, t)
    for row in range(6):
        alone = model.denoiser(z_lr[row % 2 : row % 2 + 1])(x[row : row + 1], t[:1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_at_cuts_the_condition_of_a_tile(model: CcsrModel) -> None:
    x, t, z_lr = draw(1, 4, 8, 8), torch.tensor([400]), draw(1, 4, 12, 16, seed=1)
    found = model.denoiser(z_lr)(x, t, (3, 5))
    assert torch.equal(found, model.denoiser(z_lr[..., 3:11, 5:13])(x, t))
    for wrong in (None, (5, 0)):
        with pytest.raises(ValueError, match="does not fit z_lr"):
            model.denoiser(z_lr)(x, t, wrong)


@torch.no_grad()
def test_latents_are_scaled_and_images_are_shifted(model: CcsrModel) -> None:
    image = draw(2, 3, 32, 48).sigmoid()
    mean, std = model.encode_moments(image)
    posterior = model.vae.encode(2 * image - 1).latent_dist
    assert model.factor == 4
    assert mean.shape == std.shape == (2, 4, 8, 12)
    torch.testing.assert_close(mean, 0.18215 * posterior.mean)
    torch.testing.assert_close(std, 0.18215 * posterior.std)
    torch.testing.assert_close(model.decode(mean), model.vae.decode(posterior.mean).sample, rtol=1e-4, atol=1e-5)
    assert model.decode(100 * mean).abs().max() > 1


@torch.no_grad()
def test_every_attention_is_torchs_fused_one(model: CcsrModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    fused = nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *inputs: Any, **named: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return fused(query, *inputs, **named)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    model.denoiser(torch.zeros(1, 4, 8, 8))(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64))
    assert len(calls) == len(attentions(model.unet, model.controlnet)) > 2
    with torch.device("meta"):  # only the full-size VAE has attention
        vae, _ = build_networks("sd21")
    assert len(attentions(vae)) == 2
    kinds = {type(layer.processor).__name__ for layer in attentions(vae, model.unet)}
    assert kinds == {"AttnProcessor2_0"}


def attentions(*networks: nn.Module) -> list[Any]:
    from diffusers.models.attention_processor import Attention  # after training.models.library

    return [module for network in networks for module in network.modules() if isinstance(module, Attention)]


@torch.no_grad()
def test_half_precision_networks_take_and_give_float32(model: CcsrModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    half = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert {value.dtype for value in states(half).values()} == {torch.bfloat16}
    assert half.prompt.dtype == torch.float32
    x, t, z_lr = draw(1, 4, 8, 8), torch.tensor([400]), draw(1, 4, 8, 8, seed=1)
    found, exact = half.denoiser(z_lr)(x, t), model.denoiser(z_lr)(x, t)
    assert found.dtype == half.decode(z_lr).dtype == half.encode_moments(draw(1, 3, 8, 8))[0].dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_directory_round_trip_is_exact_and_replaces(model: CcsrModel, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "model"
    save_model(build_model(ModelConfig(), seed=9), place)
    model.prompts["words"] = draw(1, 5, 16)
    try:
        save_model(model, place)
        found = load_model(place)
        assert torch.equal(found.prompts["words"], model.prompts["words"])
    finally:
        del model.prompts["words"]
    assert found.config == model.config
    read, saved = states(found), states(model)
    assert read.keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in read.items())
    assert all(parameter.requires_grad for parameter in found.controlnet.parameters())
    assert not found.unet.training
    assert os.listdir(place.parent) == ["model"]
    assert {path.stat().st_mode & 0o044 for path in place.rglob("*") if path.is_file()} == {0o044}


@torch.no_grad()
def test_a_condition_encoder_of_its_own_is_used_moved_and_kept(model: CcsrModel, tmp_path: Path) -> None:
    own = build_model(ModelConfig(), seed=8).vae
    both = CcsrModel(model.config, model.vae, model.unet, model.controlnet, model.prompts, condition_encoder=own)
    save_model(both, tmp_path / "model")
    found = load_model(tmp_path / "model", dtype=torch.float64)
    assert {value.dtype for value in found.condition_encoder.state_dict().values()} == {torch.float64}
    image = draw(1, 3, 16, 16).sigmoid()
    expected = CcsrModel(model.config, own, model.unet, model.controlnet, model.prompts).encode_moments(image)
    for a, b in zip(found.encode_condition(image), expected, strict=True):
        torch.testing.assert_close(a, b)
    plain = AutoencoderKL.from_pretrained(tmp_path / "model" / "condition_encoder").state_dict()
    assert all(torch.equal(plain[key], value) for key, value in own.state_dict().items())
    assert torch.equal(model.encode_condition(image)[0], model.encode_moments(image)[0])
    save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").condition_encoder is None


def test_plain_diffusers_loads_each_part(model: CcsrModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    place = tmp_path / "model"
    for part, kind in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel)):
        found, info = kind.from_pretrained(place / part, output_loading_info=True)
        assert not any(info.values())
        own = getattr(model, part).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in found.state_dict().items())
    controlnet, info = ControlNetModel.from_pretrained(place / "controlnet", output_loading_info=True)
    assert not any(info.values())
    x, t, z_lr = draw(1, 4, 8, 8), torch.tensor([400]), draw(1, 4, 8, 8, seed=1)
    inputs = {"encoder_hidden_states": model.prompt, "controlnet_cond": z_lr}
    with torch.no_grad():
        found, expected = (network(x, t, **inputs, return_dict=False) for network in (controlnet, model.controlnet))
    for a, b in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def rewrite(place: Path, part: str, change: dict[str, Tensor | None], *, honest: bool) -> None:
    """Change tensors of a part (None drops); with `honest` the record's sha256 follows, as another tool's would."""
    path = place / part / WEIGHTS
    state = {**load_file(path), **change}
    save_file({key: value for key, value in state.items() if value is not None}, path)
    if honest:
        record = json.loads((place / "ccsr.json").read_text())
        record["sha256"][f"{part}/{WEIGHTS}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (place / "ccsr.json").write_text(json.dumps(record))


def test_damaged_directory_is_refused_by_its_first_difference(model: CcsrModel, tmp_path: Path) -> None:
    place = tmp_path / "model"

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            load_model(place)
        save_model(model, place)

    save_model(model, place)
    rewrite(place, "unet", {"conv_in.bias": torch.ones(64)}, honest=False)
    refused("unet/.* is truncated or changed")
    rewrite(place, "unet", {"conv_in.bias": None}, honest=True)
    refused(r"tensor conv_in\.bias is missing")
    rewrite(place, "vae", {"adapter.bias": torch.ones(1)}, honest=True)
    refused(r"tensor adapter\.bias has no place")
    rewrite(place, "controlnet", {"conv_in.bias": torch.ones(65)}, honest=True)
    refused(r"tensor conv_in\.bias has shape \(65,\), not \(64,\)")
    rewrite(place, "vae", {"post_quant_conv.bias": torch.full((4,), torch.nan)}, honest=True)
    refused(r"tensor post_quant_conv\.bias holds NaN")
    hint = "controlnet_cond_embedding.conv_"
    rewrite(place, "controlnet", {f"{hint}in.bias": torch.ones(8)}, honest=True)
    refused("is of an RGB hint encoder")
    rewrite(place, "controlnet", {f"{hint}out.weight": torch.ones(64, 8, 3, 3)}, honest=True)
    refused("trained in another form")
    rewrite(place, "controlnet", {f"{hint}out.bias": None}, honest=True)
    refused(r"tensor controlnet_cond_embedding\.weight is missing")
    (place / "vae" / WEIGHTS).write_bytes((place / "vae" / WEIGHTS).read_bytes()[:-9])
    refused("is truncated or changed")
    (place / "prompt.safetensors").unlink()
    refused(r"prompt\.safetensors is missing")
    (place / "ccsr.json").write_text("{")
    refused("is not JSON")
    (place / "ccsr.json").write_text('{"format": 2, "sha256": {}}')
    refused("not a model's record of format 1")
    (place / "ccsr.json").unlink()
    with pytest.raises(ModelError, match=r"ccsr\.json is missing"):
        load_model(place)


def test_nothing_is_written_on_failure(model: CcsrModel, tmp_path: Path) -> None:
    weight = model.vae.decoder.conv_out.bias
    good = weight.detach().clone()
    save_model(model, tmp_path / "model")
    before = (tmp_path / "model" / "ccsr.json").read_text()
    try:
        weight.data[0] = torch.inf
        with pytest.raises(ModelError, match=r"tensor decoder\.conv_out\.bias holds NaN or infinity"):
            save_model(model, tmp_path / "model")
    finally:
        weight.data.copy_(good)
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "ccsr.json").read_text() == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(StorageError, match="not a model directory"):
        save_model(model, tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == ["cat.png"]


def test_parameter_tables_sum_to_the_published_counts() -> None:
    full = parameter_table("sd21") + v1_parts()
    counts = {row.name: row.parameters / 1e6 for row in full}
    assert round(counts["UNet"], 3) == 865.911
    assert round(counts["ControlNet"], 3) == 363.154  # the specification's 363.153 cuts 363.1536
    assert round(counts["VAE encoder"] + counts["VAE decoder"], 3) == 83.654
    assert round(sum(counts.values()), 2) == pytest.approx(PAPER_MILLIONS, abs=0.0051)
    tiny = sum(row.parameters for row in parameter_table("tiny"))
    assert tiny == sum(value.numel() for value in states(build_model(ModelConfig(), 0)).values())
    with pytest.raises(ConfigError):
        parameter_table("huge")


def test_a_method_is_a_line_in_each_of_three_tables() -> None:
    families = get_args(ModelConfig.model_fields["family"].annotation)
    assert set(families) == set(FAMILIES) == set(MODELS) == set(METHODS)
    root = Path(__file__).parents[2]
    compared = re.compile(r"family\W*(==|!=|in) *[(\[{]?[\"']")
    sources = [file for folder in ("training", "evaluation", "pipelines") for file in (root / folder).rglob("*.py")]
    assert not [file.name for file in sources if compared.search(file.read_text())]
