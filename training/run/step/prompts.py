"""Captions as prompts: the base's own text tower, and a batch's embeddings."""

import torch
from torch import Tensor

from infra.errors import ModelError
from infra.files.weights import BASE, find_weights
from training.convert.text import TextTower
from training.data.batches import Batch
from training.models import CcsrModel

TOLERANCE = 1e-2  # of embeddings around 1: towers that were saved in half precision pass, another tower does not


class Prompts:
    """Embeddings of a batch's captions by the tower that made the model's empty prompt. ModelError where it is not
    here, or where the model was made without that tower."""

    def __init__(self, model: CcsrModel) -> None:
        tower = TextTower(find_weights(BASE, parts=("text_encoder", "tokenizer")))
        found, expected = tower(""), model.prompt
        if found.shape != expected.shape or not torch.allclose(found, expected.cpu(), atol=TOLERANCE, rtol=0):
            raise ModelError(
                f"the text tower of {BASE} does not make this model's empty prompt, so its captions would mean nothing",
                where="prompt: caption",
                todo="leave `prompt` out, or start from a model that `ccsr convert` made on that base",
            )
        self._tower = tower

    def __call__(self, batch: Batch) -> Tensor:
        """float32 (B, L, C) on the batch's device."""
        tower = self._tower.to(batch.hr.device)
        return torch.cat([tower(text) for text in batch.prompts])
