"""Kernels, operations and distributions against recordings of the published pipelines (data/degradation).

`operations.npz` holds every n-th row and column (`name__everyN`) of operations on the motorcycle photograph,
`samples_*.npz` the statistics of 658 (Real-ESRGAN) and 700 (BSRGAN) published draws on seven photographs.
"""

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from degradation_statistics import collect, distances
from wheel_photos import PHOTOS, patch

from degradation import degrade, filters, jpeg, kernels, load_preset
from degradation.resize import resize

pytest.importorskip("skimage", reason="the photographs come with the demo extra")
pytest.importorskip("sklearn", reason="the photographs come with the demo extra")
FOLDER = Path(__file__).parent / "data" / "degradation"
KERNELS = np.load(FOLDER / "kernels.npz")
OPERATIONS = {name.split("__every")[0]: name for name in np.load(FOLDER / "operations.npz").files}
CUTOFFS = {"pi5": np.pi / 5, "pi3": np.pi / 3, "pi": np.pi}
PREFIXES = {"g": "generalized_", "p": "plateau_", "": ""}


def kernel_called(name: str) -> np.ndarray:
    """The kernel that a recording's name describes."""
    if name == "usm_gauss51_1d":
        return kernels.usm_kernel()
    if match := re.fullmatch(r"bsrgan_aniso_k(\d+)_th([\d.]+)_l([\d.]+)_([\d.]+)", name):
        size, theta, *variances = match.groups()
        return kernels.bivariate("aniso", int(size), tuple(float(v) ** 0.5 for v in variances), float(theta))
    if match := re.fullmatch(r"bsrgan_fspecial_k(\d+)_s([\d.]+)", name):
        return kernels.truncated_gaussian(int(match[1]), float(match[2]))
    if match := re.fullmatch(r"bsrgan_shifted_k(\d+)_s([\d.]+)_sf(\d)", name):
        return kernels.shifted_gaussian(int(match[1]), float(match[2]), int(match[3]))
    if match := re.fullmatch(r"sinc_s(\d+)_w([\w.]+?)(_pad21)?", name):
        kernel = kernels.sinc(int(match[1]), CUTOFFS.get(match[2]) or float(match[2]))
        return np.pad(kernel, (21 - kernel.shape[0]) // 2) if match[3] else kernel
    if match := re.fullmatch(r"([gp]?)iso_s(\d+)_sx([\d.]+)(?:_b([\d.]+))?", name):
        prefix, size, sigma, beta = match.groups()
        return kernels.bivariate(PREFIXES[prefix] + "iso", int(size), (float(sigma),) * 2, beta=float(beta or 1))
    match = re.fullmatch(r"([gp]?)aniso_s(\d+)_([\d.]+)_([\d.]+)_r([-\d.]+)(?:_b([\d.]+))?", name)
    assert match, name
    prefix, size, sigma_x, sigma_y, theta, beta = match.groups()
    angle = np.pi / 4 if theta == "0.785" else float(theta)
    kind = PREFIXES[prefix] + "aniso"
    return kernels.bivariate(kind, int(size), (float(sigma_x), float(sigma_y)), angle, float(beta or 1))


@pytest.mark.parametrize("name", [name for name in KERNELS.files if not name.startswith("imresize")])
def test_kernels_are_the_published_ones(name: str) -> None:
    np.testing.assert_allclose(kernel_called(name), KERNELS[name], rtol=0, atol=1e-10)


@cache
def motorcycle() -> np.ndarray:
    photo = patch("motorcycle")
    digest = hashlib.sha256(photo.tobytes()).hexdigest()
    if not digest.startswith("6cd0da713b2eae32"):
        pytest.skip("OpenCV on this CPU scales the photograph to other bits than in the recording")
    return np.ascontiguousarray(photo.transpose(2, 0, 1)) * np.float32(1 / 255)


def operation_called(name: str) -> np.ndarray:
    """The operation that a recording's name describes, on the motorcycle: (3, H, W)."""
    planes = motorcycle()
    corner, jpeg_area = planes[:, :256, :256], planes[:, 100:217, 60:263]
    if match := re.fullmatch(r"interp_scale([\d.]+)_(\w+)", name):
        factor, mode = float(match[1]), match[2]
        size = int(256 * factor)
        return resize(corner, size, size, "adaptive") if mode == "area" else resize(corner, size, size, mode, factor)
    if match := re.fullmatch(r"interp_size(\d+)_(\w+)", name):
        return resize(corner, int(match[1]), int(match[1]), "adaptive" if match[2] == "area" else match[2])
    if match := re.fullmatch(r"diffjpeg_q([\d.]+)_.*", name):
        return jpeg.diffjpeg(jpeg_area, float(match[1]))
    if match := re.fullmatch(r"cv2jpeg_q(\d+)_.*", name):
        return jpeg.libjpeg(jpeg_area, int(match[1]))
    shifted = {"kind": "shifted", "size": 25, "sigma": 1.4, "scale": 4}
    operations: dict[str, Callable[[], np.ndarray]] = {
        "usm_torch": lambda: filters.sharpen(planes),
        "usm_cv2_usm_sharp_bgr_or_rgb": lambda: filters.sharpen(planes),
        "bsrgan_add_sharpening": lambda: filters.sharpen(planes),
        "filter2D_ganiso21": lambda: filters.blur(planes, KERNELS["ganiso_s21_2.4_0.7_r-1.1_b2.0"]),
        "filter2D_sinc21_pi5": lambda: filters.blur(planes, KERNELS["sinc_s21_wpi5"]),
        "shiftblur_bsrgan_sf4": lambda: filters.blur(planes, kernels.make_kernel(shifted))[:, ::4, ::4],
        "imresize_matlab_x0.25": lambda: resize(planes, 128, 128, "imresize"),
        "imresize_matlab_x0.5": lambda: resize(planes, 256, 256, "imresize"),
    }
    return operations[name]()


# PIL's border differs from MATLAB's, and these two are CCSR's bicubic transform, which is no preset here.
@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"ccsr_bicubic_down_aa_up_aa", "bicubic_down_aa_128"}))
def test_operations_give_the_published_pixels(name: str) -> None:
    stored = OPERATIONS[name]
    recorded, every = np.load(FOLDER / "operations.npz")[stored], int(stored.rsplit("every", 1)[1])
    difference = np.abs(operation_called(name).transpose(1, 2, 0)[::every, ::every] - recorded)
    # A DCT coefficient on a rounding tie may fall on the other side: then one 8 x 8 block differs.
    assert (difference > 1e-5).mean() <= (0.01 if name.startswith("diffjpeg") else 0)


def largest_distance(preset: str, draws: int) -> tuple[float, str, float]:
    """The largest Kolmogorov-Smirnov distance, its statistic, and the critical value over all (overall level 0.001)."""
    recorded = dict(np.load(FOLDER / f"samples_{preset}.npz"))
    config, photos = load_preset(preset), [patch(name) for name in PHOTOS]
    result = distances(recorded, collect(lambda hr, rng: degrade(hr, config, rng).lr, photos, draws))
    number = recorded["patch"].size
    critical = np.sqrt(-np.log(0.001 / (4 * len(result))) / 2 * (number + draws) / (number * draws))
    name = max(result, key=lambda statistic: result[statistic])
    return result[name], name, float(critical)


@pytest.mark.parametrize("preset", ["realesrgan", "bsrgan"])
def test_distribution_is_the_published_one(preset: str) -> None:
    distance, name, critical = largest_distance(preset, draws=140)
    assert distance < critical, f"{name}: {distance:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["realesrgan", "bsrgan"])
def test_distribution_is_the_published_one_in_detail(preset: str) -> None:
    distance, name, critical = largest_distance(preset, draws=1400)
    assert distance < critical, f"{name}: {distance:.3f}"
