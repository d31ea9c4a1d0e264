"""OSEDiff: LoRA counts at full size, the step, distillation against its own formulas, what is stored, conversion."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import photo
from torch import Tensor, nn

from infra import ConfigError, ModelError, noise_for
from infra.config import parse_config
from tests.small_networks import smaller_tiny
from training.config import ModelConfig, SamplingConfig, TrainConfig
from training.convert import convert_base, convert_onestep
from training.data.batches import Batch
from training.losses import vsd_loss
from training.models import (
    OneStepAdapter,
    OneStepModel,
    build_model,
    load_model,
    save_model,
)
from training.models.networks import build_networks
from training.restore.banded_vae import encode_in_bands
from training.restore.seeded_runs import prepare_image, restore_runs
from training.run.cost.parameters import parameter_table, regulariser_part
from training.run.cost.requirements import step_cost
from training.run.step.stages import build_stage
from training.sampling.schedules import ALPHAS_CUMPROD, add_noise

CONFIG = ModelConfig(family="onestep")
LOSS = {"reconstruction": "l2", "perceptual_weight": 2.0, "divide_by_batch": False}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return noise_for(seed, [("draw",)] * shape[0], "cpu", torch.float32)(shape)


def learned(seed: int = 1) -> OneStepModel:
    """A small model whose LoRAs, and the UNet's first convolution, differ from the base."""
    with smaller_tiny():
        model = build_model(CONFIG, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.adapter.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


@pytest.fixture(scope="module")
def model() -> OneStepModel:
    return learned()


def train_config(**changes: Any) -> TrainConfig:
    values = {"job": "train", "init_from": "random", "output": "o", "stage": 1, "data": ["d"], "num_updates": 1}
    values |= {"model": {"family": "onestep"}, "decoder_loss": LOSS, "vsd": {}, "global_batch_size": 2, "crop_px": 32}
    return parse_config(values | {"runtime": {"micro_batch_size": 2}} | changes, TrainConfig, where="test")


def batch() -> Batch:
    hr, lr = (draw(2, 3, 32, 32, seed=seed).sigmoid() for seed in (3, 4))
    return Batch(["a", "b"], [4, 5], hr, lr, {})


@pytest.mark.slow
def test_full_size_parameters() -> None:
    """Counted layer by layer from the published lists' rule; the paper's 8.5 M are both LoRAs and conv_in."""
    rows = {row.name: row.parameters for row in parameter_table("sd21", "onestep")}
    with torch.device("meta"):
        vae, unet = build_networks("sd21")

    def lora(network: nn.Module, *parts: str) -> int:
        total = 0
        for name, layer in network.named_modules():
            if any(part in name for part in parts) and isinstance(layer, nn.Linear | nn.Conv2d):
                outs, ins, *kernel = layer.weight.shape
                total += 4 * (ins * int(np.prod(kernel)) + outs)
        return total

    for_unet = lora(unet, "to_k", "to_q", "to_v", "to_out", "conv", "proj_in", "proj_out", "ff.net")
    for_vae = lora(vae.encoder, "conv", "to_") + lora(nn.ModuleDict({"quant_conv": vae.quant_conv}), "quant_conv")
    conv_in = sum(p.numel() for p in unet.conv_in.parameters())
    assert rows["LoRA of the UNet, and its first convolution"] == for_unet + conv_in == 4_067_552
    assert rows["LoRA of the VAE encoder"] == for_vae == 369_356
    assert regulariser_part("sd21").parameters == for_unet == 4_055_712


def test_a_fresh_model_restores_as_its_base_does_and_shares_its_weights() -> None:
    with smaller_tiny():
        fresh = build_model(CONFIG, 1)
    x, t = draw(2, 4, 8, 8), torch.tensor([999, 999])
    with torch.no_grad():
        text = fresh.prompt.expand(2, -1, -1)
        assert torch.equal(fresh.denoiser(x)(x, t), fresh.unet(x, t, text).sample)
        assert torch.equal(fresh.encode_condition(draw(1, 3, 32, 32))[0], fresh.encode_moments(draw(1, 3, 32, 32))[0])
    shared = {p.data_ptr() for network in (fresh.unet, fresh.vae) for p in network.parameters()}
    own = {p.data_ptr() for p in fresh.adapter.parameters()}
    used = {p.data_ptr() for net in (fresh.generator, fresh.condition_encoder) for p in net.parameters()}
    assert own < used < shared | own


@torch.no_grad()
def test_the_step_is_x0_of_the_latent_itself_and_seeds_do_not_matter(model: OneStepModel) -> None:
    lr = photo(8, 12)
    images = list(restore_runs(model, lr, (32, 48), SamplingConfig(color_fix="none"), seed=0, key="a", runs=range(3)))
    assert all(np.array_equal(image, images[0]) for image in images), "L-STD is 0"
    prepared = prepare_image(model, lr, (32, 48), SamplingConfig(), key="a")
    eps = model.generator(prepared.mean, torch.tensor([999]), model.prompt).sample
    alpha = ALPHAS_CUMPROD[999].float()
    x0 = (prepared.mean - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    decoded = model.vae.decode(x0 / model.vae.config.scaling_factor).sample.clamp(-1, 1)[0]
    expected = ((decoded + 1) / 2 * 255).round().permute(1, 2, 0)
    assert np.abs(images[0].astype(int) - expected.numpy()).max() <= 1


def test_larger_outputs_are_tiled_by_area_with_a_third_of_overlap(model: OneStepModel) -> None:
    lr, config = photo(8, 24), SamplingConfig(color_fix="none")

    def restored(tile: int | None) -> np.ndarray:
        return next(
            restore_runs(model, lr, (32, 96), config.model_copy(update={"tile": tile}), seed=0, key="a", runs=[0])
        )

    assert np.array_equal(restored(64), restored(None)), "32 x 96 px are fewer than 64 x 64"
    assert not np.array_equal(restored(48), restored(None))


def test_distillation_against_a_computation_of_its_own() -> None:
    x0 = draw(2, 4, 5, 6).requires_grad_()
    noise, t = draw(2, 4, 5, 6, seed=1), torch.tensor([20, 700])
    weights = draw(1, 4, 1, 1, seed=2), draw(1, 4, 1, 1, seed=3)
    networks = [lambda x, t, w=w: x * w + t[:, None, None, None] / 1000 for w in weights]
    loss = vsd_loss(x0, *networks, t=t, noise=noise)
    loss.backward()
    gradients = []
    for row in range(2):
        a = ALPHAS_CUMPROD[t[row]]
        z, e = x0.detach()[row].double(), noise[row].double()
        x_t = a.sqrt() * z + (1 - a).sqrt() * e
        guesses = [(x_t - (1 - a).sqrt() * (x_t * w[0].double() + t[row] / 1000)) / a.sqrt() for w in weights]
        gradients.append((guesses[0] - guesses[1]) / (z - guesses[1]).abs().mean())
    expected = torch.stack(gradients)
    torch.testing.assert_close(loss.double(), expected.square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(x0.grad.double(), 2 * expected / expected.numel(), rtol=1e-4, atol=1e-7)


def test_the_regulariser_learns_to_denoise_what_the_generator_makes_and_touches_nothing_else() -> None:
    with smaller_tiny():
        model = build_model(CONFIG, 2)
    stage = build_stage(model, train_config())
    terms = stage(batch(), update=0)
    assert terms["vsd"] == 0, "both start as the base, and the prompts are equal"
    critic = stage.critic
    t, noise = critic.draws("regulariser", 0, 1000)
    x0 = critic.latents.detach()
    with torch.no_grad():
        eps = model.unet(add_noise(x0, noise, t), t, model.prompt.expand(2, -1, -1)).sample
    loss = critic.loss()
    torch.testing.assert_close(loss, (eps - noise).square().mean())
    loss.backward()
    assert all(p.grad is None for p in stage.trained.parameters())
    assert all(p.grad is not None for p in critic.trained.parameters())
    for parameter in critic.trained.parameters():  # A learns once B is not zero
        parameter.data += 0.01
    terms = stage(batch(), update=0)
    assert terms["vsd"] > 0
    terms["loss"].backward()
    assert all(p.grad is not None for p in stage.trained.parameters())
    assert all(p.grad is None for network in (model.unet, model.vae) for p in network.parameters())
    total = terms["reconstruction"] + terms["perceptual"] + terms["vsd"]
    torch.testing.assert_close(terms["loss"], total)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        with smaller_tiny():
            model = build_model(CONFIG, 2)
        runtime = {"micro_batch_size": 2, "activation_checkpointing": checkpointing}
        stage = build_stage(model, train_config(runtime=runtime))
        model.generator.train(), model.condition_encoder.train(), stage.critic.model.generator.train()
        terms = stage(batch(), update=0)
        stage.critic.loss().backward()
        terms["loss"].backward()
        modules = (stage.trained, stage.critic.trained)
        gradients.append([p.grad for module in modules for p in module.parameters()])
    assert len(gradients[0]) > 100
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_only_loras_are_trained_stored_and_told_apart(model: OneStepModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.adapter.parameters(), model.adapter.parameters(), strict=True))
    assert not any("lora" in name for part in ("unet", "vae") for name in getattr(again, part).state_dict())
    bytes_of = {part: sum(f.stat().st_size for f in (tmp_path / "model" / part).iterdir()) for part in ("lora", "unet")}
    assert bytes_of["lora"] < bytes_of["unet"]
    lr = photo(8, 8)
    runs = [
        next(restore_runs(one, lr, (32, 32), SamplingConfig(), seed=0, key="a", runs=[0]))
        for one in (model, again, model.merged())
    ]
    assert np.array_equal(runs[0], runs[1])
    assert np.abs(runs[0].astype(int) - runs[2]).max() <= 1
    save_model(model.merged(), tmp_path / "merged")
    assert load_model(tmp_path / "merged").adapter is None
    assert not (tmp_path / "merged" / "lora").exists()


@torch.no_grad()
def test_all_that_shares_weights_is_cast_together_and_merged_loras_do_not_train() -> None:
    model, x, t = learned(), draw(2, 4, 8, 8), torch.tensor([5, 999])
    critic = build_stage(model, train_config()).critic
    exact = [one.denoiser(x)(x, t) for one in (model, critic.model)]
    model.to(dtype=torch.bfloat16)
    critic.trained.float()
    assert {p.dtype for p in model.generator.parameters()} == {torch.bfloat16}
    for one, expected in zip((model, critic.model), exact, strict=True):
        assert 0 < (one.denoiser(x)(x, t) - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(ModelError, match="nothing is left to train"):
        build_stage(model.merged(), train_config())


@torch.no_grad()
def test_bands_encode_with_the_loras(model: OneStepModel) -> None:
    image = draw(1, 3, 64, 64).sigmoid()
    whole = model.encode_condition(image)
    for found, expected in zip(encode_in_bands(model.condition_encoder, image, 2**16), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (whole[0] - model.encode_moments(image)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"inputs": "latents"}, "inputs"),
        ({"stage": 2}, "stages 1"),
        ({"num_steps": 4}, "num_steps"),
        ({"decoder_loss": {**LOSS, "gan_weight": 0.1}}, "takes the GAN term's place"),
        ({"decoder_loss": {**LOSS, "adaptive": False}}, "leave decoder_loss.adaptive out"),
        ({"vsd": None}, "adaptive: false"),
        ({"vsd": {"first_timestep": 990}}, "is above"),
        ({"model": {"family": "v2"}}, "vsd|decoder_loss"),
        ({"validation": {"data": ["d"], "sampling": {"num_steps": 4}}}, "num_steps"),
    ],
)
def test_what_has_no_effect_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        train_config(**changes)


def test_a_gan_term_takes_the_place_of_distillation() -> None:
    loss = LOSS | {"adaptive": False, "gan_weight": 0.1, "gan_start_update": 0, "discriminator_width": 8}
    with smaller_tiny():
        stage = build_stage(build_model(CONFIG, 2), train_config(vsd=None, decoder_loss=loss))
    terms = stage(batch(), update=0)
    assert "gan" in terms
    assert "vsd" not in terms
    assert stage.critic.name == "discriminator"


def test_a_prompt_that_is_not_cached_is_refused_before_training() -> None:
    with smaller_tiny(), pytest.raises(ModelError, match="caches no embedding of the prompt 'ugly'"):
        build_stage(build_model(CONFIG, 2), train_config(vsd={"negative_prompt": "ugly"}))


def test_a_step_is_estimated_without_memory() -> None:
    cost = step_cost(train_config(vsd={"negative_prompt": "a text that only a converted model caches"}))
    assert cost.num_trained == sum(p.numel() for p in build_model(CONFIG, 0).adapter.parameters())
    assert cost.flops_per_sample > 0


def published(model: OneStepModel, base: Path, path: Path) -> dict[str, Any]:
    """A file in the layout of osediff.pkl, of the LoRAs of `model`; its base is written to `base`."""
    convert_from = base.with_name("v2")
    with smaller_tiny():
        source = build_model(ModelConfig(family="v2"), 0)
    source.unet, source.vae, source.prompts = model.unet, model.vae, model.prompts
    save_model(source, convert_from)
    convert_from.rename(base)
    targets = model.adapter.config.targets
    state = model.adapter.state_dict()
    content: dict[str, Any] = {"rank_unet": 4, "rank_vae": 4}
    for part in ("unet", "vae"):
        for name, layers in targets[part].items():
            content[f"{part}_lora_{name.removeprefix('default_')}_modules"] = list(layers)
        content[f"state_dict_{part}"] = {
            name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")
        }
    torch.save(content, path)
    return content


def test_the_published_file_is_converted_strictly(model: OneStepModel, tmp_path: Path) -> None:
    content = published(model, tmp_path / "base", tmp_path / "osediff.pkl")
    unet, vae = content["state_dict_unet"], content["state_dict_vae"]
    assert {"conv_in.base_layer.weight", "conv_in.lora_A.default_encoder.weight"} < unet.keys()
    assert all("lora" in name or "conv_in" in name for name in unet)
    assert all("lora" in name for name in vae)
    convert_onestep(tmp_path / "osediff.pkl", tmp_path / "base", tmp_path / "out")
    found = load_model(tmp_path / "out")
    assert found.config.family == "onestep"
    lr = photo(8, 8)
    ours, theirs = (
        next(restore_runs(one, lr, (32, 32), SamplingConfig(), seed=0, key="a", runs=[0])) for one in (found, model)
    )
    assert np.array_equal(ours, theirs)

    def broken(match: str, **changes: Any) -> None:
        torch.save(content | changes, tmp_path / "broken.pkl")
        with pytest.raises(ModelError, match=match):
            convert_onestep(tmp_path / "broken.pkl", tmp_path / "base", tmp_path / "no")
        assert not (tmp_path / "no").exists()

    broken("is missing", state_dict_vae=dict(list(vae.items())[1:]))
    broken("has no place", state_dict_unet=unet | {"conv_in.lora_A.other.weight": torch.zeros(1)})
    broken("has shape", rank_unet=8)
    broken("`rank_vae` is missing or no int", rank_vae="4")
    broken("which the base does not have", unet_lora_others_modules=["mid_block.nothing"])
    torch.save(nn.Linear(1, 1), tmp_path / "broken.pkl")
    with pytest.raises(ModelError, match="not a complete checkpoint of tensors"):
        convert_onestep(tmp_path / "broken.pkl", tmp_path / "base", tmp_path / "no")


def test_a_base_becomes_a_start(model: OneStepModel, tmp_path: Path) -> None:
    published(model, tmp_path / "base", tmp_path / "osediff.pkl")
    convert_base(tmp_path / "base", "onestep", tmp_path / "out")
    start = load_model(tmp_path / "out")
    assert isinstance(start.adapter, OneStepAdapter)
    assert torch.equal(start.adapter.unet.conv_in.base_layer.weight, model.unet.conv_in.weight)
    assert not any(p.any() for name, p in start.adapter.named_parameters() if ".lora_B." in name)
