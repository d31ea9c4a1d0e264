"""Floor 3: networks, losses, samplers and the training loop of CCSR."""

from training.stage1 import eps_loss, stage1_loss_v1, stage1_loss_v2
from training.stage2 import discriminator_loss, generator_loss

__all__ = ["discriminator_loss", "eps_loss", "generator_loss", "stage1_loss_v1", "stage1_loss_v2"]
