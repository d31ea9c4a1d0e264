"""Networks: configured or subclassed diffusers classes, and their directories on disk."""

from training.models.build import build_model
from training.models.ccsr import CcsrModel
from training.models.directory import load_model, save_model
from training.models.judges.discriminators import PatchDiscriminator, ProjectedDiscriminator, power_iteration
from training.models.judges.perceptual import Dists, EncoderFeatures, Lpips, load_dino, load_dists, load_lpips
from training.models.networks import seeded_init, with_latent_condition
from training.models.onestep import OneStepAdapter, OneStepModel
from training.models.remote import export_trained, fetch_model, model_id, publish_model
from training.models.stablesr import StableSrAdapter, StableSrModel
from training.models.wrapping import FeatureWrapping

__all__ = [
    "CcsrModel",
    "Dists",
    "EncoderFeatures",
    "FeatureWrapping",
    "Lpips",
    "OneStepAdapter",
    "OneStepModel",
    "PatchDiscriminator",
    "ProjectedDiscriminator",
    "StableSrAdapter",
    "StableSrModel",
    "build_model",
    "export_trained",
    "fetch_model",
    "load_dino",
    "load_dists",
    "load_lpips",
    "load_model",
    "model_id",
    "power_iteration",
    "publish_model",
    "save_model",
    "seeded_init",
    "with_latent_condition",
]
