"""Floor 1: what every other floor is built on; nothing here knows about diffusion."""

from typing import Any

from infra.exports import load

# Loaded at first use: a config must not wait for NumPy.
_PLACES = {
    "CcsrError": "infra.errors",
    "ClusterError": "infra.errors",
    "ConfigError": "infra.errors",
    "DataError": "infra.errors",
    "ModelError": "infra.errors",
    "Noise": "infra.seeding",
    "PartialResultError": "infra.errors",
    "StorageError": "infra.errors",
    "noise_for": "infra.seeding",
    "rng_for": "infra.seeding",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    return load(__name__, _PLACES, name)
