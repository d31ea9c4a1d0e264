"""StableSR: parameters of the full size, hooks that leave nothing behind, what learns, and the sampling preset."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from infra import ConfigError, noise_for
from infra.config import parse_config
from training.config import ModelConfig, SamplingConfig, TrainConfig
from training.data.batches import Batch
from training.losses import eps_loss
from training.models import (
    FeatureWrapping,
    StableSrModel,
    build_model,
    load_model,
    save_model,
)
from training.models.stablesr import Sft, sft_places
from training.models.wrapping import Fusion
from training.restore.seeded_runs import prepare_image, restore_batch, restore_runs
from training.run.cost.parameters import parameter_table
from training.run.monitoring.meter import flop_counter
from training.run.step.stages import Stage, build_stage

CONFIG = ModelConfig(family="stablesr")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return noise_for(seed, [("draw",)] * shape[0], "cpu", torch.float32)(shape)


@pytest.fixture
def model() -> StableSrModel:
    built = build_model(CONFIG, seed=1)
    built.prepare_stage2(seed=2)
    return built


def test_full_size_parameters_are_the_published_ones() -> None:
    rows = {row.name: row.parameters for row in parameter_table("sd21", "stablesr", stage=2)}
    assert rows["time-aware encoder"] == 52_494_080
    assert rows["feature modulation"] == 53_020_160
    assert rows["time-aware encoder"] + rows["feature modulation"] == 105_514_240
    assert rows["feature wrapping"] == 44_393_728
    assert rows["UNet"] == 865_910_724
    with torch.device("meta"):
        wrapping = FeatureWrapping()
    levels = {level: sum(p.numel() for p in fusion.parameters()) for level, fusion in wrapping.fusions.items()}
    assert levels == {"1": 10_496_000, "2": 33_897_728}
    places = list(sft_places((320, 640, 1280, 1280), 2))
    assert len(places) == 22
    assert [sum(width == channels for _, _, width in places) for channels in (320, 640, 1280)] == [5, 5, 12]


@torch.no_grad()
def test_what_starts_at_zero_and_what_does_not(model: StableSrModel) -> None:
    """As published: residual branches of the encoder are zero, the modulation is not the identity."""
    zero = {name for name, p in model.adapter.encoder.named_parameters() if not p.any() and name.endswith("weight")}
    assert zero
    assert all(".conv2." in name or ".to_out.0." in name for name in zero)
    assert all(sft.scale.weight.any() for sft in model.adapter.sft.values())
    x, t = draw(1, 4, 8, 8), torch.tensor([500])
    plain = model.unet(x, t, model.prompt).sample
    assert (model.denoiser(draw(1, 4, 8, 8, seed=1))(x, t) - plain).abs().max() > 0.01


@torch.no_grad()
def test_detached_hooks_leave_the_unet_bit_exact(model: StableSrModel) -> None:
    x, t, z = draw(2, 4, 8, 12), torch.tensor([3, 900]), draw(2, 4, 8, 12, seed=1)
    before = model.unet(x, t, model.prompt.expand(2, -1, -1)).sample
    keys = list(model.unet.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"):
        _fail_inside(model, model.adapter(z, t))
    attached = model.denoiser(z)(x, t)
    assert not torch.allclose(attached, before)
    assert torch.equal(model.unet(x, t, model.prompt.expand(2, -1, -1)).sample, before)
    assert list(model.unet.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.unet.modules())
    assert not torch.allclose(model.denoiser(z)(x, t - 2), attached)  # the features depend on the timestep


@pytest.mark.parametrize("kind", ["modulation", "fusion"])
def test_a_frozen_branch_in_channels_last_layout_learns(kind: str) -> None:
    """As pixels come from the ingest; torch's own backward of that GroupNorm ends the process."""
    module = Sft(32, 32, 32) if kind == "modulation" else Fusion(32, 8, 4)
    h, feature = draw(2, 32, 16, 16), draw(2, 32, 16, 16, seed=1)
    weight = () if kind == "modulation" else (0.5,)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        module.zero_grad()
        module(h.to(memory_format=layout), feature.to(memory_format=layout), *weight).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_tile_has_features_of_its_own_and_other_dtypes_work(model: StableSrModel) -> None:
    x, z, t = draw(2, 4, 8, 8), draw(1, 4, 16, 24, seed=1), torch.tensor([400, 700])
    at_tile = model.denoiser(z)(x, t, (4, 8))
    assert torch.equal(at_tile, model.denoiser(z[..., 4:12, 8:16])(x, t))
    lr = draw(2, 3, 32, 32, seed=2).sigmoid()
    decoded = model.decode(x, lr, 0.5)
    half = model.to(dtype=torch.bfloat16)
    for found, exact in ((half.denoiser(z)(x, t, (4, 8)), at_tile), (half.decode(x, lr, 0.5), decoded)):
        assert found.dtype == torch.float32
        assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()


def _fail_inside(model: StableSrModel, features: list[Tensor]) -> None:
    with model.adapter.attached(model.unet, features):
        raise RuntimeError("on purpose")


def stage(number: int, *, checkpointing: bool = False) -> Stage:
    values = {
        "job": "train",
        "init_from": "random",
        "output": "out",
        "stage": number,
        "data": ["data"],
        "num_updates": 1,
    }
    values |= {"crop_px": 32, "global_batch_size": 2, "model": {"family": "stablesr"}}
    loss = {"perceptual": "none", "adaptive": False, "discriminator_start_update": 1}
    values |= {"num_steps": 3, "decoder_loss": loss} if number == 2 else {}
    values |= {"runtime": {"micro_batch_size": 2, "activation_checkpointing": checkpointing}}
    config = parse_config(values, TrainConfig, where="test")
    model = build_model(config.model, seed=3)
    model.prepare_stage2(seed=4)
    with torch.no_grad():  # else half of the encoder learns nothing in the first update
        for parameter in model.adapter.encoder.parameters():
            parameter.add_(0.01)
    return build_stage(model, config)


def batch() -> Batch:
    images = draw(2, 32, 32, 3).sigmoid().permute(0, 3, 1, 2)  # the layout that the ingest gives
    return Batch(["a", "b"], [0, 1], images, images.flip(-1))


@pytest.mark.parametrize("number", [1, 2])
def test_only_the_adapter_and_then_only_the_wrapping_learns(number: int) -> None:
    built = stage(number)
    terms = built(batch(), update=0) if number == 1 else built(batch(), update=1)
    assert set(terms) >= ({"l_diff", "loss"} if number == 1 else {"reconstruction", "gan", "loss"})
    terms["loss"].backward()
    learning = {
        name for name, network in built.model.networks.items() if any(p.requires_grad for p in network.parameters())
    }
    assert learning == {"adapter" if number == 1 else "wrapping"}
    assert all(p.grad is not None and p.grad.any() for p in built.trained.parameters())
    for name, network in built.model.networks.items():
        assert name in learning or all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("number", [1, 2])
def test_activation_checkpointing_computes_more_for_the_same_gradients(number: int) -> None:
    """The hooks are gone when backward computes the blocks again, and have to be there once more."""
    results = []
    for on in (False, True):
        built = stage(number, checkpointing=on)
        with flop_counter() as counter:
            loss = (built(batch(), update=0) if number == 1 else built(batch(), update=1))["loss"]
            assert not any(
                module._forward_hooks for network in built.model.networks.values() for module in network.modules()
            )
            loss.backward()
        results.append(
            (counter.get_total_flops(), loss, {name: p.grad for name, p in built.trained.named_parameters()})
        )
    (flops, loss, gradients), (more_flops, same_loss, same_gradients) = results
    assert more_flops > 1.1 * flops
    assert torch.equal(loss, same_loss)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-6, atol=1e-8)


def test_two_forward_passes_before_one_checkpointed_backward(model: StableSrModel) -> None:
    """Each pass is computed again with its own features."""
    x, noise, t = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1), torch.tensor([10, 800])
    model.unet.requires_grad_(False)

    def gradients() -> dict[str, Tensor]:
        model.adapter.zero_grad()
        losses = [eps_loss(model.denoiser(draw(2, 4, 8, 8, seed=seed)), x, t=t, noise=noise) for seed in (2, 3)]
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.adapter.named_parameters() if p.grad is not None}

    plain = gradients()
    model.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain, rtol=1e-5, atol=1e-8)


def test_a_checkpointed_backward_inside_the_block_modulates_once(model: StableSrModel) -> None:
    x, t = draw(2, 4, 8, 8), torch.tensor([10, 800])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        model.adapter.zero_grad()
        with model.adapter.attached(model.unet, model.adapter(x, t)):
            model.unet(x, t, model.prompt.expand(2, -1, -1)).sample.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.adapter.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)


def test_the_discriminator_starts_to_learn_when_told() -> None:
    built = stage(2)
    built.critic.network.train()
    for update, learns in ((0, False), (1, True)):
        built(batch(), update=update)
        built.zero_grad()
        loss = built.critic.loss()
        loss.backward()
        assert bool(loss > 0) == learns
        assert any(p.grad.any() for p in built.critic.trained.parameters()) == learns
        built.critic.trained.zero_grad()


def test_stage_2_takes_the_stored_sample() -> None:
    built = stage(2)
    first = built(batch(), update=0)["loss"]
    stored = Batch(["a", "b"], [0, 1], batch().hr, batch().lr, {"sampled": built.sampled_latents(batch())})
    assert torch.equal(built(stored, update=0)["loss"], first)
    stored.moments["sampled"] = stored.moments["sampled"] + 0.1
    assert not torch.equal(built(stored, update=0)["loss"], first)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"stage": 0}, "stablesr has the stages 1, 2"), ({"stage": 2, "decoder_loss": {}}, "GAN weight cannot adapt")],
)
def test_what_stablesr_cannot_do_is_told(change: dict, message: str) -> None:
    values = {"job": "train", "init_from": "random", "output": "out", "stage": 1, "data": ["data"], "num_updates": 1}
    with pytest.raises(ConfigError, match=message):
        parse_config(values | {"model": {"family": "stablesr"}} | change, TrainConfig, where="test")


def test_directory_round_trip_without_and_with_wrapping(model: StableSrModel, tmp_path) -> None:
    save_model(model, tmp_path / "two")
    model.wrapping = None
    save_model(model, tmp_path / "one")
    one, two = (load_model(tmp_path / name) for name in ("one", "two"))
    assert one.wrapping is None
    assert two.config == CONFIG
    assert one.encoder_id() == two.encoder_id()
    for part, network in one.networks.items():
        own = two.networks[part].state_dict()
        assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())


def test_preset_is_the_papers_stablesr_s200() -> None:
    preset = parse_config({"sampling": "stablesr_s200"}, _Holder, where="test").sampling
    assert (preset.num_steps, preset.start, preset.wrapping) == (200, "noise", 0.5)
    assert (preset.color_fix, preset.enlargement, preset.sampler) == ("adain", "bilinear", "uniform")
    with pytest.raises(ConfigError, match="no sampling preset is called 'stablesr_s20'"):
        parse_config({"sampling": "stablesr_s20"}, _Holder, where="test")


@pytest.fixture
def lr() -> Tensor:
    return (255 * draw(1, 14, 10, 3).sigmoid()).byte()[0].numpy()


def restored(model: StableSrModel, lr, **changes) -> Iterator[Tensor]:
    sampling = SamplingConfig.model_validate({"num_steps": 3, "color_fix": "none"} | changes)
    images = restore_runs(model, lr, (56, 40), sampling, seed=5, key="a", runs=[0, 1])
    return [torch.from_numpy(image.copy()).float() for image in images]


def test_a_restoration_wraps_starts_and_tiles_as_asked(model: StableSrModel, lr) -> None:
    plain, other_run = restored(model, lr, wrapping=0)
    assert plain.shape == (56, 40, 3)
    assert not torch.equal(plain, other_run)
    wrapped = restored(model, lr, wrapping=1)
    assert not torch.equal(wrapped[0], plain)
    assert not torch.equal(restored(model, lr, wrapping=0, start="noise")[0], plain)
    wrapping, model.wrapping = model.wrapping, None
    assert torch.equal(restored(model, lr, wrapping=1)[0], plain)
    model.wrapping = wrapping
    # One row at a time is what the VAE's budget allows here; the features are then of the same image.
    image = prepare_image(model, lr, (56, 40), SamplingConfig(num_steps=3), key="a")
    sampling = SamplingConfig(num_steps=3, color_fix="none", wrapping=1)
    rows = list(restore_batch(model, [(image, 0), (image, 1)], sampling, seed=5, vae_bytes=0))
    for row, expected in zip(rows, wrapped, strict=True):
        assert (torch.from_numpy(row.copy()).float() - expected).abs().max() <= 1


class _Holder(SamplingConfig.__base__):
    sampling: SamplingConfig
