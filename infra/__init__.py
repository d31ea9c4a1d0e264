"""Floor 1: what every other floor stands on; nothing here knows about diffusion."""

from infra.errors import CcsrError, ClusterError, ConfigError, DataError, ModelError, PartialResultError, StorageError
from infra.seeding import Noise, noise_for, rng_for

__all__ = [
    "CcsrError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "ModelError",
    "Noise",
    "PartialResultError",
    "StorageError",
    "noise_for",
    "rng_for",
]
