"""Networks: configured or subclassed diffusers classes, and their directories on disk."""

from training.models.ccsr import CcsrModel, build_model
from training.models.convert import convert_base, convert_v1, convert_v2
from training.models.directory import load_model, save_model
from training.models.discriminators import PatchDiscriminator, ProjectedDiscriminator
from training.models.networks import ModelConfig, seeded_init, with_latent_condition
from training.models.parameters import parameter_table
from training.models.perceptual import Dists, EncoderFeatures, Lpips, load_dino, load_dists, load_lpips

__all__ = [
    "CcsrModel",
    "Dists",
    "EncoderFeatures",
    "Lpips",
    "ModelConfig",
    "PatchDiscriminator",
    "ProjectedDiscriminator",
    "build_model",
    "convert_base",
    "convert_v1",
    "convert_v2",
    "load_dino",
    "load_dists",
    "load_lpips",
    "load_model",
    "parameter_table",
    "save_model",
    "seeded_init",
    "with_latent_condition",
]
