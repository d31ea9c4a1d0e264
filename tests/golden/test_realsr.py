"""Twelve real pairs with numbers that others measured (OSEDiff's log; Real-ESRGAN's scores), where they are at hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from recordings import recordings

from evaluation import niqe, psnr_y, ssim_y
from infra.images import read_image


@pytest.fixture(scope="module")
def realsr() -> Path:
    return recordings("realsr")


@pytest.fixture(scope="module")
def per_image(realsr: Path) -> dict[str, dict]:
    return json.loads((realsr / "per_image.json").read_text())


def picture(realsr: Path, folder: str, key: str) -> np.ndarray:
    return read_image(str(realsr / folder / f"{key}.png"))


def test_another_papers_log_in_the_pyiqa_convention(realsr: Path, per_image: dict[str, dict]) -> None:
    """NIQE in the median alone: pyiqa's is in float32, so ties in the luma may move a block by a grid step."""
    assert len(per_image) == 12
    niqe_off = []
    for key, recorded in per_image.items():
        log = recorded["osediff_log"]
        sr, hr = picture(realsr, "osediff", key), picture(realsr, "hr", key)
        assert psnr_y(sr, hr, crop_border=0) == pytest.approx(log["psnr"], abs=1e-5)
        assert ssim_y(sr, hr, crop_border=0) == pytest.approx(log["ssim"], abs=1e-5)
        niqe_off.append(abs(niqe(sr, crop_border=0) - log["niqe"]))
    assert np.median(niqe_off) < 0.005


def test_niqe_of_the_ground_truth_is_the_published_tables_one(realsr: Path, per_image: dict[str, dict]) -> None:
    for key, recorded in per_image.items():
        assert niqe(picture(realsr, "hr", key)) == pytest.approx(recorded["hr_niqe_yiq_crop4"], abs=1e-9)
