"""Twelve real pairs with numbers that others measured (OSEDiff's log; Real-ESRGAN's scores), where they are at hand."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ncnn_weights import realesrgan_x4plus
from recordings import recordings

from evaluation import niqe, psnr_y, ssim_y
from evaluation.metrics.image import YIQ, rounded_luma, ssim_of_luma
from evaluation.scoring import load_gan, run_gan
from infra import DataError, ModelError
from infra.imaging.images import read_image


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


@pytest.fixture
def spandrel(monkeypatch: pytest.MonkeyPatch) -> None:
    """spandrel imports torchvision for two architectures that are not used here; without it its names are stubs."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.InterpolationMode = module.rotate = module.normalize = None
            monkeypatch.setitem(sys.modules, name, module)
    pytest.importorskip("spandrel", reason="kind: gan is the extra [gan]")


KEYS = [
    f"{camera}_{number:03d}_LR4" for camera, first in (("Canon", 4), ("Nikon", 2)) for number in range(first, 45, 8)
]


@pytest.mark.parametrize("key", [KEYS[0], *(pytest.param(key, marks=pytest.mark.slow) for key in KEYS[1:])])
def test_real_esrgan_scores_as_recorded(
    key: str, realsr: Path, per_image: dict, spandrel: None, tmp_path: Path
) -> None:
    """10 s a picture. The recorded SSIM is of full-swing luma; OSEDiff's log and the paper have BT.601's."""
    torch.save({"params_ema": realesrgan_x4plus()}, tmp_path / "RealESRGAN_x4plus.pth")
    network = load_gan(f"{tmp_path}/RealESRGAN_x4plus.pth")
    recorded, hr, lr = per_image[key]["realesrgan"], picture(realsr, "hr", key), picture(realsr, "lr", key)
    sr = run_gan(network, lr, hr.shape[:2], where=key)
    assert psnr_y(sr, hr) == pytest.approx(recorded["psnr_y_crop4"], abs=1e-4)
    assert psnr_y(sr, hr, crop_border=0) == pytest.approx(recorded["psnr_y_crop0"], abs=1e-4)
    yiq_ssim = ssim_of_luma(*(rounded_luma(image[4:-4, 4:-4], *YIQ) for image in (sr, hr)))
    assert yiq_ssim == pytest.approx(recorded["ssim_y_crop4"], abs=1e-5)
    assert niqe(sr) == pytest.approx(recorded["niqe_yiq_crop4"], abs=0.02)
    with pytest.raises(DataError, match="enlarges 4 times"):
        run_gan(network, lr[::2], hr.shape[:2], where="half")


def test_a_file_of_no_known_network_is_refused(spandrel: None, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no pickle")
    for name, reason in (("other.pth", "UnsupportedModelError"), ("broken.pth", r"\w+Error")):
        with pytest.raises(ModelError, match=f"no network that spandrel knows \\({reason}") as caught:
            load_gan(f"{tmp_path}/{name}")
        assert caught.value.where.endswith(name)
