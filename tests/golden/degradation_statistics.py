"""Statistics of a degraded photograph and their distance from the recordings of the published pipelines."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

_LAPLACIAN_OF_LAPLACIAN = np.float32([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])


def statistics(hr: np.ndarray, lr: np.ndarray) -> dict[str, float]:
    """Noise, sharpness, blocking, colour, clipping and displacement of uint8 `lr` (h, w, 3) from `hr` (4h, 4w, 3)."""
    height, width = lr.shape[:2]
    enlarged = cv2.resize(lr, (hr.shape[1], hr.shape[0]), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    luma, clean = _luma(lr), _luma(cv2.resize(hr, (width, height), interpolation=cv2.INTER_AREA))
    laplacian = cv2.Laplacian(luma, cv2.CV_32F, ksize=1)[1:-1, 1:-1]
    rgb = lr.astype(np.float32)
    bands, clean_bands = _bands(luma), _bands(clean)
    shift = rgb.mean((0, 1)) - hr.astype(np.float32).mean((0, 1))
    moved = _displacement(luma, clean)
    return {
        "psnr_up": 10 * np.log10(255**2 / max(np.mean((enlarged - hr) ** 2), 1e-6)),
        "noise_mad": 1.4826 * np.median(np.abs(laplacian - np.median(laplacian))) / np.sqrt(20),
        "noise_luma": _immerkaer(luma),
        "noise_chroma": (_immerkaer((rgb[..., 2] - luma) * 0.564) + _immerkaer((rgb[..., 0] - luma) * 0.713)) / 2,
        "hf_log_ratio": np.log10(bands[0] / clean_bands[0]),
        "mf_log_ratio": np.log10(bands[1] / clean_bands[1]),
        "blockiness": np.mean([_blocking(np.abs(np.diff(image, axis=1)).mean(0)) for image in (luma, luma.T)]),
        "shift_abs": np.abs(shift).mean(),
        "shift_r": shift[0],
        "shift_g": shift[1],
        "shift_b": shift[2],
        "contrast_ratio": luma.std() / (clean.std() + 1e-3),
        "clip_frac": ((lr == 0) | (lr == 255)).mean(),
        "disp_x": moved[0],
        "disp_y": moved[1],
    }


def collect(
    degrade: Callable[[np.ndarray, np.random.Generator], np.ndarray], photos: Sequence[np.ndarray], draws: int
) -> dict[str, np.ndarray]:
    """(draws,) values per statistic, and `patch`, the photo of each draw: k modulo their number."""
    rows = [
        statistics(photos[k % len(photos)], degrade(photos[k % len(photos)], np.random.default_rng([1, k])))
        for k in range(draws)
    ]
    values = {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}
    return {**values, "patch": np.arange(draws) % len(photos)}


def distances(recorded: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, float]:
    """Kolmogorov-Smirnov distance per statistic: the larger of raw and centred by each photo's recorded median."""
    result = {}
    for name in new.keys() - {"patch"}:
        old, ours = recorded[name].astype(np.float64), new[name].astype(np.float64)
        medians = np.array([np.median(old[recorded["patch"] == p]) for p in range(recorded["patch"].max() + 1)])
        centred = kolmogorov_smirnov(old - medians[recorded["patch"]], ours - medians[new["patch"]])
        result[name] = max(kolmogorov_smirnov(old, ours), centred)
    return result


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference between the empirical distribution functions of two samples."""
    values = np.concatenate([a, b])
    return float(
        np.abs(
            np.searchsorted(np.sort(a), values, side="right") / a.size
            - np.searchsorted(np.sort(b), values, side="right") / b.size
        ).max()
    )


def _luma(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])


def _bands(luma: np.ndarray) -> tuple[float, float]:
    """Energy of the upper half and of the quarter below it of a square image's spectrum."""
    window = np.hanning(luma.shape[0]).astype(np.float32)
    energy = np.abs(np.fft.rfft2((luma - luma.mean()) * window[:, None] * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(luma.shape[0])[:, None], np.fft.rfftfreq(luma.shape[0]))
    return energy[radius >= 0.25].sum() + 1e-3, energy[(radius >= 0.125) & (radius < 0.25)].sum() + 1e-3


def _immerkaer(plane: np.ndarray) -> float:
    """Noise level (Immerkaer 1996)."""
    return float(np.sqrt(np.pi / 2) / 6 * np.abs(cv2.filter2D(plane, -1, _LAPLACIAN_OF_LAPLACIAN)[1:-1, 1:-1]).mean())


def _blocking(steps: np.ndarray) -> float:
    border = np.arange(steps.size) % 8 == 7
    return steps[border].mean() / (steps[~border].mean() + 1e-3)


def _displacement(luma: np.ndarray, clean: np.ndarray) -> tuple[float, float]:
    """Sub-pixel shift (x, y) of `luma` against `clean`, by least squares on the smoothed gradients."""
    smooth, target = cv2.GaussianBlur(luma, (0, 0), 1.5), cv2.GaussianBlur(clean, (0, 0), 1.5)
    x = cv2.Sobel(target, cv2.CV_32F, 1, 0, ksize=3, scale=0.125)
    y = cv2.Sobel(target, cv2.CV_32F, 0, 1, ksize=3, scale=0.125)
    system = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], 1).astype(np.float64)
    solution = np.linalg.lstsq(system.T @ system, system.T @ (smooth - target).ravel(), rcond=None)[0]
    return -solution[0], -solution[1]
