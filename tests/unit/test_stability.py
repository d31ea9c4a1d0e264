"""G-STD and L-STD against their formulas; what blur and determinism cannot fake; every refusal."""

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from result_folder import photographs

from evaluation import StabilityAccumulator, g_std, l_std, l_std_equal_sharpness, sharpness, temporal_std
from evaluation.config import Perturbation
from evaluation.metrics.perturbations import perturb, perturbation_border, undo
from infra import DataError, rng_for
from infra.imaging.pictures import resized


def random_runs(num_runs: int, height: int = 14, width: int = 17) -> np.ndarray:
    return rng_for(0, "runs", num_runs).integers(0, 256, (num_runs, height, width, 3)).astype(np.uint8)


def accumulated(runs: np.ndarray, crop_border: int = 4) -> StabilityAccumulator:
    accumulator = StabilityAccumulator(crop_border=crop_border)
    for run in runs:
        accumulator.add(run)
    return accumulator


@pytest.mark.parametrize("num_runs", [2, 3, 10])
def test_l_std_is_the_population_std_of_values_in_0_1(num_runs: int) -> None:
    runs = random_runs(num_runs)
    expected = np.std(runs[:, 4:-4, 4:-4] / 255.0, axis=0, ddof=0).mean()
    assert l_std(runs) == pytest.approx(expected, abs=1e-13)
    assert l_std(iter(runs), crop_border=0) == pytest.approx(np.std(runs / 255.0, axis=0).mean(), abs=1e-13)


def test_map_covers_the_whole_picture() -> None:
    runs = random_runs(5)
    stds = accumulated(runs).map()
    assert stds.shape == (14, 17)
    assert stds.dtype == np.float32
    np.testing.assert_allclose(stds, np.std(runs / 255.0, axis=0).mean(axis=2), atol=1e-7)
    assert stds.astype(np.float64)[4:-4, 4:-4].mean() == pytest.approx(l_std(runs), abs=1e-7)


def test_two_opposite_runs_reach_the_largest_possible_value() -> None:
    black = np.zeros((12, 12, 3), np.uint8)
    assert l_std([black, black + 255]) == 0.5


def test_g_std_is_the_mean_of_population_stds() -> None:
    scores = rng_for(0, "scores").normal(25, 2, (7, 10))
    expected = np.mean([np.sqrt(np.mean((row - row.mean()) ** 2)) for row in scores])
    assert g_std(scores) == pytest.approx(expected, abs=1e-13)


@given(st.integers(2, 12), st.floats(-1e6, 1e6))
def test_g_std_of_identical_runs_is_exactly_0(num_runs: int, score: float) -> None:
    assert g_std(np.full((3, num_runs), score)) == 0.0


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(0, 1000))
def test_l_std_of_identical_runs_is_exactly_0(num_runs: int, seed: int) -> None:
    run = rng_for(seed, "run").integers(0, 256, (11, 12, 3)).astype(np.uint8)
    accumulator = accumulated([run] * num_runs)
    assert accumulator.l_std() == 0.0
    assert not accumulator.map().any()


@settings(deadline=None)
@given(st.permutations(range(8)))
def test_order_changes_no_bit(order: list[int]) -> None:
    runs = random_runs(8)
    assert l_std(runs[order]) == l_std(runs)
    assert (accumulated(runs[order]).map() == accumulated(runs).map()).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_merging_any_grouping_changes_no_bit(groups: list[int]) -> None:
    runs = random_runs(8)
    whole = StabilityAccumulator()
    for group in range(3):
        part = accumulated(runs[[g == group for g in groups]])
        before = part.count
        whole.merge(part)
        assert part.count == before
    assert whole.count == 8
    assert whole.l_std() == l_std(runs)
    assert (whole.map() == accumulated(runs).map()).all()


def test_a_merged_accumulator_is_not_tied_to_its_parts() -> None:
    runs = random_runs(4)
    part, whole = accumulated(runs[:2]), StabilityAccumulator()
    whole.merge(part)
    whole.add(runs[2])
    assert part.l_std() == l_std(runs[:2])
    assert whole.l_std() == l_std(runs[:3])


def test_it_is_exact_after_thousands_of_runs() -> None:
    """Welford's running mean would drift here."""
    image = np.full((9, 9, 3), 200, np.uint8)
    accumulator = accumulated(np.concatenate([np.stack([image, image + 1])] * 2000))
    assert accumulator.count == 4000
    assert accumulator.l_std() == pytest.approx(0.5 / 255, abs=1e-17)


@pytest.mark.parametrize("num_runs", [0, 1])
def test_fewer_than_two_runs_are_refused(num_runs: int) -> None:
    runs = random_runs(2)[:num_runs]
    with pytest.raises(DataError, match=f"at least 2 runs, not {num_runs}"):
        l_std(runs)
    with pytest.raises(DataError, match="at least 2 runs"):
        accumulated(runs).map()
    with pytest.raises(DataError, match="at least 2 runs"):
        g_std(np.zeros((5, num_runs)))


def test_bad_runs_are_refused() -> None:
    good = random_runs(2)
    with pytest.raises(DataError, match="differ in size"):
        l_std([good[0], good[1][:-1]])
    with pytest.raises(DataError, match="uint8 RGB"):
        l_std(good / 255.0)
    with pytest.raises(DataError, match="leaves nothing"):
        l_std(good, crop_border=7)
    with pytest.raises(DataError, match="crop_border"):
        l_std(good, crop_border=-1)
    with pytest.raises(DataError, match="differ in size"):
        accumulated(good).merge(accumulated(good[:, :-1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_missing_scores_are_refused(bad: float) -> None:
    scores = np.ones((3, 4))
    scores[1, 2] = bad
    with pytest.raises(DataError) as caught:
        g_std(scores)
    assert caught.value.where == "image 1, run 2"


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 2, 2)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="num_images, num_runs"):
        g_std(np.zeros(shape))


def method_and_bicubic(seed: int, noise: float, size: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Four runs of a method that sharpens and adds noise blurred to `size` px, and the bicubic image."""
    hr = photographs(1, side=96)["img0"]
    bicubic = resized(resized(hr, (24, 24)), (96, 96))
    runs = []
    for run in range(4):
        grain = cv2.GaussianBlur(rng_for(seed, run).normal(0, noise * (1 + 3 * size), hr.shape), (0, 0), size)
        runs.append(np.clip(np.rint(hr + grain), 0, 255).astype(np.uint8))
    return runs, bicubic


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.floats(3, 12), st.floats(0.4, 1.5), st.floats(0.3, 4))
@example(0, 5.0, 1.0, 1.65625)  # a little blurrier than bicubic
def test_blur_buys_no_stability_at_equal_sharpness(seed: int, noise: float, size: float, blur: float) -> None:
    """A blurred copy has a far lower L-STD; at equal sharpness it is no better than its 8-bit rounding makes it, or it
    is blurrier than bicubic and has none."""
    runs, bicubic = method_and_bicubic(seed, noise, size)
    blurred = [cv2.GaussianBlur(run, (0, 0), blur, borderType=cv2.BORDER_REFLECT) for run in runs]
    ours, copys = (l_std_equal_sharpness(images, bicubic) for images in (runs, blurred))
    assert 0 < ours < l_std(runs)
    assert l_std(blurred) < l_std(runs)
    sharp = np.mean([sharpness(image, bicubic) for image in blurred])
    if np.isnan(copys):
        assert sharp < 1
    else:
        assert sharp > 0.995
        assert copys > 0.98 * ours


def test_flat_pictures_are_as_sharp_as_each_other() -> None:
    """A black frame or a plain sky: nothing is blurrier than another."""
    black = np.zeros((32, 32, 3), np.uint8)
    assert l_std_equal_sharpness([black, black + 4], black) == l_std([black, black + 4]) > 0


def test_at_equal_sharpness_it_is_l_std_and_of_identical_runs_exactly_0() -> None:
    runs, bicubic = method_and_bicubic(0, 8, 0.7)
    as_sharp = [bicubic, np.ascontiguousarray(bicubic[::-1]), np.ascontiguousarray(bicubic[:, ::-1])]
    assert l_std_equal_sharpness(as_sharp, bicubic, crop_border=0) == l_std(as_sharp, crop_border=0) > 0
    assert l_std_equal_sharpness([runs[0]] * 3, bicubic) == 0.0
    with pytest.raises(DataError, match="at least 2 runs"):
        l_std_equal_sharpness(runs[:1], bicubic)
    with pytest.raises(DataError, match="differ in size"):
        l_std_equal_sharpness(runs, bicubic[1:])


@pytest.mark.parametrize("name", Perturbation.__args__)
def test_perturbations_are_tiny_and_bicubic_undoes_them(name: str) -> None:
    """Bicubic moves with its input, so that only the noise and JPEG's own levels are left in the undone output."""
    lr = resized(photographs(1, side=96)["img0"], (32, 32))
    changed = perturb(lr, name, "key")
    assert changed.shape == lr.shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, lr)
    np.testing.assert_array_equal(changed, perturb(lr, name, "key"))
    original = lr[:-1, :-1] if name == "shift" else lr
    moved = changed[1:, 1:] if name == "shift" else changed
    assert np.abs(moved.astype(int) - original).mean() < 3
    outputs = [resized(lr, (96, 96)), undo(resized(changed, (96, 96)), name, 3)]
    left = l_std(outputs, crop_border=perturbation_border(4, 3))
    assert left == 0 if name in ("shift", "brightness") else 0 < left < 0.01


def test_temporal_std_is_the_change_that_the_input_does_not_have() -> None:
    """By hand: outputs that change by six levels more than their inputs, between the first two of four frames."""
    inputs = np.stack([np.full((20, 20, 3), level, np.uint8) for level in (50, 54, 58, 58)])
    frames = inputs + np.array([7, 7, 7, 7], np.uint8)[:, None, None, None]
    assert temporal_std(frames, inputs) == 0
    frames[1:] += 6
    assert temporal_std(frames, inputs) == pytest.approx(6 / 3 / 255)
    frames[0, 1] = 255  # in the border
    assert temporal_std(frames, inputs) == pytest.approx(6 / 3 / 255)
    for wrong in (frames[:1], frames[:2]):
        with pytest.raises(DataError, match="as many inputs as frames"):
            temporal_std(wrong, inputs)
