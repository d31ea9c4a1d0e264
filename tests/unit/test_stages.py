"""Stage 2's module: which loss terms are on at an update, and both discriminators with their randomness."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import training.run.step.critics
import training.run.step.stages
from infra import noise_for
from infra.config import parse_config
from tests.small_networks import seeded_lpips, small_dino, smaller_tiny
from training.config import ModelConfig, SamplingConfig, TrainConfig
from training.data.batches import Batch
from training.models import CcsrModel, PatchDiscriminator, build_model
from training.restore.seeded_runs import restore_runs
from training.run.monitoring.meter import flop_counter
from training.run.step.stages import DecoderStage, build_stage

V2 = {
    "reconstruction": "l2",
    "perceptual": "lpips",
    "perceptual_start_update": 101,
    "discriminator": "dino",
    "gan_weight": 0.05,
    "gan_start_update": 101,
    "adaptive": False,
    "divide_by_batch": False,
}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training.run.step.critics, "load_dino", small_dino)
    monkeypatch.setattr(training.run.step.stages, "load_lpips", seeded_lpips)
    with smaller_tiny():
        yield


def stage(loss: dict[str, Any], family: str = "v2") -> DecoderStage:
    values = {
        "job": "train",
        "init_from": "random",
        "output": "out",
        "stage": 2,
        "data": ["data"],
        "model": {"preset": "tiny", "family": family},
        "crop_px": 32,
        "num_steps": 1 if family == "v2" else 6,
        "global_batch_size": 4,
        "num_updates": 1,
        "decoder_loss": loss,
    }
    if family == "v2":
        values["start_from"] = "lr"
    config = parse_config(values, TrainConfig, where="test")
    return DecoderStage(build_model(config.model, seed=3), config)


def batch() -> Batch:
    images = noise_for(0, [("a",), ("b",)], "cpu", torch.float32)((2, 3, 32, 32)).sigmoid()
    return Batch(["a", "b"], [0, 1], images, images.flip(-1))


def gradients(built: DecoderStage) -> dict[str, Tensor]:
    return {name: p.grad for name, p in built.critic.trained.named_parameters() if p.grad is not None}


def test_v2_switches_lpips_and_gan_on_after_update_100() -> None:
    built = stage(V2)
    for update, names in ((0, set()), (100, set()), (101, {"perceptual", "gan", "gan_weight"})):
        terms = built(batch(), update=update)
        assert set(terms) == {"reconstruction", "nll", "loss"} | names
        assert built.critic.loss() > 0  # always on
    expected = terms["reconstruction"] + terms["perceptual"] + 0.05 * terms["gan"]
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize("discriminator", ["dino", "patch"])
def test_each_loss_reaches_its_own_parameters_alone(discriminator: str) -> None:
    built = stage(V2 | {"discriminator": discriminator, "gan_start_update": 0, "perceptual_start_update": 0})
    built(batch(), update=0)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in built.trained.decoder.parameters())
    assert not gradients(built)
    assert "post_quant_conv" not in dict(built.trained.named_children())
    built.zero_grad()
    built.critic.loss().backward()
    assert set(gradients(built)) == set(dict(built.critic.trained.named_parameters()))
    assert all(p.grad is None for p in built.trained.parameters())
    if discriminator == "dino":
        frozen = [*built.critic.network.dino.parameters(), *built.critic.network.dinov2.parameters()]
        assert not any(p.requires_grad for p in frozen)
        assert not any("dino" in name for name in built.critic.trained.state_dict())


def test_views_depend_on_the_position_alone() -> None:
    """The same samples in one batch or in two see the same views."""

    def logits(rows: slice, positions: list[int]) -> Tensor:
        built, whole = stage(V2), batch()
        part = Batch(whole.keys[rows], positions, whole.hr[rows], whole.lr[rows])
        return built.critic.critic_logits(part)(2 * part.hr - 1, "real")

    together = logits(slice(0, 2), [0, 1])
    torch.testing.assert_close(logits(slice(1, 2), [1]), together[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(slice(1, 2), [7]), together[1:])


@pytest.mark.parametrize(("family", "perceptual"), [("v1", "encoder_features"), ("v1", "none"), ("v2", "lpips")])
def test_defaults_are_v1s_with_a_choice_of_the_perceptual_term(family: str, perceptual: str) -> None:
    built = stage({"perceptual": perceptual}, family)
    assert isinstance(built.critic.network, PatchDiscriminator)
    first, second = (built(batch(), update=update) for update in (0, 1))
    assert "gan" not in first
    assert "gan" in second
    assert ("perceptual" in first) == (perceptual != "none")
    torch.testing.assert_close(first["nll"], sum(first[n] for n in first if n in ("reconstruction", "perceptual")) / 2)
    assert ("post_quant_conv" in dict(built.trained.named_children())) == (family == "v1")


@pytest.mark.parametrize("number", [1, 2])
def test_activation_checkpointing_computes_more_for_the_same_gradients(number: int) -> None:
    results = []
    for on in (False, True):
        values = {
            "job": "train",
            "init_from": "random",
            "output": "out",
            "stage": number,
            "data": ["data"],
            "num_updates": 1,
        }
        values |= {"crop_px": 32, "global_batch_size": 2}
        values |= (
            {"num_steps": 6, "decoder_loss": {"perceptual": "none", "discriminator_width": 4}} if number == 2 else {}
        )
        values |= {"runtime": {"micro_batch_size": 2, "activation_checkpointing": on}}
        config = parse_config(values, TrainConfig, where="test")
        model = build_model(config.model, seed=3)
        torch.nn.init.constant_(model.controlnet.controlnet_mid_block.weight, 0.01)  # a fresh one's outputs are zero
        built = build_stage(model, config)
        with flop_counter() as counter:
            loss = (built(batch(), update=1) if number == 2 else built(batch(), update=0))["loss"]
            loss.backward()
        gradients = {name: p.grad for name, p in built.trained.named_parameters()}
        results.append((counter.get_total_flops(), loss, gradients))
    (flops, loss, gradients), (more_flops, same_loss, same_gradients) = results
    assert more_flops > 1.1 * flops
    assert torch.equal(loss, same_loss)
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 20
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_the_condition_comes_from_the_condition_encoder() -> None:
    built = stage({}, "v1")
    model: CcsrModel = built.model
    model.condition_encoder = build_model(ModelConfig(), seed=9).vae
    z_hr, z_lr = built.latents_of(batch())
    assert torch.equal(z_lr, model.encode_condition(batch().lr)[0])
    assert not torch.allclose(z_lr, model.encode_moments(batch().lr)[0])
    model.condition_encoder = None
    assert torch.equal(built.latents_of(batch())[0], z_hr)


def test_a_restoration_takes_the_condition_encoder() -> None:
    model = build_model(ModelConfig(family="v1"), seed=3)
    torch.nn.init.normal_(model.controlnet.controlnet_mid_block.weight)
    torch.nn.init.normal_(model.controlnet.controlnet_cond_embedding.weight)
    lr = (255 * noise_for(0, [("lr",)], "cpu", torch.float32)((1, 16, 16, 3)).sigmoid()).byte()[0].numpy()

    def restored() -> Tensor:
        images = restore_runs(model, lr, (32, 32), SamplingConfig(num_steps=6), seed=0, key="a", runs=[0])
        return torch.from_numpy(next(images))

    own = restored()
    model.condition_encoder = model.vae
    assert torch.equal(restored(), own)
    model.condition_encoder = build_model(ModelConfig(), seed=9).vae
    assert not torch.equal(restored(), own)
