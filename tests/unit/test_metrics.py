"""The metrics against their formulas written out, their limits, and every refusal."""

import math

import cv2
import numpy as np
import pytest
from result_folder import photographs

from evaluation import niqe, niqe_bt601, psnr_y, sharpness, ssim_y
from evaluation.metrics.image import BT601, YIQ, rounded_luma
from infra import DataError, rng_for


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    gt = photographs(1, side=48)["img0"][:40]
    noise = rng_for(1, "noise").normal(0, 9, gt.shape)
    return np.clip(np.rint(gt + noise), 0, 255).astype(np.uint8), gt


def luma(image: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(image.astype(np.float64) / 255, -1, 0)
    return (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255


def test_psnr_is_the_written_formula(pair: tuple[np.ndarray, np.ndarray]) -> None:
    sr, gt = pair
    error = np.mean((luma(sr)[4:-4, 4:-4] - luma(gt)[4:-4, 4:-4]) ** 2)
    assert psnr_y(sr, gt) == pytest.approx(10 * np.log10(1 / (error + 1e-8)), abs=1e-10)


@pytest.mark.parametrize("negative", [False, True])
def test_ssim_is_the_written_formula(negative: bool, pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Against its negative an image has negative structure terms, which are clipped."""
    sr, gt = (255 - pair[0], pair[1]) if negative else pair
    x, y = (np.round(luma(image)[4:-4, 4:-4] * 255) for image in (sr, gt))
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (plane[top : top + 11, left : left + 11] for plane in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
            covariance = (window * a * b).sum() - mean_a * mean_b
            contrast = (2 * covariance + 58.5225) / (var_a + var_b + 58.5225)
            values.append((2 * mean_a * mean_b + 6.5025) / (mean_a**2 + mean_b**2 + 6.5025) * max(contrast, 0))
    assert ssim_y(sr, gt) == pytest.approx(np.mean(values), abs=1e-12)


def test_identical_images_score_80_db_and_1(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert psnr_y(pair[1], pair[1]) == pytest.approx(80, abs=1e-12)
    assert ssim_y(pair[1], pair[1]) == pytest.approx(1, abs=1e-12)
    assert sharpness(pair[1], pair[1]) == 1


def test_only_pixels_inside_the_border_count(pair: tuple[np.ndarray, np.ndarray]) -> None:
    sr, gt = pair
    spoiled = sr.copy()
    spoiled[:4], spoiled[:, -4:] = 0, 255
    for metric in (psnr_y, ssim_y, sharpness):
        assert metric(spoiled, gt) == metric(sr, gt)
        assert metric(spoiled, gt, crop_border=0) != metric(sr, gt, crop_border=0)


def test_sharpness_is_the_ratio_of_gradient_energies(pair: tuple[np.ndarray, np.ndarray]) -> None:
    def energy(image: np.ndarray) -> float:
        y = luma(image)[4:-4, 4:-4]
        return np.mean((y[1:] - y[:-1]) ** 2) + np.mean((y[:, 1:] - y[:, :-1]) ** 2)

    sr, gt = pair
    assert sharpness(sr, gt) == pytest.approx(energy(sr) / energy(gt), rel=1e-12)
    assert sharpness(cv2.GaussianBlur(gt, (0, 0), 1.5), gt) < 0.5
    assert math.isnan(sharpness(gt, np.full_like(gt, 90)))


def test_niqe_prefers_the_undistorted_picture() -> None:
    texture = cv2.resize(photographs(1, side=110)["img0"], (220, 220), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(texture + rng_for(2, "noise").normal(0, 40, texture.shape), 0, 255).astype(np.uint8)
    assert niqe(noisy) > niqe(texture) > 0


@pytest.mark.parametrize(("weights", "num_ties"), [(YIQ, 16_782), (BT601, 194)])
def test_rounded_luma_is_exact_where_it_is_a_half(weights: tuple[np.ndarray, int, int], num_ties: int) -> None:
    """Of all colours with a tie and of random ones: rounded half to even, as integers say."""
    factors, divisor, offset = weights
    red, green, blue = (int(factor) * np.arange(256, dtype=np.int32) for factor in factors[0])
    numerators = red[:, None, None] + green[:, None] + blue
    ties = np.argwhere(numerators % divisor == divisor // 2)
    assert len(ties) == num_ties
    colours = np.concatenate([ties, rng_for(0, "colours").integers(0, 256, (50_000, 3))])
    whole, rest = np.divmod(numerators[tuple(colours.T)], divisor)
    expected = whole + offset + np.where(2 * rest == divisor, (whole + offset) % 2, 2 * rest > divisor)
    np.testing.assert_array_equal(rounded_luma(colours.astype(np.uint8)[None], *weights)[0], expected)


def test_niqe_is_on_full_swing_luma() -> None:
    """Grey levels are their own full-swing luma; BT.601's is what a grey picture with those levels has."""
    grey = cv2.resize(photographs(1, side=110)["img0"], (220, 220), interpolation=cv2.INTER_CUBIC)[..., :1]
    studio = np.rint(16 + grey.astype(np.float64) * 219 / 255).astype(np.uint8)
    assert niqe_bt601(np.repeat(grey, 3, axis=2)) == niqe(np.repeat(studio, 3, axis=2))
    assert niqe(np.repeat(grey, 3, axis=2)) != niqe_bt601(np.repeat(grey, 3, axis=2))


def test_views_and_contiguous_copies_score_alike(pair: tuple[np.ndarray, np.ndarray]) -> None:
    sr, gt = (np.asfortranarray(image)[::-1] for image in pair)
    for metric in (psnr_y, ssim_y, sharpness):
        assert metric(sr, gt) == metric(np.ascontiguousarray(sr), np.ascontiguousarray(gt))


@pytest.mark.parametrize("metric", [psnr_y, ssim_y, sharpness])
def test_unlike_sizes_are_refused(metric, pair: tuple[np.ndarray, np.ndarray]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="differ in size") as caught:
        metric(pair[0][:-1], pair[1])
    assert "39 x 48 against 40 x 48" in caught.value.where


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((40, 40, 3), np.float32),
        np.zeros((40, 40), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((1, 40, 40, 3), np.uint8),
        [[1, 2, 3]],
    ],
)
def test_anything_but_8_bit_rgb_is_refused(bad: object) -> None:
    for call in (lambda: psnr_y(bad, bad), lambda: ssim_y(bad, bad), lambda: niqe(bad), lambda: sharpness(bad, bad)):
        with pytest.raises(DataError, match="uint8 RGB"):
            call()


@pytest.mark.parametrize("crop_border", [-1, 20, 100])
def test_impossible_crops_are_refused(crop_border: int, pair: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(DataError, match="leaves nothing"):
        psnr_y(*pair, crop_border=crop_border)


def test_ssim_needs_one_window() -> None:
    small = np.zeros((18, 40, 3), np.uint8)
    with pytest.raises(DataError, match="SSIM needs 11 px"):
        ssim_y(small, small)


@pytest.mark.parametrize(("height", "width"), [(199, 199), (103, 1000), (96, 192)])
def test_niqe_needs_two_blocks(height: int, width: int) -> None:
    with pytest.raises(DataError, match="two blocks"):
        niqe(np.zeros((height, width, 3), np.uint8))


def test_niqe_refuses_a_flat_picture() -> None:
    with pytest.raises(DataError, match="textured"):
        niqe(np.full((300, 300, 3), 77, np.uint8))
