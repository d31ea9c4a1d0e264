"""Stage-1 and stage-2 losses against numbers recorded from the published CCSR code, v1 and v2.

Recordings: data/ccsr (published code, CPU, float32; LPIPS replaced by the mean squared error per image).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from training import discriminator_loss, eps_loss, generator_loss, stage1_loss_v1, stage1_loss_v2
from training.models import PatchDiscriminator

DATA = Path(__file__).parent / "data" / "ccsr"


def load(name: str) -> dict[str, Tensor]:
    with np.load(DATA / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays if arrays[key].dtype.kind in "fi"}


def analytic(a: Tensor, z: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The recordings' denoiser: a x + 0.1 z + sin(t / 1000); a loss's gradient by `a` shows what is not detached."""
    return lambda x, t: a * x + 0.1 * z + torch.sin(t.float() / 1000).view(-1, 1, 1, 1)


def assert_relative(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    assert (actual.detach() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tag", ["t0", "t_mid", "t_658", "t_666", "t_667", "t_999"])
def test_eps_loss(tag: str) -> None:
    record = load("v1_stage1_loss.npz")
    a = torch.tensor(0.3, requires_grad=True)
    denoise = analytic(a, record["cond"])
    loss = eps_loss(denoise, record["x_start"], t=record[f"opt0_{tag}_t"], noise=record[f"opt0_{tag}_noise"])
    loss.backward()
    assert_relative(loss, record[f"opt0_{tag}_loss"])
    assert_relative(a.grad, record[f"opt0_{tag}_dloss_da"])


def test_stage1_loss_v1() -> None:
    record = load("v1_stage1_loss.npz")
    a = torch.tensor(0.3, requires_grad=True)
    terms = stage1_loss_v1(
        analytic(a, record["cond"]),
        record["x_start"],
        t=record["opt0_t_mid_t"],
        noise_t=record["opt0_t_mid_noise"],
        noise_T=record["opt1_noise_T"],
        noise_tmax=record["opt1_noise_tmax"],
    )
    terms["loss"].backward()
    assert_relative(terms["l_diff"], record["opt0_t_mid_loss"])
    assert_relative(terms["l_T"], record["opt1_loss_x0"])
    assert_relative(terms["l_tmax"], record["opt1_loss_x0_from_tao"])
    assert_relative(terms["l_eps_tmax"], record["opt1_loss_noise_from_tao"])
    assert_relative(terms["loss"], record["opt0_t_mid_loss"] + record["opt1_loss"])
    assert_relative(a.grad, record["opt0_t_mid_dloss_da"] + record["opt1_dloss_da"])


@pytest.mark.parametrize("tag", ["startlr0", "startlr1"])
def test_stage1_loss_v2(tag: str) -> None:
    record = load("v2_stage1_loss.npz")
    a = torch.tensor(0.3, requires_grad=True)
    terms = stage1_loss_v2(
        analytic(a, record["latents_lq"]),
        record["latents_gt"],
        t=record[f"{tag}_t_drawn"],
        noise_t=record[f"{tag}_noise_diff"],
        noise_T=record[f"{tag}_noise_T"],
        noise_tmax=record[f"{tag}_noise_tmax"],
        x_start=record["latents_lq"] if tag == "startlr1" else None,
    )
    terms["loss"].backward()
    assert_relative(terms["l_diff"], record[f"{tag}_loss_ori"])
    assert_relative(terms["l_T"], record[f"{tag}_loss_x0"])
    assert_relative(terms["l_tmax"], record[f"{tag}_loss_x0_from_tao"])
    assert_relative(terms["loss"], record[f"{tag}_loss"])
    assert_relative(a.grad, record[f"{tag}_dloss_da"])


def recorded_discriminator() -> Callable[[Tensor], Tensor]:
    """The recording's, computed in float64: its BatchNorms enlarge the last bits of a CPU's float32 convolutions to
    2e-5, while the recording is within 5e-6 of the exact value."""
    discriminator = PatchDiscriminator()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(discriminator.named_parameters()):
            wave = torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + i).view(parameter.shape)
            if parameter.dim() > 1:
                wave = wave * (1.5 / (parameter.numel() / parameter.shape[0])) ** 0.5
            else:
                wave = 1 + 0.1 * wave if name.endswith("weight") else 0.02 * wave
            parameter.copy_(wave)
    return lambda image: discriminator.double()(image.double()).float()


@pytest.mark.parametrize(("step", "gan_weight"), [(0, 0.0), (1, 0.5)])
def test_generator_loss_v1(step: int, gan_weight: float) -> None:
    """The published GAN term is off at step 0."""
    record = load("v1_stage2_loss.npz")
    last_layer = record["last_layer"].clone().requires_grad_()
    decoded = torch.nn.functional.conv2d(record["feat"], last_layer, padding=1)
    terms = generator_loss(
        decoded,
        record["gt"],
        perceptual=lambda a, b: (a - b).square().mean(dim=(1, 2, 3), keepdim=True),
        discriminator=recorded_discriminator(),
        last_layer=last_layer,
        gan_weight=gan_weight,
        adaptive=True,
        divide_by_batch=True,
    )
    terms["loss"].backward()
    recorded = {key.removeprefix(f"gen_gs{step}_"): value for key, value in record.items()}
    assert_relative(terms["reconstruction"] + terms["perceptual"], recorded["rec_loss"])
    assert_relative(terms["nll"], recorded["nll_loss"])
    assert_relative(terms["loss"], recorded["loss"])
    assert_relative(last_layer.grad, recorded["grad_last_layer"])
    if gan_weight:
        assert_relative(terms["gan"], recorded["g_loss"])
        assert_relative(terms["gan_weight"], recorded["d_weight"])


def test_discriminator_loss() -> None:
    record = load("v1_stage2_loss.npz")
    discriminator = recorded_discriminator()
    real, fake = discriminator(record["gt"]), discriminator(record["recon"])
    assert_relative(real, record["logits_real"])
    assert_relative(fake, record["logits_fake"])
    assert_relative(discriminator_loss(real, fake), record["disc_gs1_loss"])
