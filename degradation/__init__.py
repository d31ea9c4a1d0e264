"""Floor 2: HR -> LR on the CPU; pure functions without files, Ray or global random state."""

from typing import Any

from infra.exports import load

# Loaded at first use: a config that names a recipe must not wait for OpenCV and torch.
_PLACES = {
    "PRESETS": "degradation.presets",
    "DegradationConfig": "degradation.config",
    "DegradedPair": "degradation.pipeline",
    "apply": "degradation.pipeline",
    "degrade": "degradation.pipeline",
    "draw": "degradation.pipeline",
    "load_preset": "degradation.presets",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    return load(__name__, _PLACES, name)
