"""Fresh models: the networks of a preset and a family with random weights."""

import torch
from torch import nn

from infra.errors import ConfigError
from training.config import ModelConfig
from training.models.ccsr import CcsrModel
from training.models.library import AutoencoderKL, UNet2DConditionModel
from training.models.networks import PROMPT_TOKENS, build_networks, latent_controlnet, seeded_init
from training.models.onestep import OneStepAdapter, OneStepModel
from training.models.stablesr import StableSrAdapter, StableSrModel

TINY_ADAPTER = {"width": 32, "hidden": 32}


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
    with seeded_init(seed):
        vae, unet = build_networks(config.preset)
        adapter = build_adapter(config, unet, vae)
    prompt = torch.zeros(1, PROMPT_TOKENS[config.preset], unet.config.cross_attention_dim)
    return model_class(config)(config, vae, unet, adapter, {"": prompt})


def build_adapter(config: ModelConfig, unet: UNet2DConditionModel, vae: AutoencoderKL) -> nn.Module:
    """A fresh adapter of the config's family for `unet`; random weights are drawn from torch's generator."""
    if config.family == "stablesr":
        return StableSrAdapter.for_unet(unet, **(TINY_ADAPTER if config.preset == "tiny" else {}))
    if config.family == "onestep":
        return OneStepAdapter.for_networks({"unet": unet, "vae": vae})
    return latent_controlnet(unet)


def model_class(config: ModelConfig) -> type[CcsrModel]:
    """The class of a family's models."""
    return {"stablesr": StableSrModel, "onestep": OneStepModel}.get(config.family, CcsrModel)
