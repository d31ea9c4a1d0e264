"""Schedules, samplers, tiles and colour fix against numbers recorded from the published CCSR and StableSR code.

Recordings: data/ccsr and data/stablesr, subsets of the project's golden arrays (published code, CPU, float32).
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.errors import ConfigError
from training.sampling import (
    ccsr_v1_timesteps,
    ccsr_v2_timesteps,
    color_fix,
    guided,
    sample_ccsr_v1,
    sample_ccsr_v2,
    sample_uniform,
    tile_grid,
    tile_weights,
    tiled,
)
from training.sampling.schedules import ALPHAS_CUMPROD, posterior, respaced_grid

DATA = Path(__file__).parent / "data"
V1_FRACTIONS = {
    "23_13": (0.6667, 0.3333),
    "12_13": (0.5, 0.3333),
    "23_12": (0.6667, 0.5),
    "45_13": (0.8, 0.3333),
    "23_15": (0.6667, 0.2),
}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as arrays:
        return dict(arrays)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def assert_close(actual: Tensor, expected: np.ndarray, relative: float = 1e-5) -> None:
    """Relative to the largest magnitude, as the recordings' tolerance is stated."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert np.abs(actual.numpy() - expected).max() <= relative * np.abs(expected).max()


class Replay:
    """Hands out recorded noise, one array a draw."""

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        self.left = list(arrays)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        noise = tensor(self.left.pop(0))
        assert noise.shape == tuple(shape)
        return noise


def analytic(condition: np.ndarray, embedding: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The recordings' denoiser: 0.3 x + 0.1 z + sin(t / 1000) + 0.05 e."""
    z = tensor(condition)
    return lambda x, t: 0.3 * x + 0.1 * z + torch.sin(t.float() / 1000).view(-1, 1, 1, 1) + 0.05 * embedding


def visited(record: dict[str, np.ndarray], prefix: str) -> list[tuple[int, str, list[int]]]:
    """(num_steps, rest of the name, timesteps) of every recorded loop."""
    rows = []
    for name in record:
        if name.startswith(prefix):
            num_steps, rest = name.removeprefix(prefix).split("_", 1)
            rows.append((int(num_steps), rest, record[name].tolist()))
    return rows


def test_respaced_grids() -> None:
    stable, v1 = load("stablesr/d_respace.npz"), load("ccsr/v1_schedule.npz")
    recorded = [stable[f"steps_{n}"] for n in (2, 4, 15, 45, 50, 200, 1000)]
    recorded += [v1[name] for name in v1 if name.startswith("space_timesteps_")]
    assert len(recorded) == 17
    for grid in recorded:
        assert respaced_grid(len(grid)) == grid.tolist()


def test_posterior_of_the_45_step_grid() -> None:
    v1 = load("ccsr/v1_schedule.npz")
    grid = v1["timesteps"]
    np.testing.assert_allclose(ALPHAS_CUMPROD[grid], v1["alphas_cumprod"], rtol=1e-12)
    ours = np.array([posterior(t, t_prev) for t_prev, t in pairwise(grid)])
    np.testing.assert_allclose(ours[:, 0], v1["posterior_mean_coef1"][1:], rtol=1e-9)
    np.testing.assert_allclose(ours[:, 1], v1["posterior_mean_coef2"][1:], rtol=1e-9)
    np.testing.assert_allclose(ours[:, 2] ** 2, v1["posterior_variance"][1:], rtol=1e-9)


def test_v1_timesteps_of_every_recorded_case() -> None:
    v1 = load("ccsr/v1_schedule.npz")
    rows = visited(v1, "visited_")
    assert len(rows) == 50
    for num_steps, tag, loop in rows:
        if loop:
            assert ccsr_v1_timesteps(num_steps, *V1_FRACTIONS[tag]) == [999, *loop]
        else:
            with pytest.raises(ConfigError, match="no timestep"):
                ccsr_v1_timesteps(num_steps, *V1_FRACTIONS[tag])


def test_v1_published_renoising_index() -> None:
    """The level to which x0 at 999 is noised, read off a denoiser that returns x0 = 0 and a constant noise."""
    v1 = load("ccsr/v1_schedule.npz")
    differing = 0
    for num_steps, tag, loop in visited(v1, "visited_"):
        if not loop:
            continue
        published = v1[f"space_timesteps_{num_steps}"][v1[f"tao_index_{num_steps}_{tag}"]]
        differing += published != loop[0]
        for flag, expected in ((False, loop[0]), (True, published)):
            assert noise_level_after_T(num_steps, *V1_FRACTIONS[tag], flag) == pytest.approx(
                float((1 - ALPHAS_CUMPROD[expected]).sqrt()), rel=1e-6
            )
    assert differing > 5


def noise_level_after_T(num_steps: int, t_max: float, t_min: float, published: bool) -> float:
    seen = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(x))
        return x / float((1 - ALPHAS_CUMPROD[t]).sqrt())

    sample_ccsr_v1(
        denoise,
        torch.zeros(1, 1, 1, 1),
        num_steps=num_steps,
        t_max=t_max,
        t_min=t_min,
        noise=torch.ones,
        published_renoise=published,
    )
    return seen[1]


def test_v2_timesteps_of_every_recorded_case() -> None:
    v2 = load("ccsr/v2_schedule.npz")
    rows = visited(v2, "visited_")
    assert len(rows) == 60
    for num_steps, rest, loop in rows:
        t_max, t_min = map(float, rest.split("_"))
        jump = [999] if t_max < 1 else []
        if num_steps == 1 and jump:
            assert ccsr_v2_timesteps(1, t_max, t_min) == [999]
        elif loop and num_steps > 1:
            assert ccsr_v2_timesteps(num_steps, t_max, t_min) == jump + loop
        else:
            with pytest.raises(ConfigError, match="no timestep"):
                ccsr_v2_timesteps(num_steps, t_max, t_min)


def test_v2_variances() -> None:
    v2 = load("ccsr/v2_schedule.npz")
    for num_steps in (2, 6, 15, 45, 50):
        timesteps = v2[f"timesteps_{num_steps}"].tolist()
        std = [posterior(t, t_prev)[2] for t, t_prev in pairwise(timesteps)]
        np.testing.assert_allclose(np.square(std), v2[f"var_{num_steps}"][:-1], rtol=1e-5)


def test_v1_sampler() -> None:
    record = load("ccsr/v1_sampler_analytic.npz")
    denoise, seen, visited_t = analytic(record["cond"]), [], []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        visited_t.append(int(t[0]))
        return denoise(x, t)

    noise = Replay([record["noise_tmax"], *record["noise_loop"]])
    x0 = sample_ccsr_v1(watched, tensor(record["x_T"]), num_steps=45, t_max=0.6667, t_min=0.3333, noise=noise)
    assert_close(x0, record["x0_final"])
    assert visited_t == record["denoiser_t"].tolist()
    for x, expected in zip(seen, [record["x_T"], record["x_tmax"], *record["loop_latents"][:-1]], strict=True):
        assert_close(x, expected)


@pytest.mark.parametrize("name", ["n1_lr_cfg1", "n6_lr_cfg1_t0.6667_0.5", "n6_lr_cfg4.5_t0.6667_0.5"])
def test_v2_pipeline(name: str) -> None:
    record = load(f"ccsr/v2_pipe_{name}.npz")
    cond, uncond = analytic(record["cond"], 1.0), analytic(record["cond"], -1.0)
    visited_t = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        visited_t.append(int(t[0]))
        return guided(cond, uncond, float(record["cfg"]))(x, t)

    def watched_first(x: Tensor, t: Tensor) -> Tensor:
        visited_t.append(int(t[0]))
        return uncond(x, t)

    x0 = sample_ccsr_v2(
        watched,
        tensor(record["cond"]),
        num_steps=int(record["n"]),
        t_max=float(record["t_max"]),
        t_min=float(record["t_min"]),
        start=str(record["start"]),
        noise=Replay(record[f"noise_{i:02d}"] for i in range(len(record["noise_kinds"]))),
        denoise_first=watched_first if record["cfg"] > 1 else None,
    )
    assert_close(x0, record["x0_final"])
    assert visited_t == record["denoiser_t"].tolist()


@pytest.mark.parametrize(("num_steps", "t_max", "start"), [(20, 0.6667, "noise"), (7, 1.0, "lr")])
def test_v2_to_the_end_against_diffusers(num_steps: int, t_max: float, start: str) -> None:
    """t_min = 0: the published result is the scheduler's last latent."""
    from diffusers import DDPMScheduler  # after training.models.library, if this process needs both

    record = load("ccsr/v1_sampler_analytic.npz")
    denoise, z_lr = analytic(record["cond"]), tensor(record["cond"])
    recorded_noise = [record["x_T"], record["noise_tmax"], *record["noise_loop"]]
    scheduler = DDPMScheduler(
        1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.set_timesteps(num_steps)

    noise = Replay(recorded_noise)
    x = noise(z_lr.shape)
    if start == "lr":
        x = scheduler.add_noise(z_lr, x, torch.tensor([999]))
    loop = scheduler.timesteps
    if t_max < 1:
        loop = loop[-round(num_steps * t_max) :]
        abar = scheduler.alphas_cumprod[999]
        x0 = (x - (1 - abar).sqrt() * denoise(x, torch.tensor([999]))) / abar.sqrt()
        x = scheduler.add_noise(x0, noise(x0.shape), loop[:1])
    for t in loop:
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: noise(shape)):
            x = scheduler.step(denoise(x, t[None]), t, x).prev_sample

    ours = sample_ccsr_v2(
        denoise,
        z_lr,
        num_steps=num_steps,
        t_max=t_max,
        t_min=0.0,
        start=start,
        noise=Replay(recorded_noise),
    )
    assert_close(ours, x.numpy())


def test_uniform_sampling_against_recorded_coefficients() -> None:
    """The chain of StableSR's four steps, written out with the recorded coefficients."""
    record, v1 = load("stablesr/d_respace.npz"), load("ccsr/v1_sampler_analytic.npz")
    denoise, x = analytic(v1["cond"]), v1["x_T"]
    for i, noise in zip((3, 2, 1, 0), v1["noise_loop"], strict=False):
        eps = denoise(tensor(x), torch.tensor([record["steps_4"][i]])).numpy()
        x0 = record["r4_sqrt_recip_alphas_cumprod"][i] * x - record["r4_sqrt_recipm1_alphas_cumprod"][i] * eps
        x = record["r4_posterior_mean_coef1"][i] * x0 + record["r4_posterior_mean_coef2"][i] * x
        x = x + np.sqrt(record["r4_posterior_variance"][i]) * noise
    ours = sample_uniform(denoise, tensor(v1["x_T"]), num_steps=4, noise=Replay(v1["noise_loop"][:3]))
    assert_close(ours, x)


def test_tile_weights_and_grids() -> None:
    record = load("stablesr/a_tiles.npz")
    assert tile_weights(64).dtype == torch.float64
    np.testing.assert_allclose(tile_weights(64), record["weights_64"], rtol=1e-9)
    grids = [name for name in record if name.startswith("grid_")]
    assert len(grids) == 6
    for name in grids:
        height, width, tile, overlap = (int(part[1:]) for part in name.split("_")[1:])
        recorded = sorted(map(tuple, record[name].tolist()))
        assert tile_grid(height, width, tile, tile - overlap) == recorded


def test_tiled_denoiser() -> None:
    record = load("stablesr/a_tiles.npz")
    condition = tensor(record["agg_struct"])
    i, j = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")

    def denoise(x: Tensor, t: Tensor, at: tuple[int, int]) -> Tensor:
        window = condition[..., at[0] : at[0] + 64, at[1] : at[1] + 64]
        return 0.5 * x + 0.25 * window + (i - 2 * j) / 64 + t.view(-1, 1, 1, 1) / 1000

    eps = tiled(denoise, 64, 32)(tensor(record["agg_x"]), torch.tensor([int(record["agg_t"])]))
    assert_close(eps, record["agg_eps"])


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_color_fix(method: str) -> None:
    """CCSR's recording on [0, 1]; StableSR's uses the same functions on [-1, 1]."""
    ccsr, stable = load("ccsr/colorfix.npz"), load("stablesr/b_colorfix.npz")
    assert_close(color_fix(tensor(ccsr["content"]), tensor(ccsr["style"]), method), ccsr[method])
    small = color_fix(tensor(stable["content_small"]), tensor(stable["style_small"]), method)
    assert_close(small, stable[f"{method}_small"])


def test_adain_of_a_flat_image() -> None:
    stable = load("stablesr/b_colorfix.npz")
    ours = color_fix(tensor(stable["flat_content"]), tensor(stable["flat_style"]), "adain")
    assert_close(ours, stable["flat_adain"])
