"""PSNR-Y, SSIM-Y, NIQE, G-STD and L-STD on photographs against recordings of the published recipes (niqe.json and
psnr_ssim.json say how they were made)."""

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from evaluation import g_std, l_std, niqe_bt601, psnr_y, ssim_y

data = pytest.importorskip("skimage.data", reason="the photographs come with the demo extra")
FOLDER = Path(__file__).parent / "data" / "metrics"
PAIRED = json.loads((FOLDER / "psnr_ssim.json").read_text())
NIQE = json.loads((FOLDER / "niqe.json").read_text())["niqe"]


def sha256(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@cache
def reference_and_runs(index: int) -> tuple[np.ndarray, np.ndarray]:
    """The recipe of psnr_ssim.json; its legacy generator is part of the recording."""
    photo = getattr(data, PAIRED["images"][index])()
    top, left = photo.shape[0] // 2 - 128, photo.shape[1] // 2 - 128
    reference = np.ascontiguousarray(photo[top : top + 256, left : left + 256])
    runs = []
    for run in range(PAIRED["runs"]):
        noise = np.random.RandomState(1000 * (index + 1) + run).standard_normal(reference.shape)
        runs.append(np.clip(np.rint(reference + noise * (6 + 0.7 * run)), 0, 255).astype(np.uint8))
    recorded = PAIRED["sha256"][PAIRED["images"][index]]
    assert sha256(reference) == recorded["ref_sha256"]
    assert [sha256(run) for run in runs] == recorded["run_sha256"]
    return reference, np.stack(runs)


def niqe_picture(name: str) -> np.ndarray:
    photo = getattr(data, name.split("_")[0])()
    match name:
        case "astronaut_centre_256":
            photo = photo[128:384, 128:384]
        case "astronaut_saturated":
            photo = photo.copy()
            photo[:200, :300] = 255
        case "camera_posterised":
            photo = np.repeat((photo // 40 * 40)[..., None], 3, axis=2)
    return np.ascontiguousarray(photo)


@pytest.mark.parametrize("index", range(len(PAIRED["images"])))
def test_psnr_and_ssim(index: int) -> None:
    reference, runs = reference_and_runs(index)
    np.testing.assert_allclose([psnr_y(run, reference) for run in runs], PAIRED["psnr_y"][index], rtol=0, atol=1e-9)
    # Where pyiqa's float32 luma rounds a tie the other way, a few windows move.
    np.testing.assert_allclose([ssim_y(run, reference) for run in runs], PAIRED["ssim_y"][index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NIQE)
def test_niqe_on_bt601_luma(name: str) -> None:
    picture = niqe_picture(name)
    assert sha256(picture) == NIQE[name]["sha256"]
    # Ours rounds a luma of exactly k + 0.5 to even; the recording's floats round it by chance.
    has_ties = (picture.astype(int) @ (65481, 128553, 24966) % 255_000 == 127_500).any()
    assert niqe_bt601(picture) == pytest.approx(NIQE[name]["value"], abs=5e-4 if has_ties else 1e-9)


def test_g_std_of_the_recorded_scores() -> None:
    scores = [[psnr_y(run, reference) for run in runs] for reference, runs in map(reference_and_runs, (0, 1))]
    expected = np.mean([np.sqrt(np.mean((row - np.mean(row)) ** 2)) for row in np.array(PAIRED["psnr_y"])])
    assert g_std(np.array(scores)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("index", range(len(PAIRED["images"])))
def test_l_std_against_the_official_float32_stack(index: int) -> None:
    _, runs = reference_and_runs(index)
    stack = runs[:, 4:-4, 4:-4].astype(np.float32) / 255
    assert l_std(runs) == pytest.approx(np.std(stack, axis=0).mean(), abs=1e-6)
    exact = runs[:, 4:-4, 4:-4].astype(np.float64) / 255
    assert l_std(runs) == pytest.approx(np.std(exact, axis=0).mean(), abs=1e-12)
