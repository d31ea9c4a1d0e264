"""The training loop of one worker: batches in order, DeepSpeed steps, checkpoints, metrics from rank 0."""

import math
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from infra.errors import ModelError, StoppedError
from infra.manifest import Manifest
from training.config import TrainConfig
from training.ingest import Batch, updates
from training.measure import Meter, Profile
from training.memory import check_memory
from training.models import CcsrModel, power_iteration
from training.ranks import WorkerContext, agree, attempt, limit_collectives
from training.resume import Checkpoints
from training.samples import SampleReader
from training.steps import DecoderStage, Stage, build_stage
from training.validation import Validation


def skip_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives: a machine without a compiler must do."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train(config: TrainConfig, manifests: list[Manifest], model: CcsrModel, context: WorkerContext) -> None:
    """Train to `num_updates`, from the newest intact checkpoint if there is one; the last one holds the result.

    torch.distributed must be initialised. A user's error ends all ranks: it is raised where it happened (ModelError
    with the batch's keys for a loss that is not finite), OtherRankError elsewhere. StoppedError, after a checkpoint,
    where the run was asked to stop.
    """
    stage, error = attempt(lambda: _stage(config, model, context))
    agree(context, error)
    engine, optimizer = _engine(stage, config, context)
    limit_collectives(config.runtime.collective_timeout_seconds)
    adversary = _Adversary(stage, config, context) if isinstance(stage, DecoderStage) else None
    discriminator = (adversary.module, adversary.optimizer) if adversary else None
    with ExitStack() as ends:
        checkpoints = ends.enter_context(Checkpoints(config, engine, optimizer, discriminator, context))
        done = checkpoints.resume()
        reader = SampleReader(manifests, config)
        stream = updates(reader, config, start=done, rank=context.rank, world_size=context.world_size)
        ends.enter_context(closing(stream))
        validation, error = attempt(lambda: Validation.load(config))
        agree(context, error)
        profile = Profile(config, context.tracker) if config.runtime.profile and context.rank == 0 else None
        meter = Meter(config, context.device, context.world_size)
        for update in range(done, config.num_updates):
            batches, error = attempt(lambda: next(stream))
            if agree(context, error or checkpoints.failure(), stop=context.stop_asked(update)):
                checkpoints.save(update)
                raise StoppedError(
                    f"the run was asked to stop and saved a checkpoint after {update} of {config.num_updates} updates",
                    where=config.output,
                    todo="run the same command again to go on",
                )
            meter.batch_arrived()
            learning_rate = _set_learning_rate(optimizer, config, update)
            terms = _update(engine, adversary, batches, update, config, context, meter)
            meter.update_done(terms)
            finished = update + 1
            position = finished * config.global_batch_size
            if finished % config.runtime.log_every == 0 or finished == config.num_updates:
                gradient_norm = float(engine.get_global_grad_norm() or 0)
                terms |= {"gradient_norm": gradient_norm, "learning_rate": learning_rate}
                _report(context, finished, terms | meter.values(), step=position)
            scores = None
            if validation is not None and validation.due(finished):
                with meter.aside():
                    scores = validation(stage.model, context, position)
            if finished % config.runtime.checkpoint_every == 0 or finished == config.num_updates:
                checkpoints.save(finished, scores)
            if profile is not None:
                profile.update_done()
            meter.wait_for_batch()
        if profile is not None:
            profile.close()


def _stage(config: TrainConfig, model: CcsrModel, context: WorkerContext) -> Stage:
    check_memory(model, config, context)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return build_stage(model.to(context.device, dtype), config)


def _engine(stage: Stage, config: TrainConfig, context: WorkerContext) -> tuple[Any, torch.optim.Optimizer]:
    import deepspeed

    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [p for p in stage.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    accumulation = config.global_batch_size // (config.runtime.micro_batch_size * context.world_size)
    engine, *_ = deepspeed.initialize(
        model=stage,
        optimizer=optimizer,
        config={
            "train_batch_size": config.global_batch_size,
            "train_micro_batch_size_per_gpu": config.runtime.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": settings.clip_norm,
            "bf16": {"enabled": config.precision == "bf16"},
            "zero_optimization": {"stage": config.runtime.zero_stage},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    return engine, optimizer


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, update: int) -> float:
    settings = config.optimizer
    rate = settings.learning_rate * min(1.0, (update + 1) / max(1, settings.warmup_updates))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


class _Adversary:
    """The discriminator: replicated AdamW on gradients averaged over ranks (one engine per graph is enough).

    Ranks start from equal weights and see equal gradients, so they stay equal; each checkpoint verifies it.
    """

    def __init__(self, stage: DecoderStage, config: TrainConfig, context: WorkerContext) -> None:
        self.stage = stage
        stage.discriminator.to(context.device)
        self.module = stage.trained_discriminator
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=config.decoder_loss.discriminator_learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self.clip_norm = config.optimizer.clip_norm
        self.world_size = context.world_size

    def accumulate(self, num_micro_steps: int) -> torch.Tensor:
        """Backward of the discriminator's loss on the last micro-batch; returns that loss."""
        loss = self.stage.discriminator_loss()
        (loss / num_micro_steps).backward()
        return loss

    def step(self) -> None:
        """Collective. One update of the discriminator, then one power iteration of its spectral norms."""
        if self.world_size > 1:
            gradients = [parameter.grad for parameter in self.module.parameters()]
            flat = parameters_to_vector(gradients)
            torch.distributed.all_reduce(flat)
            vector_to_parameters(flat / self.world_size, gradients)
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        power_iteration(self.module)


def _update(
    engine: Any,
    adversary: _Adversary | None,
    batches: list[Batch],
    update: int,
    config: TrainConfig,
    context: WorkerContext,
    meter: Meter,
) -> dict[str, float]:
    """One optimiser update over this rank's micro-batches; the mean of each loss term over all ranks."""
    sums: dict[str, torch.Tensor] = {}
    losses: list[torch.Tensor] = []
    for micro_step, micro in enumerate(batches):
        batch = micro.to(context.device)
        with meter.counting(micro_step):
            if adversary is None:
                terms = engine(batch)
            else:
                terms = engine(batch, update=update)
                terms["d_loss"] = adversary.accumulate(len(batches))
            engine.backward(terms["loss"])
        engine.step()
        losses.append(terms["loss"].detach())
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=context.device)) + value.detach().float() / len(batches)
    if adversary is not None:
        adversary.step()
    means = torch.stack(list(sums.values()))
    if context.world_size > 1:
        torch.distributed.all_reduce(means)
        means /= context.world_size
    values = dict(zip(sums, means.tolist(), strict=True))
    if not math.isfinite(values["loss"]):  # on one rank is on all: the mean tells, without a check at each micro-step
        agree(context, _not_finite(losses, batches, update))
    return values


def _not_finite(losses: list[torch.Tensor], batches: list[Batch], update: int) -> ModelError | None:
    """The error that names this rank's samples, if the loss was not finite here."""
    bad = [(float(loss), batch) for loss, batch in zip(losses, batches, strict=True) if not torch.isfinite(loss)]
    if not bad:
        return None
    return ModelError(
        f"the loss is {bad[0][0]} at update {update}",
        where=f"samples {', '.join(key for _, batch in bad for key in batch.keys)}",
        todo="lower the learning rate, or look at these samples; checkpoints up to here are kept",
    )


def _report(context: WorkerContext, update: int, values: dict[str, float], *, step: int) -> None:
    if context.tracker is not None:
        context.tracker.metrics(values, step=step)
    if context.on_update is not None:
        context.on_update(update, f"loss {values['loss']:.4f}, {values['samples_per_second']:.1f} samples/s")
