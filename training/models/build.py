"""Fresh models: the networks of a preset and a family with random weights."""

import torch

from infra.errors import ConfigError
from training.config import ModelConfig
from training.models.ccsr import CcsrModel
from training.models.networks import PROMPT_TOKENS, build_networks, seeded_init
from training.models.onestep import OneStepModel
from training.models.stablesr import StableSrModel

MODELS: dict[str, type[CcsrModel]] = {
    "v1": CcsrModel,
    "v2": CcsrModel,
    "stablesr": StableSrModel,
    "onestep": OneStepModel,
}
"""By `model.family`."""


def build_model(config: ModelConfig, seed: int) -> CcsrModel:
    """Random float32 weights on CPU, a function of `seed` alone; the prompt embedding is zero until it is converted.

    A ControlNet starts as a copy of the UNet's encoder whose output and condition convolutions are zero, a LoRA with a
    second matrix of zeros, so that the first prediction is the UNet's own. Networks are in train mode. Raises
    ConfigError for preset `custom`.
    """
    if config.preset == "custom":
        raise ConfigError(
            "preset 'custom' cannot be built", where="model.preset", todo="use 'tiny' or 'sd21', or load a directory"
        )
    model = MODELS[config.family]
    with seeded_init(seed):
        vae, unet = build_networks(config.preset)
        adapter = model.fresh_adapter(unet, vae, config.preset)
    prompt = torch.zeros(1, PROMPT_TOKENS[config.preset], unet.config.cross_attention_dim)
    return model(config, vae, unet, adapter, {"": prompt})
