"""Every metric of a single output by its name, from arrays here, published weights or the optional extra."""

import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from evaluation.metrics.image import niqe, niqe_bt601, ssim_y
from evaluation.metrics.names import METRICS
from infra.errors import ConfigError, DataError, ModelError, line_of
from infra.files.storage import sha256_file
from infra.files.weights import find_weights, list_weights
from infra.imaging.images import read_image
from infra.imaging.pixels import CROP_BORDER, psnr_y

UNAVAILABLE = "unavailable"
PYIQA = "pyiqa:"  # any metric of that package: pyiqa:maniqa-pipal
_WEIGHTS = {"lpips": ("alexnet", "lpips-alex"), "dists": ("vgg16", "dists"), "fid": ("inception",)}
_OURS = {"psnr_y": psnr_y, "ssim_y": ssim_y}
_NIQE = {"niqe": niqe, "niqe_bt601": niqe_bt601}
_NO_REFERENCE = (*_NIQE, "musiq", "clipiqa")


def metric_origins(metrics: Sequence[str]) -> dict[str, str]:
    """Metric -> what its numbers depend on (sha256 of weights, a package's version), or "unavailable".

    Metrics that need neither are left out. Unavailable: the package or weights are not here. Raises ModelError for a
    weight file with a wrong sha256 and for a metric of pyiqa that does not load although both are here, ConfigError
    for a name that pyiqa does not know.
    """
    present = {row["name"] for row in list_weights() if row["state"] == "present"}
    origins = {}
    for metric in metrics:
        weights, package = _WEIGHTS.get(metric, ()), _package(metric)
        if not weights and not package:
            continue
        release = installed_version(package) if package else ""
        here = release is not None and present.issuperset(weights)
        if not here or (package == "pyiqa" and _pyiqa_metric(metric, "cpu") is None):
            origins[metric] = UNAVAILABLE
        else:
            parts = [f"{name} {sha256_file(find_weights(name))}" for name in weights]
            origins[metric] = ", ".join([*parts, *([f"{package} {release}"] if package else [])])
    return origins


def metric_directions(metrics: Sequence[str]) -> dict[str, int]:
    """Of pyiqa's metrics, as that package states them: +1 where higher is better, -1 where lower is."""
    ours = [metric for metric in metrics if metric.startswith(PYIQA) and installed_version("pyiqa")]
    return {metric: -1 if _pyiqa_config(metric).get("lower_better", False) else 1 for metric in ours}


def fetch_pyiqa(metric: str) -> None:
    """Have pyiqa download the weights of `metric` (`pyiqa:NAME`) to its own caches: TORCH_HOME and HF_HOME.

    Raises ConfigError for an unknown name, ModelError where the package or the weights are missing.
    """
    os.environ["HF_HUB_OFFLINE"] = "0"  # this command is the one that may fetch
    if "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = False
    if installed_version("pyiqa") is None or _pyiqa_metric(metric, "cpu") is None:
        raise ModelError(
            f"the weights of {metric} could not be fetched" if installed_version("pyiqa") else "pyiqa is not installed",
            where=metric,
            todo="check the network" if installed_version("pyiqa") else "pip install 'ccsr-cluster[metrics]'",
        )


def how_to_get(metric: str) -> str:
    """What makes an unavailable metric available."""
    package = _package(metric)
    names = [f"{PYIQA}{metric.removeprefix(PYIQA)}"] if package == "pyiqa" else _WEIGHTS.get(metric, ())
    installs = ["pip install 'ccsr-cluster[metrics]'"] if package and installed_version(package) is None else []
    return " and ".join([*installs, *(f"ccsr weights fetch {name}" for name in names)])


class Quality:
    """Scores outputs by `metrics`; networks are loaded once. `device`: where they run."""

    def __init__(self, metrics: Sequence[str], *, crop_border: int = CROP_BORDER, device: str = "cpu") -> None:
        self._crop_border, self._device = crop_border, device
        self._metrics = {name: self._make(name) for name in metrics if name != "fid"}

    def __call__(
        self, sr: np.ndarray, hr: np.ndarray | None, *, crop_border: int | None = None
    ) -> dict[str, float | None]:
        """Metric -> score of uint8 RGB (H, W, 3) images; None where it needs an HR and there is none, or where the
        image is too small or too flat for NIQE. `crop_border`: another one for this call."""
        known, border = hr is not None, self._crop_border if crop_border is None else crop_border
        return {
            name: metric(sr, hr, border) if known or not _needs_reference(name) else None
            for name, metric in self._metrics.items()
        }

    def _make(self, name: str) -> Callable[[np.ndarray, Any, int], float | None]:
        if name in _NIQE:
            return lambda sr, _, border: _niqe_or_none(_NIQE[name], sr, border)
        if name in _OURS:
            return lambda sr, hr, border: _OURS[name](sr, hr, crop_border=border)
        network, low = self._network(name), -1.0 if name == "lpips" else 0.0
        if not _needs_reference(name):
            return lambda sr, _, border: _score(name, network, self._tensor(sr, low, border))
        return lambda sr, hr, border: _score(name, network, *(self._tensor(one, low, border) for one in (sr, hr)))

    def _network(self, name: str) -> Any:
        if _package(name) == "pyiqa":
            network = _pyiqa_metric(name, self._device)
            if network is None:
                raise ModelError(
                    f"pyiqa has no weights for {name} here, though it had where the job began",
                    where=f"{name}, on {self._device}",
                    todo="give every node the same packages and weights, or leave the metric out",
                )
            return network
        from training.models import load_dists, load_lpips

        network = load_lpips(trunk="alexnet") if name == "lpips" else load_dists()
        return network.to(self._device)

    def _tensor(self, image: np.ndarray, low: float, border: int) -> Any:
        """float32 (1, 3, H, W) in [low, 1], without the border."""
        import torch

        height, width = image.shape[:2]
        inside = image[border : height - border, border : width - border].copy()
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


def _score(name: str, network: Any, *images: Any) -> float | None:
    import torch

    try:
        with torch.inference_mode():
            value = float(network(*images))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of pyiqa's hundred metrics each has its own
        if "allocate memory" in str(error):
            raise
        height, width = images[0].shape[-2:]
        raise DataError(
            f"{name} does not score {width}x{height} px ({type(error).__name__}: {line_of(error)})",
            where=f"metrics: {name}",
            todo="use larger images, or leave the metric out",
        ) from error
    return value if math.isfinite(value) else None


def _niqe_or_none(metric: Callable[..., float], sr: np.ndarray, crop_border: int) -> float | None:
    try:
        return metric(sr, crop_border=crop_border)
    except DataError:  # too small or too flat for this metric: unavailable, not a number
        return None


def _package(metric: str) -> str | None:
    if metric in ("musiq", "clipiqa") or metric.startswith(PYIQA):
        return "pyiqa"
    return "torchmetrics" if metric == "fid" else None


def _needs_reference(metric: str) -> bool:
    if metric.startswith(PYIQA):
        return _pyiqa_config(metric).get("metric_mode") == "FR"
    return metric in METRICS and metric not in _NO_REFERENCE


def _pyiqa_config(metric: str) -> dict[str, Any]:
    """pyiqa's entry of one of its metrics. ConfigError for a name it does not know, or of a whole set's metric."""
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    name = metric.removeprefix(PYIQA)
    singles = DEFAULT_CONFIGS.keys() - {"fid", "sfid", "fid_dinov2", "inception_score"}
    if name not in singles:
        near = difflib.get_close_matches(name, sorted(singles), n=3)
        raise ConfigError(
            f"pyiqa has no metric of single images called {name!r}",
            where=f"metrics: {metric}",
            todo=f"did you mean {' or '.join(near)}?"
            if near
            else "python -c 'import pyiqa; print(pyiqa.list_models())'",
        )
    return DEFAULT_CONFIGS[name]


def _pyiqa_metric(metric: str, device: str) -> Any:
    """The metric's network; None where its weights are missing and cannot be fetched. ModelError for another reason."""
    try:
        import pyiqa

        if metric.startswith(PYIQA):
            _pyiqa_config(metric)
        return pyiqa.create_metric(metric.removeprefix(PYIQA), device=device)
    except OSError:  # urllib's, requests' and the hub's errors are OSErrors, a missing file is one too
        return None
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "pyiqa":
            return None
        raise ModelError(
            f"pyiqa is here but {metric} does not load ({type(error).__name__}: {line_of(error)})",
            where=f"{metric}, on {device}",
            todo="install or update the package that it names, or take the metric out of `metrics`",
        ) from error


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
