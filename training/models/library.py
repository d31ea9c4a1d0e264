"""What we use of diffusers, imported without the optional packages and the compiler that it would load with it.

They would cost each process 3.4 of 8.5 CPU seconds, the compiler 1.2 of the rest (two cores, 2026-11-30 and 12-01), and
no class used here needs them. For good in a process, diffusers then believes that they are absent; we import peft,
transformers and bitsandbytes ourselves, and torch its compiler at the first optimiser or compiled block.
"""

from collections.abc import Callable
from typing import Any

import torch

from infra.process.imports import replaced, without


def _unmarked(fn: Callable | None = None, **_: Any) -> Any:
    """In place of torch.compiler.disable, which loads the compiler to mark functions that nothing here compiles."""
    return fn or _unmarked


with (
    replaced(torch.compiler, "disable", _unmarked),
    without("bitsandbytes", "boto3", "peft", "scipy", "torch._dynamo", "transformers", importing="diffusers"),
):
    from diffusers import (
        AutoencoderKL,
        ConfigMixin,
        ControlNetModel,
        DiffusionPipeline,
        ImagePipelineOutput,
        ModelMixin,
        UNet2DConditionModel,
    )
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, DownBlock2D, UNetMidBlock2D

__all__ = [
    "AttnDownBlock2D",
    "AutoencoderKL",
    "BasicTransformerBlock",
    "ConfigMixin",
    "ControlNetModel",
    "DiffusionPipeline",
    "DownBlock2D",
    "ImagePipelineOutput",
    "ModelMixin",
    "ResnetBlock2D",
    "TimestepEmbedding",
    "Timesteps",
    "UNet2DConditionModel",
    "UNetMidBlock2D",
    "register_to_config",
]
