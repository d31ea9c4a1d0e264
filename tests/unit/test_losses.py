"""Losses of both stages: options, precision and stage 2's latents; the recorded values are in tests/golden."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infra import noise_for
from infra.errors import ConfigError
from tests.training_runs import train_config
from training import discriminator_loss, eps_loss, generator_loss, stage1_loss_v1, stage1_loss_v2
from training.method import METHODS
from training.sampling import add_noise, sample_ccsr_v1, sample_ccsr_v2

KEYS = [("a",), ("b",)]
SHAPE = (2, 4, 6, 6)
FRACTIONS = {"t_max": 0.6667, "t_min": 0.3333}


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return noise_for(seed, KEYS, "cpu", torch.float32)(shape)


def denoise(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x + torch.sin(t.float() / 1000).view(-1, 1, 1, 1)


def stage1_inputs() -> dict[str, Tensor]:
    return {"t": torch.tensor([3, 660]), "noise_t": normal(1), "noise_T": normal(2), "noise_tmax": normal(3)}


def image_losses(decoded: Tensor, target: Tensor, **changes: object) -> dict[str, Tensor]:
    options = {
        "perceptual": None,
        "discriminator": None,
        "last_layer": None,
        "gan_weight": 0.0,
        "adaptive": False,
        "divide_by_batch": False,
    }
    return generator_loss(decoded, target, **(options | changes))


def test_a_perfect_denoiser_has_no_loss() -> None:
    noise = normal(1)
    assert float(eps_loss(lambda x, t: noise, normal(0), t=torch.tensor([0, 999]), noise=noise)) == 0


def test_loss_is_the_sum_of_its_terms() -> None:
    for loss, names in (
        (stage1_loss_v1, {"l_diff", "l_T", "l_tmax", "l_eps_tmax"}),
        (stage1_loss_v2, {"l_diff", "l_T", "l_tmax"}),
    ):
        terms = loss(denoise, normal(0), **stage1_inputs())
        assert set(terms) == names | {"loss"}
        assert float(terms["loss"]) == pytest.approx(sum(float(terms[name]) for name in names), rel=1e-6)


@pytest.mark.parametrize("loss", [stage1_loss_v1, stage1_loss_v2])
def test_t_and_T_in_one_pass_are_the_same_loss(loss: Any) -> None:
    calls: list[list[int]] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t.tolist())
        return denoise(x, t)

    joined = loss(counted, normal(0), **stage1_inputs(), join_passes=True)
    assert calls == [[3, 660, 999, 999], [667, 667]]
    assert joined == loss(denoise, normal(0), **stage1_inputs())


def test_stage1_visits_t_then_T_then_tmax() -> None:
    visited = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        visited.append(t.tolist())
        return denoise(x, t)

    stage1_loss_v2(watched, normal(0), **stage1_inputs(), T=900, t_max=500)
    assert visited == [[3, 660], [900, 900], [500, 500]]


def test_stage1_in_half_precision_keeps_float32_losses() -> None:
    half = stage1_loss_v1(lambda x, t: denoise(x, t).half(), normal(0).half(), **stage1_inputs())
    full = stage1_loss_v1(lambda x, t: denoise(x, t).half().float(), normal(0).half().float(), **stage1_inputs())
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, full[name])


def test_one_step_residual_at_T_1() -> None:
    z, inputs = normal(0), stage1_inputs()
    x_T = add_noise(z, inputs["noise_T"], torch.tensor([1, 1]))
    terms = stage1_loss_v2(lambda x, t: x_T - z if int(t[0]) == 1 else denoise(x, t), z, **inputs, T=1)
    assert float(terms["l_T"]) == pytest.approx(0, abs=1e-12)


def stage2_latents(family: str, z_hr: Tensor, z_lr: Tensor, **chain: Any) -> Tensor:
    config = train_config("set", "out", stage=2, num_updates=1, model={"family": family}, **FRACTIONS, **chain)
    return METHODS[family].stage2_latents(denoise, z_hr, z_lr, noise_for(5, KEYS, "cpu", torch.float32), config)


def test_v1s_stage2_reuses_its_first_draw() -> None:
    z_hr = normal(0)
    ours = stage2_latents("v1", z_hr, normal(1), num_steps=45)
    noise = noise_for(5, KEYS, "cpu", torch.float32)
    first = noise(SHAPE)
    rest = [first, *(noise(SHAPE) for _ in range(14))]
    x_T = add_noise(z_hr, first, torch.tensor([999, 999]))
    expected = sample_ccsr_v1(denoise, x_T, num_steps=45, noise=lambda shape: rest.pop(0), **FRACTIONS)
    assert torch.equal(ours, expected)
    assert rest == []


@pytest.mark.parametrize("start_from", ["hr", "lr"])
@pytest.mark.parametrize("num_steps", [1, 6])
def test_v2s_stage2_is_the_sampler(num_steps: int, start_from: str) -> None:
    z_hr, z_lr = normal(0), normal(1)
    ours = stage2_latents("v2", z_hr, z_lr, num_steps=num_steps, start_from=start_from)
    noise = noise_for(5, KEYS, "cpu", torch.float32)
    start = z_hr if start_from == "hr" else z_lr
    assert torch.equal(ours, sample_ccsr_v2(denoise, start, num_steps=num_steps, start="lr", noise=noise, **FRACTIONS))


def test_v2_reconstruction_is_the_squared_error() -> None:
    decoded, target = normal(0), normal(1)
    terms = image_losses(
        decoded,
        target,
        reconstruction="l2",
        perceptual=lambda a, b: (a - b).abs().mean(),
        discriminator=lambda image: 3 * image,
        gan_weight=0.05,
    )
    squared, perceptual = (decoded - target).square().mean(), (decoded - target).abs().mean()
    expected = squared + perceptual - 0.05 * 3 * decoded.mean()
    torch.testing.assert_close(terms["loss"], expected)
    assert "nll" in terms


def test_the_batch_size_divides_nll_alone() -> None:
    decoded, target = normal(0), normal(1)
    options = {"discriminator": lambda image: image, "gan_weight": 0.5}
    whole, divided = (image_losses(decoded, target, divide_by_batch=flag, **options) for flag in (False, True))
    torch.testing.assert_close(divided["nll"], whole["nll"] / 2)
    assert torch.equal(divided["gan"], whole["gan"])
    torch.testing.assert_close(divided["loss"], divided["nll"] + 0.5 * divided["gan"])


def test_adaptive_weight_is_capped_and_detached() -> None:
    last_layer = torch.ones(1, requires_grad=True)
    decoded, target = last_layer * normal(0), normal(1)
    terms = image_losses(
        decoded, target, discriminator=lambda image: 1e-12 * image, last_layer=last_layer, gan_weight=0.5, adaptive=True
    )
    gradient = torch.autograd.grad(terms["nll"], last_layer, retain_graph=True)[0].norm()
    assert float(terms["gan_weight"]) == pytest.approx(0.5 * min(float(gradient) / 1e-4, 1e4), rel=1e-3)
    assert not terms["gan_weight"].requires_grad
    capped = image_losses(
        1e3 * decoded,
        target,
        discriminator=lambda image: 1e-12 * image,
        last_layer=last_layer,
        gan_weight=0.5,
        adaptive=True,
    )
    assert float(capped["gan_weight"]) == 0.5 * 1e4


def test_zero_gan_weight_does_not_run_the_discriminator() -> None:
    def never(image: Tensor) -> Tensor:
        raise AssertionError("called")

    terms = image_losses(normal(0), normal(1), discriminator=never)
    assert torch.equal(terms["loss"], terms["nll"])


def test_generator_loss_refuses() -> None:
    with pytest.raises(ConfigError, match="last layer"):
        image_losses(normal(0), normal(1), discriminator=lambda image: image, gan_weight=0.5, adaptive=True)
    with pytest.raises(ConfigError, match="unknown reconstruction"):
        image_losses(normal(0), normal(1), reconstruction="huber")


def test_discriminator_loss_is_the_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert float(discriminator_loss(real, fake)) == 0.5 * (0.25 + 0.75)
