"""A model as a diffusers pipeline; `standalone.py` writes this class and all that it uses into one file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file

from infra.errors import ConfigError
from infra.imaging.pictures import enlarged_size
from infra.seeding import noise_for
from training.config import SamplingConfig
from training.method import METHODS
from training.models.ccsr import CcsrModel, dtype_of
from training.models.library import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    ImagePipelineOutput,
    UNet2DConditionModel,
)
from training.models.stablesr import StableSrAdapter
from training.models.wrapping import FeatureWrapping
from training.restore.published_sizes import finish, network_input, reflect
from training.restore.seeded_runs import latent_unit, sample_latents

SAMPLING = SamplingConfig(tile=512).model_dump()
"""What `ccsr restore` does by default."""
BESIDE = {"adapter": StableSrAdapter, "wrapping": FeatureWrapping}
"""StableSR's own networks, which diffusers does not know."""


class CcsrPipeline(DiffusionPipeline, CcsrModel):
    """Enlarge an image: pipeline(image=..., seed=0).images[0]. The same seed and key give the same image."""

    _optional_components = ["controlnet", "condition_encoder"]  # noqa: RUF012
    controlnet: Any = None

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel = None,
        condition_encoder: AutoencoderKL = None,
        family: str = "v2",
        prediction: str = "eps",
        beside: tuple = (),
    ) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(vae=vae, unet=unet, controlnet=controlnet, condition_encoder=condition_encoder)
        self.register_to_config(family=family, prediction=prediction, beside=list(beside))
        self.beside = list(beside)
        self.generator = unet  # OSEDiff's: LoRAs are merged
        self.prompts: dict[str, Any] = {}
        self.wrapping = None

    @torch.inference_mode()
    def __call__(
        self,
        image: Image.Image | np.ndarray,
        seed: int = 0,
        scale: float = 4,
        key: str = "",
        run: int = 0,
        **sampling: Any,
    ) -> ImagePipelineOutput:
        """`image`: PIL, or uint8 RGB (H, W, 3). `key`: `ccsr restore` takes the file's name without suffix, and with
        `seed` and `run` it decides the noise. `sampling`: num_steps, t_max, t_min, tile, color_fix, guidance, ...
        """
        if unknown := set(sampling) - set(SAMPLING):
            names = ", ".join(SAMPLING)
            raise ConfigError(f"no setting is called {min(unknown)}", where="CcsrPipeline", todo=f"use one of {names}")
        config: Any = SimpleNamespace(**{**SAMPLING, **sampling})
        self._load_beside()
        lr = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
        size = enlarged_size(lr.shape[:2], scale)
        device = self.unet.device
        enlarged = network_input(lr, size, config, where=key).to(device)
        unit = self.factor * (latent_unit(self) if config.sizes == "pad" else 1)
        padded = reflect(enlarged, -enlarged.shape[-2] % unit, -enlarged.shape[-1] % unit)
        mean, std = self.encode_condition(padded)
        noise = noise_for(seed, [(key, run)], device, torch.float32)
        decoded = self.decode(sample_latents(self, mean, std, config, noise), padded, config.wrapping)
        epsilon = METHODS[self.config.family].color_epsilon
        return ImagePipelineOutput([Image.fromarray(finish((decoded + 1) / 2, enlarged, size, config, epsilon))])

    def _load_beside(self) -> None:
        """What diffusers does not load: the prompts' embeddings, and StableSR's own networks."""
        place = getattr(self.config, "_name_or_path", "")  # of from_pretrained: a folder or a hub id
        if not self.prompts:
            name = "prompt.safetensors"
            self.prompts = load_file(Path(place) / name if Path(place).is_dir() else hf_hub_download(place, name))
            for part in self.beside:
                setattr(self, part, BESIDE[part].from_pretrained(place, subfolder=part).eval())
        self.prompts = {text: embedding.to(self.unet.device) for text, embedding in self.prompts.items()}
        for part in self.beside:
            getattr(self, part).to(self.unet.device, dtype_of(self.unet))
