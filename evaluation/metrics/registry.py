"""Every metric of a single output by its name, from arrays here, published weights or the optional extra."""

import math
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from evaluation.metrics.image import niqe, ssim_y
from infra.errors import DataError, ModelError
from infra.images import read_image
from infra.pixels import CROP_BORDER, psnr_y
from infra.storage import sha256_file
from infra.weights import find_weights, list_weights

UNAVAILABLE = "unavailable"
_WEIGHTS = {"lpips": ("alexnet", "lpips-alex"), "dists": ("vgg16", "dists"), "fid": ("inception",)}
_PACKAGES = {"musiq": "pyiqa", "clipiqa": "pyiqa", "fid": "torchmetrics"}
_NO_REFERENCE = ("niqe", "musiq", "clipiqa")


def metric_origins(metrics: Sequence[str]) -> dict[str, str]:
    """Metric -> what its numbers depend on (sha256 of weights, a package's version), or "unavailable".

    Metrics that need neither are left out; those of pyiqa are available where they load. Raises ModelError for a weight
    file that is there but another.
    """
    present = {row["name"] for row in list_weights() if row["state"] == "present"}
    origins = {}
    for metric in metrics:
        if metric not in _WEIGHTS and metric not in _PACKAGES:
            continue
        weights, package = _WEIGHTS.get(metric, ()), _PACKAGES.get(metric)
        release = _release(package) if package else ""
        loads = package != "pyiqa" or (release is not None and _pyiqa_metric(metric, "cpu") is not None)
        if release is None or not present.issuperset(weights) or not loads:
            origins[metric] = UNAVAILABLE
        else:
            parts = [f"{name} {sha256_file(find_weights(name))}" for name in weights]
            origins[metric] = ", ".join([*parts, *([f"{package} {release}"] if package else [])])
    return origins


def how_to_get(metric: str) -> str:
    """What makes an unavailable metric available; pyiqa fetches its weights itself, when it can reach the hub."""
    fetches = [f"ccsr weights fetch {name}" for name in _WEIGHTS.get(metric, ())]
    return " and ".join([*fetches, *(["pip install 'ccsr-cluster[metrics]'"] if metric in _PACKAGES else [])])


class Quality:
    """Scores outputs by `metrics`; networks are loaded once. `device`: where they run."""

    def __init__(self, metrics: Sequence[str], *, crop_border: int = CROP_BORDER, device: str = "cpu") -> None:
        self._crop_border, self._device = crop_border, device
        self._metrics = {name: self._make(name) for name in metrics if name != "fid"}

    def __call__(self, sr: np.ndarray, hr: np.ndarray | None) -> dict[str, float | None]:
        """Metric -> score of uint8 RGB (H, W, 3) images; None where it needs an HR and there is none, or where the
        image is too small or too flat for NIQE."""
        known = hr is not None
        return {
            name: metric(sr, hr) if known or name in _NO_REFERENCE else None for name, metric in self._metrics.items()
        }

    def _make(self, name: str) -> Callable[[np.ndarray, Any], float | None]:
        border = self._crop_border
        if name == "niqe":
            return lambda sr, _: _niqe_or_none(sr, border)
        if name in ("psnr_y", "ssim_y"):
            function = {"psnr_y": psnr_y, "ssim_y": ssim_y}[name]
            return lambda sr, hr: function(sr, hr, crop_border=border)
        network, low = self._network(name), -1.0 if name == "lpips" else 0.0
        if name in _NO_REFERENCE:
            return lambda sr, _: _score(network, self._tensor(sr, low))
        return lambda sr, hr: _score(network, self._tensor(sr, low), self._tensor(hr, low))

    def _network(self, name: str) -> Any:
        if name in _PACKAGES:
            network = _pyiqa_metric(name, self._device)
            if network is None:
                raise ModelError(
                    f"pyiqa cannot load {name} here, though it could where the job began",
                    where=f"{name}, on {self._device}",
                    todo="give every node the same packages and weights, or leave the metric out",
                )
            return network
        from training.models import load_dists, load_lpips

        network = load_lpips(trunk="alexnet") if name == "lpips" else load_dists()
        return network.to(self._device)

    def _tensor(self, image: np.ndarray, low: float) -> Any:
        """float32 (1, 3, H, W) in [low, 1], without the border."""
        import torch

        height, width = image.shape[:2]
        border = self._crop_border
        inside = np.ascontiguousarray(image[border : height - border, border : width - border])
        tensor = torch.from_numpy(inside).to(self._device).permute(2, 0, 1)[None] / 255
        return tensor * (1 - low) + low


def fid(outputs: Sequence[str], references: Sequence[str], *, device: str = "cpu") -> float:
    """Frechet Inception distance (Heusel et al. 2017) of two lists of image files, whole images, by torchmetrics.

    Inception of 2015-12-05, 2048 features, its own bilinear resize to 299 px. Rank-deficient below 2048 images: never
    compare it across set sizes. Raises DataError for fewer than two images.
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(outputs), len(references)) < 2:
        raise DataError("FID needs two images or more", where="test set", todo="leave fid out")
    weights = str(find_weights("inception"))
    distance = FrechetInceptionDistance(2048, feature_extractor_weights_path=weights).to(device)
    for uris, real in ((references, True), (outputs, False)):
        for uri in uris:
            picture = torch.from_numpy(read_image(uri).copy()).permute(2, 0, 1)[None].to(device)
            distance.update(picture, real=real)
    return float(distance.compute())


def _score(network: Any, *images: Any) -> float | None:
    import torch

    with torch.inference_mode():
        value = float(network(*images))
    return value if math.isfinite(value) else None


def _niqe_or_none(sr: np.ndarray, crop_border: int) -> float | None:
    try:
        return niqe(sr, crop_border=crop_border)
    except DataError:  # too small or too flat for this metric: unavailable, not a number
        return None


def _pyiqa_metric(name: str, device: str) -> Any:
    """The metric, or None where pyiqa or its weights are missing; it fetches those itself."""
    try:
        import pyiqa

        return pyiqa.create_metric(name, device=device)
    except (ImportError, OSError, RuntimeError, ValueError):
        return None


def _release(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
