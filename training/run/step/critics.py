"""Networks that judge what a stage makes, each trained beside it by its own optimiser: discriminator, regulariser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parameters_to_vector, vector_to_parameters

from infra.process.memory import to_device
from infra.seeding import noise_for, rng_for
from training.config import DecoderLossConfig, TrainConfig, VsdConfig
from training.data.batches import Batch
from training.losses import discriminator_loss, eps_loss, vsd_loss
from training.models import (
    OneStepAdapter,
    OneStepModel,
    PatchDiscriminator,
    ProjectedDiscriminator,
    load_dino,
    power_iteration,
    seeded_init,
)
from training.run.agreement import WorkerContext
from training.sampling import guided
from training.sampling.schedules import NUM_TIMESTEPS


class Critic:
    """`network` moves to the device, `trained`, a part of it, is what the optimiser sees and a checkpoint keeps as
    `name`; its loss and its gradient's norm are logged under `prefix`.

    A stage calls `watch` with what it computed from a batch; `term` and `judge` are then the critic's share in the
    stage's loss, and `loss` is the critic's own, which the worker computes outside the engine's forward: DeepSpeed
    hooks the backward of whatever that returns.
    """

    name: str
    prefix: str
    network: nn.Module
    trained: nn.Module
    learning_rate: float
    computing: tuple[Any, ...] = ()  # diffusers networks that it computes gradients through
    judge: Callable[[Tensor], Tensor] | None = None  # logits of an image, for `training.generator_loss`

    def watch(self, batch: Batch, update: int, latents: Tensor, decoded: Tensor, target: Tensor) -> None:
        """`latents` (B, 4, h, w) and `decoded`, their image in [-1, 1], carry the stage's gradient."""
        raise NotImplementedError

    def term(self) -> dict[str, Tensor]:
        """A named term of the stage's loss, already weighted, or none."""
        return {}

    def loss(self) -> Tensor:
        """Of what was watched last."""
        raise NotImplementedError


class Discriminator(Critic):
    """Of images: PatchGAN, or heads on DINO whose views are drawn by (seed, purpose, position)."""

    name, prefix = "discriminator", "d_"

    def __init__(self, config: TrainConfig) -> None:
        self._seed, self._settings = config.seed, config.decoder_loss
        self.learning_rate = config.decoder_loss.discriminator_learning_rate
        self.network = _discriminator(config.decoder_loss, config.seed)
        projected = isinstance(self.network, ProjectedDiscriminator)
        self.trained = self.network.heads if projected else self.network

    def watch(self, batch: Batch, update: int, latents: Tensor, decoded: Tensor, target: Tensor) -> None:
        logits = self.critic_logits(batch)
        learns = update >= self._settings.discriminator_start_update
        self.judge = lambda image: logits(image, "generator")
        self._last = (logits, target, decoded.detach(), learns)

    def critic_logits(self, batch: Batch) -> Callable[[Tensor, str], Tensor]:
        network = self.network
        if not isinstance(network, ProjectedDiscriminator):
            return lambda image, purpose: network(image)
        condition = network.condition(batch.lr)

        def logits(image: Tensor, purpose: str) -> Tensor:
            rngs = [rng_for(self._seed, "view", purpose, position) for position in batch.positions]
            return network(image, condition, rngs)

        return logits

    def loss(self) -> Tensor:
        logits, target, decoded, learns = self._last
        return learns * discriminator_loss(logits(target, "real"), logits(decoded, "fake"))


def _discriminator(loss: DecoderLossConfig, seed: int) -> PatchDiscriminator | ProjectedDiscriminator:
    if loss.discriminator == "dino":
        return ProjectedDiscriminator(load_dino("dino"), load_dino("dinov2"), seed=seed)
    return PatchDiscriminator(ndf=loss.discriminator_width, seed=seed)


class Regulariser(Critic):
    """OSEDiff's: a second LoRA on the base UNet, which learns to denoise what the first one makes.

    Its term, variational score distillation, moves the generator's latents from there to the base's own. `prompts`:
    of each batch, in the place of the config's one.
    """

    name = "regulariser"
    prefix = "regulariser_"

    def __init__(
        self, model: Any, config: TrainConfig, settings: VsdConfig, prompts: Callable[[Batch], Tensor] | None = None
    ) -> None:
        self._prompts, self._seed, self._settings = prompts, config.seed, settings
        self.learning_rate = settings.learning_rate
        with seeded_init(config.seed):
            self.trained = OneStepAdapter.for_networks({"unet": model.unet}, conv_in=False)
        self.network = self.trained
        self.model, self._base = model.with_adapter(self.trained), model.with_adapter(None)
        self.computing = (self.model.generator,)
        self._prompt, self._negative = (model.embedding(t) for t in (settings.prompt, settings.negative_prompt))

    def watch(self, batch: Batch, update: int, latents: Tensor, decoded: Tensor, target: Tensor) -> None:
        self._batch, self.latents = batch, latents
        if self._prompts:
            self._prompt = self._prompts(batch)

    def term(self) -> dict[str, Tensor]:
        cond, uncond = (self._denoiser(self._base, prompt) for prompt in (self._prompt, self._negative))
        first, last = self._settings.first_timestep, self._settings.last_timestep
        t, noise = self.draws("vsd", first, last + 1)
        frozen = guided(cond, uncond, self._settings.guidance)
        learned = self._denoiser(self.model, self._prompt)
        return {"vsd": self._settings.weight * vsd_loss(self.latents, learned, frozen, t=t, noise=noise)}

    def loss(self) -> Tensor:
        t, noise = self.draws("regulariser", 0, NUM_TIMESTEPS)
        return eps_loss(self._denoiser(self.model, self._prompt), self.latents.detach(), t=t, noise=noise)

    def _denoiser(self, model: OneStepModel, prompt: Tensor) -> Callable[..., Tensor]:
        return model.denoiser(self.latents.detach(), prompt)

    def draws(self, purpose: str, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Timesteps from `first` to `end` - 1 and noise, by (seed, purpose, position)."""
        positions, device = self._batch.positions, self.latents.device
        steps = [int(rng_for(self._seed, "timestep", purpose, p).integers(first, end)) for p in positions]
        noise = noise_for(self._seed, [("noise", purpose, p) for p in positions], device, torch.float32)
        return to_device(torch.tensor(steps), device), noise(self.latents.shape)


class TrainedCritic:
    """A stage's critic under replicated AdamW, on gradients averaged over ranks (one engine per graph is enough).

    Ranks start from equal weights and see equal gradients, so they stay equal; each checkpoint verifies it.
    """

    def __init__(self, critic: Critic, config: TrainConfig, context: WorkerContext) -> None:
        self.critic, self.name, self.prefix = critic, critic.name, critic.prefix
        nn.Module.to(critic.network, context.device)
        self.module = critic.trained
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=critic.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=context.device.startswith("cuda"),
        )
        self.clip_norm = config.optimizer.clip_norm
        self.world_size = context.world_size

    def accumulate(self, num_micro_steps: int) -> torch.Tensor:
        """Backward of the critic's loss on the last micro-batch; returns that loss."""
        loss = self.critic.loss()
        (loss / num_micro_steps).backward()
        return loss

    def step(self) -> torch.Tensor:
        """Collective. One update of the critic, then one power iteration of its spectral norms; the norm of its
        gradient before clipping."""
        gradients = [parameter.grad for parameter in self.module.parameters()]
        if self.world_size > 1:
            flat = parameters_to_vector(gradients)
            torch.distributed.all_reduce(flat)
            vector_to_parameters(flat / self.world_size, gradients)
        norm = get_total_norm(gradients)
        if self.clip_norm:
            clip_grads_with_norm_(self.module.parameters(), self.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        power_iteration(self.module)
        return norm
