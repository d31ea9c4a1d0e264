"""Draws of BSRGAN, BSRGAN-plus (Zhang et al. 2021) and plain bicubic: every random choice becomes a step."""

from typing import Any

import numpy as np

from degradation.config import Bicubic, Bsrgan, BsrganPlus
from degradation.second_order import draw_seed

Step = dict[str, Any]
_MODES = ("bilinear", "bicubic", "area")
# The covariance of BSRGAN's correlated noise has this level whatever noise level was drawn.
_CORRELATED_LEVEL = 25 / 255


def draw_bicubic(config: Bicubic, height: int, width: int, rng: np.random.Generator) -> list[Step]:
    """MATLAB's imresize alone; draws nothing."""
    return [_imresize(height // config.scale, width // config.scale), {"op": "clip"}]


def draw_bsrgan(config: Bsrgan, height: int, width: int, rng: np.random.Generator) -> list[Step]:
    """The seven shuffled operations (downsample2 before downsample3) and the final JPEG; H, W in px."""
    final = (height // config.scale, width // config.scale)
    scale = config.scale
    steps: list[Step] = []
    if scale == 4 and rng.random() < config.half_first:
        height, width, scale = height // 2, width // 2, 2
        half = _resize(height, width, rng) if rng.random() < 0.5 else _imresize(height, width)
        steps += [half, {"op": "clip"}]
    order = [str(name) for name in rng.permutation(["blur", "blur", "downsample2", "downsample3", "noise", "jpeg"])]
    early, late = sorted((order.index("downsample2"), order.index("downsample3")))
    order[early], order[late] = "downsample2", "downsample3"
    for name in order:
        if name == "blur":
            steps.append(_blur(config, scale, rng))
        elif name == "downsample2":
            steps += _downsample2(height, width, scale, rng)
        elif name == "downsample3":
            steps += [_resize(*final, rng), {"op": "clip"}]
        elif name == "noise":
            steps.append(_gaussian(config, rng))
        elif rng.random() < config.jpeg:
            steps.append(_jpeg(config, rng))
    return [*steps, _jpeg(config, rng)]


def draw_bsrgan_plus(config: BsrganPlus, height: int, width: int, rng: np.random.Generator) -> list[Step]:
    """Two rounds of (blur, resize, noises), a JPEG between them and one at the end, shuffled in part or in full."""
    scale = config.scale
    size = (height, width)
    noises = ["gaussian", "poisson", "speckle"]
    if rng.random() < config.shuffle:
        order = list(rng.permutation(["blur", "resize", *noises, "jpeg", "blur", "resize", *noises]))
    else:
        first, second = rng.permutation(noises), rng.permutation(noises)
        order = ["blur", "resize", *first, "jpeg", "blur", "resize", *second]
    steps: list[Step] = [{"op": "sharpen", "target": True}] if config.sharpen else []
    for name in order:
        if name == "blur":
            steps.append(_blur(config, scale, rng))
        elif name == "resize":
            factor = _plus_factor(scale, rng)
            size = (max(int(factor * size[0]), 1), max(int(factor * size[1]), 1))
            steps += [_resize(*size, rng), {"op": "clip"}]
        elif name == "gaussian":
            steps.append(_gaussian(config, rng))
        elif name == "poisson":
            if rng.random() < config.poisson:
                gray, photons = bool(rng.random() >= 0.5), float(10 ** rng.uniform(2, 4))
                steps.append({"op": "poisson", "photons": photons, "gray": gray, "seed": draw_seed(rng)})
        elif name == "speckle":
            if rng.random() < config.speckle:
                steps.append({**_gaussian(config, rng), "speckle": True})
        else:
            steps.append(_jpeg(config, rng))
    return [*steps, _resize(height // scale, width // scale, rng), _jpeg(config, rng)]


def _plus_factor(scale: int, rng: np.random.Generator) -> float:
    kind = rng.random()
    if kind > 0.8:
        return float(rng.uniform(1, 2))
    return float(rng.uniform(0.5 / scale, 1)) if kind < 0.7 else 1.0


def _downsample2(height: int, width: int, scale: int, rng: np.random.Generator) -> list[Step]:
    if rng.random() < 0.75:
        factor = rng.uniform(1, 2 * scale)
        return [_resize(int(height / factor), int(width / factor), rng), {"op": "clip"}]
    kernel = {"kind": "shifted", "size": 25, "sigma": float(rng.uniform(0.1, 0.6 * scale)), "scale": scale}
    return [{"op": "blur", "kernel": kernel}, {"op": "decimate", "factor": scale}, {"op": "clip"}]


def _resize(height: int, width: int, rng: np.random.Generator) -> Step:
    mode = _MODES[int(rng.integers(3))]
    return {"op": "resize", "height": max(height, 1), "width": max(width, 1), "mode": mode}


def _imresize(height: int, width: int) -> Step:
    return {"op": "resize", "height": height, "width": width, "mode": "imresize"}


def _blur(config: Bsrgan | BsrganPlus, scale: int, rng: np.random.Generator) -> Step:
    size = config.blur_sizes[int(rng.integers(len(config.blur_sizes)))]
    if rng.random() < 0.5:
        # The two draws are variances; their order is free, whatever the published docstring says.
        sigma = [float(max(v, 1e-12) ** 0.5) for v in rng.uniform(0, 4 + scale, 2)]
        kernel = {"kind": "aniso", "size": size, "sigma": sigma, "theta": float(rng.uniform(0, np.pi))}
    else:
        kernel = {"kind": "fspecial", "size": size, "sigma": float(rng.uniform(0, 2 + 0.2 * scale))}
    return {"op": "blur", "kernel": kernel}


def _gaussian(config: Bsrgan | BsrganPlus, rng: np.random.Generator) -> Step:
    low, high = config.noise_level
    level, kind, seed = int(rng.integers(int(low), int(high) + 1)), rng.random(), draw_seed(rng)
    if kind > 0.6 or kind < 0.4:
        return {"op": "gaussian", "sigma": level, "gray": bool(kind < 0.4), "seed": seed}
    basis = np.linalg.svd(rng.random((3, 3)))[0]
    covariance = np.abs(_CORRELATED_LEVEL**2 * basis.T @ np.diag(rng.random(3)) @ basis)
    # The elementwise absolute value may leave no covariance; NumPy's sampler then takes singular values, as here.
    _, singular, axes = np.linalg.svd(covariance)
    return {"op": "gaussian", "mixing": (axes.T * np.sqrt(singular)).tolist(), "seed": seed}


def _jpeg(config: Bsrgan | BsrganPlus, rng: np.random.Generator) -> Step:
    low, high = config.jpeg_quality
    return {"op": "libjpeg", "quality": int(rng.integers(int(low), int(high) + 1))}
