"""The modules that DeepSpeed wraps, one per stage: their forward is the loss."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from infra.process.memory import to_device
from infra.seeding import noise_for, rng_for
from training.config import TrainConfig
from training.data.batches import Batch
from training.data.samples import LATENT_MOMENTS, SAMPLED
from training.losses import eps_terms, generator_loss
from training.method import METHODS
from training.models import CcsrModel, EncoderFeatures, Lpips, load_lpips
from training.run.step.critics import Critic, Discriminator, Regulariser
from training.run.step.prompts import Prompts
from training.sampling import Denoise


class Stage(nn.Module):
    """Base of the stages: `trained` is what the optimiser sees; everything else of the model is frozen.

    All randomness of a batch depends on (seed, position) of its samples.
    """

    def __init__(self, model: CcsrModel, trained: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        for network in model.networks.values():
            network.requires_grad_(False)
        self.trained = trained.requires_grad_(True)
        self.config = config
        # Not registered as submodules: DeepSpeed is to see the trained parameters only.
        self._frozen = (model, Prompts(model) if config.prompt == "caption" else None)
        self.method = METHODS[model.config.family]

    @property
    def model(self) -> CcsrModel:
        return self._frozen[0]

    def _denoiser(self, batch: Batch, z_lr: Tensor) -> Denoise:
        """The model's, under the batch's prompts."""
        prompts = self._frozen[1]
        return self.model.denoiser(z_lr, prompts(batch) if prompts else None)

    @property
    def critic(self) -> Critic | None:
        """What judges the stage's images, if anything does."""
        return None

    def _noise(self, batch: Batch, purpose: str) -> Callable[..., Tensor]:
        keys = [("noise", purpose, position) for position in batch.positions]
        return noise_for(self.config.seed, keys, batch.hr.device, torch.float32)

    def _timesteps(self, batch: Batch, end: int) -> Tensor:
        draws = [int(rng_for(self.config.seed, "timestep", p).integers(end)) for p in batch.positions]
        return to_device(torch.tensor(draws), batch.hr.device)

    @torch.no_grad()
    def encoded(self, batch: Batch) -> Batch:
        """The batch with the moments of its latents, as shards may store them."""
        moments = (*self.model.encode_moments(batch.hr), *self.model.encode_condition(batch.lr))
        return replace(batch, moments=dict(zip(LATENT_MOMENTS, moments, strict=True)))

    @torch.no_grad()
    def latents_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scaled latents of HR (a posterior sample) and LR, encoded here or before."""
        moments = batch.moments or self.encoded(batch).moments
        hr_mean, hr_std, lr_mean, lr_std = (moments[name] for name in LATENT_MOMENTS)
        z_hr = hr_mean + hr_std * self._noise(batch, "hr")(hr_mean.shape)
        return z_hr, self.method.condition(lr_mean, lr_std, self._noise(batch, "lr"))


class NoiseStage(Stage):
    """Stages 0 and 1: the adapter learns to predict noise, and in CCSR's stage 1 x0 at T and t_max too."""

    def __init__(self, model: CcsrModel, config: TrainConfig) -> None:
        super().__init__(model, model.trained_part(config.stage), config)

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """Named terms and "loss" of one micro-batch; see `training.losses`."""
        z_hr, z_lr = self.latents_of(batch)
        denoise, noise = self._denoiser(batch, z_lr), self._noise(batch, "steps")

        def timesteps(end: int) -> Tensor:
            return self._timesteps(batch, end)

        if self.config.stage == 0:
            return eps_terms(denoise, z_hr, timesteps, noise)
        return self.method.noise_terms(denoise, z_hr, z_lr, timesteps, noise, self.config)


class DecoderStage(Stage):
    """Stage 2: the decoder (StableSR: its feature wrapping) learns to turn the chain's x0 into the HR image.

    One chain serves both generator and discriminator; the published v1 runs it anew for each.
    """

    def __init__(self, model: CcsrModel, config: TrainConfig) -> None:
        super().__init__(model, model.trained_part(config.stage), config)
        # Not registered either: the one has its own optimiser, the other is frozen.
        critic = Regulariser(model, config, config.vsd, self._frozen[1]) if config.vsd else Discriminator(config)
        self._others = (critic, _perceptual(model, config.decoder_loss.perceptual))

    @property
    def critic(self) -> Critic:
        return self._others[0]

    def forward(self, batch: Batch, update: int) -> dict[str, Tensor]:
        """The generator's terms and "loss" of one micro-batch of an update, from 0; see `training.generator_loss`."""
        loss = self.config.decoder_loss
        latents = self.sampled_latents(batch)
        decoded = self.method.in_range(self.model.decode(latents, batch.lr))
        target = 2 * batch.hr - 1
        self.critic.watch(batch, update, latents, decoded, target)
        self.critic.trained.requires_grad_(False)  # the generator's backward leaves no gradient there
        terms = generator_loss(
            decoded,
            target,
            perceptual=self._others[1] if update >= loss.perceptual_start_update else None,
            discriminator=self.critic.judge,
            last_layer=self.model.vae.decoder.conv_out.weight,
            gan_weight=loss.gan_weight if update >= loss.gan_start_update else 0.0,
            adaptive=loss.adaptive,
            divide_by_batch=loss.divide_by_batch,
            reconstruction=loss.reconstruction,
            perceptual_weight=loss.perceptual_weight,
        )
        for name, term in self.critic.term().items():
            terms |= {name: term, "loss": terms["loss"] + term}
        self.critic.trained.requires_grad_(True)
        return terms

    @torch.no_grad()
    def sampled_latents(self, batch: Batch) -> Tensor:
        """What the chain makes of the batch, here or when the shards were made."""
        if SAMPLED in batch.moments:
            return batch.moments[SAMPLED]
        z_hr, z_lr = self.latents_of(batch)
        noise = self._noise(batch, "steps")
        return self.method.stage2_latents(self._denoiser(batch, z_lr), z_hr, z_lr, noise, self.config)


class OneStepStage(DecoderStage):
    """OSEDiff: UNet and VAE encoder learn, by LoRA, to make the HR image's latent of the LR image in one step."""

    def sampled_latents(self, batch: Batch) -> Tensor:
        """x0 from a sample of the LR image's posterior, as published."""
        mean, std = self.model.encode_condition(batch.lr)
        z_lr = mean + std * self._noise(batch, "lr")(mean.shape)
        denoise, noise = self._denoiser(batch, z_lr), self._noise(batch, "steps")
        return self.method.sample(denoise, denoise, z_lr, noise, self.config.trained_sampling)


def _perceptual(model: CcsrModel, name: str) -> Lpips | EncoderFeatures | None:
    if name == "lpips":
        return load_lpips().to(next(model.vae.parameters()).device)
    return EncoderFeatures(model.vae) if name == "encoder_features" else None


def build_stage(model: CcsrModel, config: TrainConfig) -> Stage:
    kinds = {"vsd": OneStepStage, "decoder_loss": DecoderStage}
    fields = model.config.facts.trains[config.stage]
    stage = next((kind for name, kind in kinds.items() if name in fields), NoiseStage)(model, config)
    if config.runtime.activation_checkpointing:  # frozen networks too: gradients pass through them
        for network in (*model.computing, *(stage.critic.computing if stage.critic else ())):
            network.enable_gradient_checkpointing()
    return stage
