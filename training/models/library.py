"""What we use of diffusers, imported without the optional packages that it would load with it.

They would cost each process 3.4 of 8.5 CPU seconds (two cores, 2026-11-30), and no class used here needs them. For good
in a process, diffusers then believes that they are absent; we import peft, transformers and bitsandbytes ourselves.
"""

from infra.process.imports import without

with without("bitsandbytes", "boto3", "peft", "scipy", "transformers", importing="diffusers"):
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
