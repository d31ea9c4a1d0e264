"""Samplers, schedules, tiles and colour fix: properties that hold for any denoiser, and what bad input says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from infra import noise_for
from infra.errors import ConfigError, DataError
from training.config import ModelConfig
from training.models import build_model
from training.sampling import (
    add_noise,
    ccsr_v1_timesteps,
    ccsr_v2_timesteps,
    color_fix,
    guided,
    predict_x0,
    sample_ccsr_v1,
    sample_ccsr_v2,
    sample_uniform,
    tile_grid,
    tile_weights,
    tiled,
)
from training.sampling.schedules import ALPHAS_CUMPROD, respaced_grid, scales_on

FRACTIONS = {"t_max": 0.6667, "t_min": 0.3333}
fraction = st.floats(0, 1)
rising_fractions = st.tuples(fraction, fraction).map(sorted)
SAMPLERS: dict[str, Callable[[Any, Tensor, Any], Tensor]] = {
    "v1": lambda denoise, x, noise: sample_ccsr_v1(denoise, x, num_steps=15, noise=noise, **FRACTIONS),
    "v2": lambda denoise, x, noise: sample_ccsr_v2(denoise, x, num_steps=15, noise=noise, start="lr", **FRACTIONS),
    "v2 one step": lambda denoise, x, noise: sample_ccsr_v2(
        denoise, x, num_steps=1, noise=noise, start="noise", **FRACTIONS
    ),
    "uniform": lambda denoise, x, noise: sample_uniform(denoise, x, num_steps=6, noise=noise),
}


def elementwise(x: Tensor, t: Tensor, *tile: Any) -> Tensor:
    return 0.3 * x + torch.sin(x + (t.float() / 1000).view(-1, 1, 1, 1))


class CountingNoise:
    """The i-th draw is constantly i + 1, so a result tells which draws it used."""

    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.draws += 1
        return torch.full(tuple(shape), float(self.draws))


class Watched:
    """A denoiser that remembers its inputs and predicts no noise."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.timesteps: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert t.dtype == torch.int64
        assert t.shape == x.shape[:1]
        self.seen.append(x)
        self.timesteps.append(int(t[0]))
        return torch.zeros_like(x)


@given(st.integers(2, 1000), rising_fractions)
def test_v1_timesteps_are_a_falling_run_of_the_grid(num_steps: int, fractions: list[float]) -> None:
    t_min, t_max = fractions
    assume(t_min < t_max and 0 < round(num_steps * t_min) < round(num_steps * t_max))
    first, *loop = ccsr_v1_timesteps(num_steps, t_max, t_min)
    falling = respaced_grid(num_steps)[::-1]
    start = falling.index(loop[0])
    assert first == 999
    assert loop == falling[start : start + len(loop)]
    assert len(loop) == round(num_steps * t_max) - round(num_steps * t_min)


@given(st.integers(2, 999), rising_fractions)
def test_v2_timesteps_fall_by_a_constant(num_steps: int, fractions: list[float]) -> None:
    t_min, t_max = fractions
    assume(t_min < t_max < 1 and (t_min == 0 or round(num_steps * t_min) > 0))
    assume(round(num_steps * t_min) < round(num_steps * t_max))
    first, *loop = ccsr_v2_timesteps(num_steps, t_max, t_min)
    assert first == 999
    assert loop == list(range(loop[0], loop[-1] - 1, -(1000 // num_steps)))
    assert 1 <= loop[-1] <= loop[0] <= 999
    assert (loop[-1] == 1) == (round(num_steps * t_min) == 0)


@given(st.integers(2, 1000))
def test_respaced_grid_rises_from_0_to_999(num_steps: int) -> None:
    grid = respaced_grid(num_steps)
    assert (grid[0], grid[-1], len(grid)) == (0, 999, num_steps)
    assert grid == sorted(set(grid))


@pytest.mark.parametrize("timesteps", [ccsr_v1_timesteps, ccsr_v2_timesteps])
@pytest.mark.parametrize(
    ("num_steps", "t_max", "t_min", "message"),
    [
        (45, 0.3, 0.3, "t_min < t_max"),
        (45, 0.3, 0.6, "t_min < t_max"),
        (45, 1.1, 0.3, "t_min < t_max"),
        (45, 0.5, -0.1, "t_min < t_max"),
        (45, float("nan"), 0.3, "t_min < t_max"),
        (0, 0.6667, 0.3333, "cannot take 0 steps"),
        (-3, 0.6667, 0.3333, "cannot take -3 steps"),
        (1001, 0.6667, 0.3333, "cannot take 1001 steps"),
        (2, 0.6667, 0.5, "leave no timestep"),
        (45, 0.6667, 0.001, "leave no timestep"),
        (45, 0.01, 0.0, "leave no timestep"),
    ],
)
def test_bad_schedules(timesteps: Any, num_steps: int, t_max: float, t_min: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        timesteps(num_steps, t_max, t_min)
    assert caught.value.where
    assert caught.value.todo


def test_cases_that_only_one_version_has() -> None:
    for num_steps, t_max, t_min in [(1, 0.6667, 0.3333), (45, 0.6667, 0.0)]:
        with pytest.raises(ConfigError):
            ccsr_v1_timesteps(num_steps, t_max, t_min)
    assert ccsr_v2_timesteps(1, 0.6667, 0.5) == [999]
    assert ccsr_v2_timesteps(2, 0.6667, 0.0) == [999, 1]
    assert ccsr_v2_timesteps(2, 1.0, 0.0) == [501, 1]
    with pytest.raises(ConfigError):
        ccsr_v2_timesteps(1, 1.0, 0.0)
    with pytest.raises(ConfigError):
        sample_uniform(elementwise, torch.zeros(1, 4, 2, 2), num_steps=1, noise=torch.randn)


@pytest.mark.parametrize(
    ("row", "t_max", "t_min", "num_evaluations"),
    [("A1", 1 / 2, 1 / 3, 8), ("A2", 2 / 3, 1 / 2, 9), ("A3", 4 / 5, 1 / 3, 22), ("A4", 2 / 3, 1 / 5, 22)],
)
def test_rows_of_table_5(row: str, t_max: float, t_min: float, num_evaluations: int) -> None:
    """The jump at 999 and S steps of the 45-step grid; A1 counts 8 steps in the paper, 7 by the published rounding."""
    denoise, noise = Watched(), CountingNoise()
    sample_ccsr_v1(denoise, torch.zeros(1, 4, 2, 2), num_steps=45, t_max=t_max, t_min=t_min, noise=noise)
    assert denoise.timesteps == ccsr_v1_timesteps(45, t_max, t_min)
    assert len(denoise.timesteps) == num_evaluations


@pytest.mark.parametrize(
    ("sample", "num_draws"),
    [
        (lambda d, x, n: sample_ccsr_v1(d, x, num_steps=45, noise=n, **FRACTIONS), 15),
        (lambda d, x, n: sample_ccsr_v2(d, x, num_steps=1, noise=n, start="lr", **FRACTIONS), 1),
        (lambda d, x, n: sample_ccsr_v2(d, x, num_steps=1, noise=n, start="noise", **FRACTIONS), 1),
        (lambda d, x, n: sample_ccsr_v2(d, x, num_steps=6, noise=n, start="lr", **FRACTIONS), 3),
        (lambda d, x, n: sample_ccsr_v2(d, x, num_steps=6, noise=n, start="lr", t_max=1.0, t_min=0.0), 6),
        (lambda d, x, n: sample_uniform(d, x, num_steps=6, noise=n), 5),
    ],
)
def test_only_the_noise_that_is_used_is_drawn(sample: Any, num_draws: int) -> None:
    noise = CountingNoise()
    sample(elementwise, torch.zeros(1, 4, 2, 2), noise)
    assert noise.draws == num_draws


def test_v2_draws_the_start_then_the_renoising() -> None:
    """The denoiser at 999 predicts x0 = 0, so the loop starts from the second draw alone."""
    sigma_T, sigma_499 = (float((1 - ALPHAS_CUMPROD[t]).sqrt()) for t in (999, 499))
    for start, first in (("noise", 1.0), ("lr", sigma_T)):
        jump, loop = Watched(), Watched()
        sample_ccsr_v2(
            loop,
            torch.zeros(1, 4, 2, 2),
            num_steps=6,
            start=start,
            noise=CountingNoise(),
            denoise_first=lambda x, t, jump=jump: jump(x, t) + x / sigma_T,
            **FRACTIONS,
        )
        assert (jump.timesteps, loop.timesteps) == ([999], [499, 333])
        assert jump.seen[0].mean() == pytest.approx(first)
        assert loop.seen[0].mean() == pytest.approx(2 * sigma_499, rel=1e-5)


def test_denoise_first_is_not_called_without_the_jump() -> None:
    jump = Watched()
    sample_ccsr_v2(
        elementwise,
        torch.zeros(1, 4, 2, 2),
        num_steps=3,
        t_max=1.0,
        t_min=0.0,
        start="lr",
        noise=CountingNoise(),
        denoise_first=jump,
    )
    assert jump.timesteps == []


def test_unknown_start() -> None:
    with pytest.raises(ConfigError, match="unknown start"):
        sample_ccsr_v2(elementwise, torch.zeros(1, 4, 2, 2), num_steps=1, start="hr", noise=torch.randn, **FRACTIONS)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: guided(d, lambda *a: -d(*a), 4.5), lambda d: tiled(d, 5, 3)])
def test_batches_of_one_or_many_agree_to_the_bit(name: str, wrap: Any) -> None:
    denoise, keys = wrap(elementwise), [("image", i) for i in range(3)]
    x_T = noise_for(1, keys, "cpu", torch.float32)((3, 4, 7, 9))
    together = SAMPLERS[name](denoise, x_T, noise_for(2, keys, "cpu", torch.float32))
    for i, key in enumerate(keys):
        alone = SAMPLERS[name](denoise, x_T[i : i + 1], noise_for(2, [key], "cpu", torch.float32))
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("tile", [None, 4])
def test_batches_of_one_or_many_agree_with_a_network(tile: int | None) -> None:
    keys = [("image", i) for i in range(2)]
    model = build_model(ModelConfig(preset="tiny"), 0)
    z_lr = noise_for(3, keys, "cpu", torch.float32)((2, 4, 8, 8))
    x_T = noise_for(1, keys, "cpu", torch.float32)((2, 4, 8, 8))

    @torch.no_grad()
    def restore(rows: slice) -> Tensor:
        denoise = model.denoiser(z_lr[rows])
        noise = noise_for(2, keys[rows], "cpu", torch.float32)
        denoise = tiled(denoise, tile, 2) if tile else denoise
        return sample_ccsr_v1(denoise, x_T[rows], num_steps=8, noise=noise, **FRACTIONS)

    together = restore(slice(0, 2))
    for i in range(2):
        alone = restore(slice(i, i + 1))[0]
        assert (alone - together[i]).abs().max() <= 1e-5 * together[i].abs().max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_denoisers_and_inputs_give_float32(name: str) -> None:
    x_T = torch.linspace(-3, 3, 64).view(1, 4, 4, 4).half()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return elementwise(x, t).half()

    x0 = SAMPLERS[name](denoise, x_T, CountingNoise())
    expected = SAMPLERS[name](lambda x, t: denoise(x, t).float(), x_T.float(), CountingNoise())
    assert x0.dtype == torch.float32
    assert torch.equal(x0, expected)


def test_x0_at_T_is_computed_in_float32() -> None:
    """In float16 the difference of x and 0.998 eps would lose most of its digits before it is multiplied by 14.6."""
    x = torch.full((1, 4, 2, 2), 1000.5)
    x0 = predict_x0(x, torch.full_like(x, 1000.0).half(), torch.tensor([999]))
    signal, sigma = ALPHAS_CUMPROD[999].sqrt(), (1 - ALPHAS_CUMPROD[999]).sqrt()
    assert float(x0.mean()) == pytest.approx(float((1000.5 - sigma * 1000) / signal), rel=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_global_randomness(name: str) -> None:
    state = torch.get_rng_state()
    SAMPLERS[name](elementwise, torch.ones(1, 4, 4, 4), CountingNoise())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_everything_stays_on_the_device_of_the_input(name: str) -> None:
    """The meta device refuses operands of another device, as a GPU would."""
    x_T = torch.empty(2, 4, 8, 8, device="meta")
    denoise = tiled(guided(elementwise, elementwise, 2.0), 4, 2)
    x0 = SAMPLERS[name](denoise, x_T, lambda shape: torch.empty(shape, device="meta"))
    assert x0.device.type == "meta"
    assert color_fix(x0, x0, "wavelet").device.type == "meta"


def test_the_schedule_is_copied_to_a_device_once_and_can_be_saved_for_a_backward() -> None:
    x = torch.zeros(1, 4, 2, 2, device="meta")
    with torch.inference_mode():  # a restoration
        add_noise(x, x, torch.zeros(1, dtype=torch.int64, device="meta"))
        first = scales_on(x.device)
    assert first is scales_on(x.device)
    assert not first.is_inference()


def test_guidance() -> None:
    x, t = torch.ones(1, 1, 1, 1), torch.tensor([5])
    cond, uncond = (lambda x, t: 3 * x), (lambda x, t: x)
    assert float(guided(cond, uncond, 4.5)(x, t)) == 1 + 4.5 * 2
    assert guided(cond, uncond, 1.0) is cond


@given(st.data(), st.integers(1, 12))
def test_tile_grid_covers_everything(data: st.DataObject, tile: int) -> None:
    stride = data.draw(st.integers(1, tile))
    height, width = data.draw(st.integers(tile, 40)), data.draw(st.integers(tile, 40))
    grid = tile_grid(height, width, tile, stride)
    covered = torch.zeros(height, width, dtype=torch.int64)
    for y, x in grid:
        assert 0 <= y <= height - tile
        assert 0 <= x <= width - tile
        covered[y : y + tile, x : x + tile] += 1
    assert covered.min() >= 1
    assert grid == sorted(set(grid))
    for length, starts in ((height, {y for y, _ in grid}), (width, {x for _, x in grid})):
        assert starts == {*range(0, length - tile + 1, stride), length - tile}


def test_tiles_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="smaller than a tile"):
        tile_grid(8, 20, 9, 4)
    for stride in (0, -1, 10):
        with pytest.raises(ConfigError, match="overlap or touch"):
            tile_grid(20, 20, 9, stride)


def test_tile_weights_are_highest_at_the_published_centre() -> None:
    weights = tile_weights(9)
    assert weights.dtype == torch.float64
    assert weights.min() > 0
    assert torch.equal(weights, weights.flip(1))
    row_profile = weights[:, 4]
    assert float(row_profile[4]) == pytest.approx(float(row_profile[5]))


def test_tiling_an_elementwise_denoiser_changes_nothing() -> None:
    x, t = torch.linspace(-2, 2, 2 * 4 * 11 * 8).view(2, 4, 11, 8), torch.tensor([7, 800])
    positions = []

    def denoise(x_tile: Tensor, t: Tensor, at: tuple[int, int]) -> Tensor:
        positions.append(at)
        assert torch.equal(x_tile, x[..., at[0] : at[0] + 6, at[1] : at[1] + 6])
        return elementwise(x_tile, t)

    torch.testing.assert_close(tiled(denoise, 6, 4)(x, t), elementwise(x, t), rtol=1e-6, atol=1e-6)
    assert positions == tile_grid(11, 8, 6, 4)


def test_the_position_goes_to_denoisers_that_take_it() -> None:
    x, t = torch.linspace(-2, 2, 4 * 11 * 8).view(1, 4, 11, 8), torch.tensor([7])
    rows = torch.arange(11.0).view(11, 1)

    def placed(x_tile: Tensor, t: Tensor, at: tuple[int, int]) -> Tensor:
        return x_tile + rows[at[0] : at[0] + 6]

    plain = tiled(lambda x_tile, t: 3 * x_tile, 6, 4)(x, t)
    torch.testing.assert_close(plain, 3 * x)
    mixed = tiled(guided(placed, lambda x_tile, t: 0 * x_tile, 2.0), 6, 4)(x, t)
    torch.testing.assert_close(mixed, 2 * (x + rows))

    def failing(x_tile: Tensor, t: Tensor, at: tuple[int, int]) -> Tensor:
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        tiled(failing, 6, 4)(x, t)


@pytest.mark.parametrize("name", SAMPLERS)
def test_double_precision_noise_and_inputs_give_what_their_float32_gives(name: str) -> None:
    x_T = torch.linspace(-3, 3, 64, dtype=torch.float64).view(1, 4, 4, 4)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return elementwise(x, t)

    double, single = CountingNoise(), CountingNoise()
    x0 = SAMPLERS[name](denoise, x_T, lambda shape: double(shape).double() / 3)
    expected = SAMPLERS[name](denoise, x_T.float(), lambda shape: (single(shape).double() / 3).float())
    assert x0.dtype == torch.float32
    assert torch.equal(x0, expected)


def test_color_fix_takes_the_reference_statistics() -> None:
    image = noise_for(0, [("a",), ("b",)], "cpu", torch.float32)((2, 3, 16, 12))
    reference = 0.5 + 0.1 * noise_for(1, [("a",), ("b",)], "cpu", torch.float32)((2, 3, 16, 12))
    fixed = color_fix(image, reference, "adain")
    torch.testing.assert_close(fixed.mean((2, 3)), reference.mean((2, 3)))
    torch.testing.assert_close(fixed.std((2, 3)), reference.std((2, 3)), rtol=1e-3, atol=0)
    assert color_fix(image, reference, "none") is image
    torch.testing.assert_close(color_fix(image, image, "wavelet"), image)


def test_color_fix_refuses() -> None:
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="unknown colour fix"):
        color_fix(image, image, "adian")
    with pytest.raises(DataError, match="differ in shape"):
        color_fix(image, image[..., :4], "wavelet")
