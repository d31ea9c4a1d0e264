"""Floor 3: networks, losses, samplers and the training loop of CCSR."""

from typing import Any

from infra.exports import load

# Loaded at first use: the schemas in `training.config` must not wait for torch.
_PLACES = {
    "discriminator_loss": "training.losses",
    "eps_loss": "training.losses",
    "generator_loss": "training.losses",
    "stage1_loss_v1": "training.losses",
    "stage1_loss_v2": "training.losses",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    return load(__name__, _PLACES, name)
