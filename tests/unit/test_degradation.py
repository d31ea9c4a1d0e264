"""HR -> LR: the contract of draw, apply and degrade, what they refuse, and each operation against a plain one."""

import json
import random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from degradation import PRESETS, DegradationConfig, apply, degrade, draw, filters, jpeg, load_preset, noise
from degradation.kernels import bivariate, sinc
from degradation.resize import resize, resize_taps
from infra import ConfigError, DataError, rng_for

CONFIGS = TypeAdapter(DegradationConfig)
MODES = ["bilinear", "bicubic", "adaptive", "area", "imresize"]


def photo(height: int, width: int) -> np.ndarray:
    """Smooth shapes and some texture, uint8 RGB."""
    rng = np.random.default_rng(3)
    small = rng.random((height // 8 + 2, width // 8 + 2, 3), dtype=np.float32)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth * 255 + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def planes(height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(photo(height, width).transpose(2, 0, 1)) * np.float32(1 / 255)


def global_states() -> tuple:
    legacy = np.random.get_state()[1].tobytes()  # noqa: NPY002
    return random.getstate(), legacy, torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 100), (128, 96)])
def test_a_pair_has_the_contract_s_shapes_and_replays_from_json(preset: str, height: int, width: int) -> None:
    hr = photo(height, width)
    for k in range(12):
        pair = degrade(hr, load_preset(preset), rng_for(0, k))
        again = apply(hr, json.loads(json.dumps(pair.trace)))
        assert (pair.lr.shape, pair.lr.dtype) == ((height // 4, width // 4, 3), np.uint8)
        assert (pair.hr.shape, pair.hr.dtype) == (hr.shape, np.uint8)
        np.testing.assert_array_equal(pair.lr, again.lr)
        np.testing.assert_array_equal(pair.hr, again.hr)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scale", range(1, 9))
def test_every_scale_from_the_smallest_image_on(preset: str, scale: int) -> None:
    config = load_preset(preset).model_copy(update={"scale": scale})
    side = -(-32 // scale) * scale
    for k in range(8):
        lr = degrade(photo(side, 2 * side), config, rng_for(scale, k)).lr
        assert lr.shape == (side // scale, 2 * side // scale, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_stream_decides_everything_and_nothing_global_is_touched(preset: str) -> None:
    hr, config = photo(64, 64), load_preset(preset)
    before = global_states()
    first, second, other = (degrade(hr, config, rng_for(0, key)).lr for key in ("a", "a", "b"))
    np.testing.assert_array_equal(first, second)
    assert preset == "bicubic" or (first != other).any()
    assert global_states() == before


def test_threads_change_no_byte() -> None:
    """Large enough for OpenCV, oneDNN and embedding bags to share the work out."""
    hr = photo(600, 700)
    counts = cv2.getNumThreads(), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            cv2.setNumThreads(threads)
            torch.set_num_threads(threads)
            results.append([degrade(hr, load_preset(name), rng_for(5, name)).lr for name in PRESETS for _ in range(2)])
    finally:
        cv2.setNumThreads(counts[0])
        torch.set_num_threads(counts[1])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_only_stablesr_and_sharp_return_a_sharpened_hr() -> None:
    hr = photo(96, 96)
    sharpened = {name for name in PRESETS if (degrade(hr, load_preset(name), rng_for(0)).hr != hr).any()}
    assert sharpened == {"stablesr", "bsrgan_plus_sharp"}


def test_one_stablesr_pair_in_a_hundred_is_clean() -> None:
    config = load_preset("stablesr")
    clean = sum(draw(config, 32, 32, rng_for(1, k))["clean"] for k in range(4000))
    assert 20 <= clean <= 65


def test_bicubic_is_imresize() -> None:
    hr = photo(64, 80)
    expected = noise.to_levels(resize(planes(64, 80), 16, 20, "imresize"))
    np.testing.assert_array_equal(degrade(hr, load_preset("bicubic"), rng_for(0)).lr, expected.transpose(1, 2, 0))


def test_grey_and_opaque_rgba_are_taken_as_rgb() -> None:
    hr, config = photo(32, 32), load_preset("ccsr")
    opaque = np.dstack([hr, np.full((32, 32), 255, np.uint8)])
    np.testing.assert_array_equal(degrade(opaque, config, rng_for(1)).lr, degrade(hr, config, rng_for(1)).lr)
    gray = hr[:, :, 0]
    for image in (gray, gray[:, :, None]):
        pair = degrade(image, config, rng_for(1))
        np.testing.assert_array_equal(pair.hr, np.dstack([gray] * 3))
        assert pair.lr.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (np.zeros((32, 32, 3), np.uint16), "uint16"),
        (np.zeros((32, 32, 3), np.float32), "float32"),
        ([[0]], "list"),
        (np.zeros((32, 32, 2), np.uint8), "(32, 32, 2)"),
        (np.zeros((1, 32, 32, 3), np.uint8), "(1, 32, 32, 3)"),
        (np.zeros((32, 32, 4), np.uint8), "transparent"),
        (np.zeros((34, 32, 3), np.uint8), "height is 34 px"),
        (np.zeros((32, 28, 3), np.uint8), "width is 28 px"),
    ],
)
def test_images_that_cannot_be_degraded(image: np.ndarray, named: str) -> None:
    with pytest.raises(DataError) as error:
        degrade(image, load_preset("ccsr"), rng_for(0))
    assert named in error.value.what


def test_a_trace_fits_only_its_own_size() -> None:
    trace = draw(load_preset("ccsr"), 64, 64, rng_for(0))
    with pytest.raises(DataError, match="32 x 32"):
        apply(photo(32, 32), trace)


def test_an_unknown_preset_names_its_neighbour() -> None:
    with pytest.raises(ConfigError) as error:
        load_preset("bsrgan_pluss")
    assert "bsrgan_plus" in error.value.todo


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_config_that_yaml_could_hold(preset: str) -> None:
    config = load_preset(preset)
    assert CONFIGS.validate_python(json.loads(json.dumps(config.model_dump()))) == config


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        (("first", "resize", "directions"), {"up": 0.5, "down": 0.6}, "sum to 1"),
        (("first", "blur", "kinds"), {"iso": 0.9}, "sum to 1"),
        (("second", "noise", "sigma"), (12, 1), "inverted"),
        (("first", "jpeg_quality"), (95, 60), "inverted"),
        (("first", "jpeg_quality"), (60, 101), "less than or equal to 100"),
        (("second", "blur", "beta_plateau"), (1.2, 2), "contain 1"),
        (("second", "blur", "sizes"), (7, 8), "odd"),
        (("first", "noise", "gaussian"), 1.5, "less than or equal to 1"),
        (("first", "blur", "kinds"), {"is": 1.0}, "iso"),
        (("scale",), 9, "less than or equal to 8"),
        (("area",), "fast", "adaptive"),
        (("colour",), 1, "not permitted"),
    ],
)
def test_a_wrong_config_names_field_value_and_rule(path: tuple[str, ...], value: object, rule: str) -> None:
    values = load_preset("ccsr").model_dump()
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ValidationError) as error:
        CONFIGS.validate_python(values)
    details = error.value.errors()[0]
    assert details["loc"][1 : 1 + len(path)] == path
    assert rule in details["msg"]


@pytest.mark.parametrize("option", [{"scale_drift": False}, {"area": "opencv"}, {"jpeg_codec": "libjpeg"}])
def test_the_options_change_the_steps_they_name(option: dict[str, object]) -> None:
    config = load_preset("realesrgan")
    steps, changed = (
        [step for k in range(40) for step in draw(c, 64, 64, rng_for(k))["steps"]]
        for c in (config, config.model_copy(update=option))
    )

    def facts(steps: list[dict]) -> tuple[bool, bool, bool]:
        modes, ops = {step.get("mode") for step in steps}, {step["op"] for step in steps}
        return any("factor" in step for step in steps), "adaptive" in modes, "diffjpeg" in ops

    assert facts(steps) == (True, True, True)
    names = ("scale_drift", "area", "jpeg_codec")
    assert facts(changed) == tuple(name not in option for name in names)
    assert degrade(photo(64, 64), config.model_copy(update=option), rng_for(0)).lr.shape == (16, 16, 3)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(MODES))
def test_taps_lie_inside_and_sum_to_one(size: int, target: int, mode: str) -> None:
    index, weight = resize_taps(size, target, mode, None)
    assert index.shape == weight.shape
    assert len(index) == target
    assert 0 <= index.min() <= index.max() < size
    np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(1, 90), st.integers(1, 90))
def test_adaptive_and_area_agree_with_pytorch_and_opencv(height: int, width: int, rows: int, columns: int) -> None:
    image = planes(height, width)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(image), (rows, columns)).numpy()
    np.testing.assert_allclose(resize(image, rows, columns, "adaptive"), pooled, atol=1e-5)
    if rows <= height and columns <= width:
        area = np.stack([cv2.resize(p, (columns, rows), interpolation=cv2.INTER_AREA) for p in image])
        np.testing.assert_allclose(resize(image, rows, columns, "area"), area, atol=2e-3)


def test_area_enlarges_as_opencv_does() -> None:
    image = planes(50, 50)
    area = np.stack([cv2.resize(p, (77, 77), interpolation=cv2.INTER_AREA) for p in image])
    np.testing.assert_allclose(resize(image, 77, 77, "area"), area, atol=1e-5)


@settings(max_examples=30, deadline=None)
@example(factor=1.01, mode="bilinear", side=64)
@example(factor=1.01, mode="bicubic", side=64)
@given(st.floats(0.15, 1.5), st.sampled_from(["bilinear", "bicubic"]), st.integers(32, 80))
def test_a_factor_drifts_as_pytorch_s_interpolate_does(factor: float, mode: str, side: int) -> None:
    image = planes(side, side)
    batch = torch.from_numpy(image)[None]
    published = torch.nn.functional.interpolate(batch, scale_factor=factor, mode=mode)[0].numpy()
    ours = resize(image, published.shape[1], published.shape[2], mode, factor)
    np.testing.assert_allclose(ours, published, atol=2e-5)


@pytest.mark.parametrize("kernel", [bivariate("aniso", 21, (3, 1), 0.7), sinc(13, 2.0), bivariate("iso", 21, (1, 1))])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (33, 50)])
def test_blur_is_the_direct_sum(kernel: np.ndarray, height: int, width: int) -> None:
    image, half = planes(height, width), kernel.shape[0] // 2
    padded = np.stack([cv2.copyMakeBorder(p, half, half, half, half, cv2.BORDER_REFLECT_101) for p in image])
    windows = np.lib.stride_tricks.sliding_window_view(padded.astype(np.float64), kernel.shape, axis=(1, 2))
    np.testing.assert_allclose(filters.blur(image, kernel), np.einsum("chwij,ij->chw", windows, kernel), atol=1e-5)


def test_diffjpeg_keeps_a_flat_image_and_loses_more_at_lower_quality() -> None:
    flat = np.full((3, 24, 40), np.float32(128 / 255))
    np.testing.assert_allclose(jpeg.diffjpeg(flat, 90.0)[:, :16, :32], flat[:, :16, :32], atol=1e-5)
    image = np.repeat(planes(96, 96)[:1], 3, axis=0)  # grey: chroma subsampling costs nothing
    losses = [np.abs(jpeg.diffjpeg(image, quality) - image).mean() for quality in (100.0, 90.0, 60.0, 30.0)]
    assert losses == sorted(losses)
    assert losses[0] < 1e-3


def test_gaussian_noise_has_its_level_and_gray_noise_one_field() -> None:
    middle = np.full((3, 256, 256), np.float32(0.5))
    colour = noise.gaussian(middle.copy(), {"sigma": 12.0, "gray": False, "seed": 1}) - middle
    gray = noise.gaussian(middle.copy(), {"sigma": 12.0, "gray": True, "seed": 1}) - middle
    assert colour.std() * 255 == pytest.approx(12, rel=0.01)
    assert abs(np.corrcoef(colour[0].ravel(), colour[1].ravel())[0, 1]) < 0.02
    np.testing.assert_array_equal(gray[0], gray[2])


@pytest.mark.parametrize("photons", [16, 256, 137.0, 9000.0])
def test_poisson_quantiles_have_the_mean_and_variance_of_poisson(photons: float) -> None:
    values = noise.poisson_quantiles(photons).reshape(256, -1).astype(np.float64) * photons
    rate = np.arange(256) / 255 * photons
    np.testing.assert_allclose(values.mean(1), 0, atol=0.01)
    np.testing.assert_allclose(values.var(1)[20:], rate[20:], rtol=0.005)


def test_poisson_photons_follow_the_number_of_levels() -> None:
    two_levels = np.zeros((3, 64, 64), np.float32)
    two_levels[:, :, 32:] = 100 / 255
    out = noise.poisson(two_levels.copy(), {"scale": 1.0, "gray": False, "seed": 1})
    # Two levels: two photons per unit, so that a pixel is a multiple of one half before clipping.
    bright = out[:, :, 32:]
    np.testing.assert_allclose(np.minimum(np.rint(bright * 2) / 2, 1), bright, atol=1e-6)
    assert bright.std() > 0.3
