"""Draws of the second-order chain (Real-ESRGAN, StableSR, CCSR): every random choice becomes a step of the trace."""

from typing import Any

import numpy as np

from degradation.config import AddedNoise, Blur, Resize, SecondOrder

Step = dict[str, Any]


def draw_steps(config: SecondOrder, height: int, width: int, rng: np.random.Generator) -> list[Step]:
    """The chain's steps for an HR image of (height, width) px; choices are per image, so no pair pool is needed."""
    small = (height // config.scale, width // config.scale)
    first, second = config.first, config.second
    steps: list[Step] = [] if config.sharpen == "none" else [{"op": "sharpen", "target": config.sharpen == "target"}]
    steps += _blur(first.blur, rng)
    factor, mode = _resize(first.resize, rng)
    if factor != 1:
        steps.append(_first_resize(config, height, width, factor, mode))
    steps += [_noise(first.noise, rng), _jpeg(config, first.jpeg_quality, rng)]
    steps += _blur(second.blur, rng)
    factor, mode = _resize(second.resize, rng)
    steps.append(_resize_to(config, int(small[0] * factor), int(small[1] * factor), mode))
    steps.append(_noise(second.noise, rng))
    last = _resize_to(config, *small, _choice(rng, second.resize.modes))
    sinc: list[Step] = []
    if rng.random() < config.final_sinc:
        sinc = [{"op": "blur", "kernel": _sinc(_choice(rng, second.blur.sizes), np.pi / 3, rng)}]
    jpeg = _jpeg(config, second.jpeg_quality, rng)
    return steps + ([jpeg, last, *sinc] if rng.random() < config.final_jpeg_first else [last, *sinc, jpeg])


def _first_resize(config: SecondOrder, height: int, width: int, factor: float, mode: str) -> Step:
    """The published chain gives the first resize a factor, not a size: the modes that interpolate then drift."""
    step = _resize_to(config, int(height * factor), int(width * factor), mode)
    return {**step, "factor": factor} if config.scale_drift and mode != "area" else step


def _resize_to(config: SecondOrder, height: int, width: int, mode: str) -> Step:
    if mode == "area" and config.area == "adaptive":
        mode = "adaptive"
    return {"op": "resize", "height": max(height, 1), "width": max(width, 1), "mode": mode}


def _resize(config: Resize, rng: np.random.Generator) -> tuple[float, str]:
    direction = weighted(rng, config.directions)
    low, high = config.range
    factor = {"up": rng.uniform(1, high), "down": rng.uniform(low, 1), "keep": 1.0}[direction]
    return float(factor), _choice(rng, config.modes)


def _blur(config: Blur, rng: np.random.Generator) -> list[Step]:
    if rng.random() >= config.probability:
        return []
    size = _choice(rng, config.sizes)
    if rng.random() < config.sinc:
        return [{"op": "blur", "kernel": _sinc(size, np.pi / 3 if size < 13 else np.pi / 5, rng)}]
    kind = weighted(rng, config.kinds)
    sigma_x, sigma_y, theta = rng.uniform(*config.sigma), rng.uniform(*config.sigma), rng.uniform(-np.pi, np.pi)
    isotropic = not kind.endswith("aniso")
    kernel = {
        "kind": kind,
        "size": size,
        "sigma": [float(sigma_x), float(sigma_x if isotropic else sigma_y)],
        "theta": 0.0 if isotropic else float(theta),
    }
    if "_" in kind:
        low, high = config.beta_plateau if kind.startswith("plateau") else config.beta_generalized
        kernel["beta"] = float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))
    return [{"op": "blur", "kernel": kernel}]


def _sinc(size: int, lowest: float, rng: np.random.Generator) -> Step:
    return {"kind": "sinc", "size": size, "cutoff": float(rng.uniform(lowest, np.pi))}


def _noise(config: AddedNoise, rng: np.random.Generator) -> Step:
    gray, seed = bool(rng.random() < config.gray), draw_seed(rng)
    if rng.random() < config.gaussian:
        return {"op": "gaussian", "sigma": float(rng.uniform(*config.sigma)), "gray": gray, "seed": seed}
    return {"op": "poisson", "scale": float(rng.uniform(*config.poisson_scale)), "gray": gray, "seed": seed}


def _jpeg(config: SecondOrder, qualities: tuple[float, float], rng: np.random.Generator) -> Step:
    quality = float(rng.uniform(*qualities))
    if config.jpeg_codec == "libjpeg":
        # libjpeg takes integers: up or down by chance, so that the mean quality stays.
        return {"op": "libjpeg", "quality": int(quality + rng.random())}
    return {"op": "diffjpeg", "quality": quality}


def draw_seed(rng: np.random.Generator) -> int:
    """A seed for a field of noise; below 2**53, so that every JSON reader keeps it."""
    return int(rng.integers(1 << 53))


def weighted(rng: np.random.Generator, table: dict) -> str:
    """One key of a table of probabilities."""
    return list(table)[int(rng.choice(len(table), p=np.array(list(table.values())) / sum(table.values())))]


def _choice(rng: np.random.Generator, options: tuple) -> Any:
    return options[int(rng.integers(len(options)))]
