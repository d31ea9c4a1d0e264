"""Floor 4: quality and stability of restorations, measured, reported and compared."""

from typing import Any

from infra.exports import load

# Loaded at first use: the schemas in `evaluation.config` must not wait for OpenCV and SciPy.
_PLACES = {
    "StabilityAccumulator": "infra.imaging.pixels",
    "g_std": "evaluation.metrics.stability",
    "l_std": "infra.imaging.pixels",
    "l_std_equal_sharpness": "infra.imaging.pixels",
    "niqe": "evaluation.metrics.image",
    "niqe_bt601": "evaluation.metrics.image",
    "psnr_y": "infra.imaging.pixels",
    "sharpness": "evaluation.metrics.image",
    "ssim_y": "evaluation.metrics.image",
    "temporal_std": "evaluation.metrics.stability",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    return load(__name__, _PLACES, name)
