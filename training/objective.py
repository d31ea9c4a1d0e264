"""What users write about the losses on images and on their latents."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import LATER, Config


class DecoderLossConfig(Config):
    """The loss on images, of stage 2 and of OSEDiff; see `training.generator_loss`. Defaults: v1's, but with a
    perceptual term that needs no file and a discriminator that learns from update 0 on (v1: 1).

    v2: l2, lpips, dino, gan_weight 0.05, neither adaptive nor divided, both terms from update 101 on. StableSR: l1,
    lpips, patch, gan_weight 0.025, not adaptive, GAN term and discriminator from update 501 on. OSEDiff: l2, lpips
    twice, not divided, and `vsd` in the GAN term's place.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: Literal["lpips", "encoder_features", "none"] = "encoder_features"
    perceptual_weight: Annotated[float, LATER] = Field(1.0, gt=0)
    perceptual_start_update: int = Field(0, ge=0, description="updates before this one train without that term")
    discriminator: Literal["patch", "dino"] = Field("patch", description="PatchGAN (v1) or DINO heads (v2)")
    gan_weight: float = Field(0.5, ge=0)
    adaptive: bool = True
    divide_by_batch: bool = True
    gan_start_update: int = Field(1, ge=0, description="updates before this one train without the GAN term")
    discriminator_start_update: int = Field(0, ge=0, description="before this update the discriminator learns nothing")
    discriminator_width: int = Field(64, ge=4, description="channels of the first PatchGAN layer")
    discriminator_learning_rate: float = Field(5e-6, gt=0)

    @property
    def adapts(self) -> bool:
        """Whether the GAN term's weight follows from gradients at the decoder's last layer."""
        return self.adaptive and self.gan_weight > 0

    def unused(self) -> dict[str, str]:
        unused = {"discriminator_width": "with discriminator: dino"} if self.discriminator == "dino" else {}
        perceptual = ("perceptual_weight", "perceptual_start_update") if self.perceptual == "none" else ()
        return unused | dict.fromkeys(perceptual, "with perceptual: none")

    def unused_in_fingerprint(self) -> dict[str, str]:
        """The discriminator itself learns all the same, and a run that continues from this one may use it."""
        return {} if self.gan_weight else {"gan_start_update": "with gan_weight: 0"}


class VsdConfig(Config):
    """Variational score distillation (Wang et al., "ProlificDreamer", 2023) as OSEDiff has it; see
    `training.losses.vsd_loss`. A second LoRA on the same UNet, the regulariser, learns what the generator makes."""

    weight: float = Field(1.0, gt=0)
    guidance: float = Field(7.5, ge=1, description="classifier-free guidance scale of the frozen UNet")
    prompt: str = Field("", description="a text whose embedding the model directory caches")
    negative_prompt: str = ""
    first_timestep: int = Field(20, ge=0, le=999)
    last_timestep: int = Field(979, ge=0, le=999)
    learning_rate: float = Field(5e-5, gt=0, description="the regulariser's")

    def unused(self) -> dict[str, str]:
        return {"negative_prompt": "with guidance: 1"} if self.guidance == 1 else {}

    @model_validator(mode="after")
    def _ordered(self) -> "VsdConfig":
        if self.first_timestep > self.last_timestep:
            raise ValueError(f"first_timestep ({self.first_timestep}) is above last_timestep ({self.last_timestep})")
        return self
