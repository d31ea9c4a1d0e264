"""The training loop of one worker: batches in order, DeepSpeed steps, checkpoints, metrics from rank 0."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from infra.errors import ModelError
from infra.manifest import Manifest
from infra.tracking import Tracker
from training.checkpoint import (
    TrainingState,
    check_tensors,
    complete_checkpoints,
    engine_state,
    load_checkpoint,
    module_state,
    restore_engine,
    restore_module,
    save_checkpoint,
)
from training.config import TrainConfig
from training.ingest import Batch, SampleReader, updates
from training.models import CcsrModel
from training.steps import DecoderStage, Stage, build_stage


@dataclass
class WorkerContext:
    """What differs between workers, and where rank 0 reports to. `facts` goes into every checkpoint."""

    rank: int
    world_size: int
    device: str
    facts: Mapping[str, Any]
    tracker: Tracker | None = None
    on_update: Callable[[int, str], None] | None = None


def skip_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives: a machine without a compiler must do."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train(config: TrainConfig, manifests: list[Manifest], model: CcsrModel, context: WorkerContext) -> None:
    """Train to `num_updates`, from the newest complete checkpoint if there is one; the last one holds the result.

    torch.distributed must be initialised. Raises ModelError where the loss is not finite, with the batch's keys.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    stage = build_stage(model.to(context.device, dtype), config)
    engine, optimizer = _engine(stage, config, context)
    adversary = _Adversary(stage, config, context) if isinstance(stage, DecoderStage) else None
    done = _resume(config, engine, optimizer, adversary)
    reader = SampleReader(manifests, config)
    stream = updates(reader, config, start=done, rank=context.rank, world_size=context.world_size)
    began = waited_since = time.perf_counter()
    waited = 0.0
    for update, batches in enumerate(stream, start=done):
        waited += time.perf_counter() - waited_since
        learning_rate = _set_learning_rate(optimizer, config, update)
        terms = _update(engine, adversary, batches, update, config, context)
        finished = update + 1
        if finished % config.runtime.log_every == 0 or finished == config.num_updates:
            elapsed = time.perf_counter() - began
            rate = (finished - done) * config.global_batch_size / elapsed
            _report(
                context,
                finished,
                terms
                | {
                    "gradient_norm": float(engine.get_global_grad_norm() or 0),
                    "learning_rate": learning_rate,
                    "samples_per_second": rate,
                    "data_wait_share": waited / elapsed,
                },
                step=finished * config.global_batch_size,
            )
        if finished % config.runtime.checkpoint_every == 0 or finished == config.num_updates:
            _save(config, engine, optimizer, adversary, finished, context)
        waited_since = time.perf_counter()


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
    """The discriminator: plain replicated Adam, its gradients averaged over ranks (one engine per graph is enough)."""

    def __init__(self, stage: DecoderStage, config: TrainConfig, context: WorkerContext) -> None:
        self.stage = stage
        stage.discriminator.to(context.device).train()
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
        for parameter in self.module.parameters():
            if self.world_size > 1:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world_size
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _update(
    engine: Any,
    adversary: _Adversary | None,
    batches: list[Batch],
    update: int,
    config: TrainConfig,
    context: WorkerContext,
) -> dict[str, float]:
    """One optimiser update over this rank's micro-batches; the mean of each loss term over all ranks."""
    sums: dict[str, torch.Tensor] = {}
    for micro in batches:
        batch = Batch(micro.keys, micro.positions, micro.hr.to(context.device), micro.lr.to(context.device))
        if adversary is None:
            terms = engine(batch)
        else:
            terms = engine(batch, update=update)
            terms["d_loss"] = adversary.accumulate(len(batches))
        if not torch.isfinite(terms["loss"]):
            raise ModelError(
                f"the loss is {float(terms['loss'])} at update {update}",
                where=f"samples {', '.join(batch.keys)}",
                todo="lower the learning rate, or look at these samples; checkpoints up to here are kept",
            )
        engine.backward(terms["loss"])
        engine.step()
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=context.device)) + value.detach().float() / len(batches)
    if adversary is not None:
        adversary.step()
    means = torch.stack(list(sums.values()))
    if context.world_size > 1:
        torch.distributed.all_reduce(means)
        means /= context.world_size
    return dict(zip(sums, means.tolist(), strict=True))


def _report(context: WorkerContext, update: int, values: dict[str, float], *, step: int) -> None:
    if context.tracker is not None:
        context.tracker.metrics(values, step=step)
    if context.on_update is not None:
        context.on_update(update, f"loss {values['loss']:.4f}, {values['samples_per_second']:.1f} samples/s")


def _save(
    config: TrainConfig,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    adversary: _Adversary | None,
    num_updates: int,
    context: WorkerContext,
) -> None:
    tensors = engine_state(engine, optimizer)
    if context.rank == 0:
        if adversary is not None:
            tensors["discriminator"] = module_state(adversary.module, adversary.optimizer)
        facts = {"position": num_updates * config.global_batch_size, "num_updates": num_updates, **context.facts}
        save_checkpoint(config.output, TrainingState(facts, tensors), keep=config.runtime.keep_checkpoints)
    if context.world_size > 1:
        torch.distributed.barrier()


def _resume(config: TrainConfig, engine: Any, optimizer: torch.optim.Optimizer, adversary: _Adversary | None) -> int:
    """Restore the newest complete checkpoint; the number of updates it had done, 0 if there is none."""
    found = complete_checkpoints(config.output)
    if not found:
        return 0
    state = load_checkpoint(found[-1])
    check_tensors(found[-1], state.tensors["weights"], engine.module.trained)
    done = state.facts["num_updates"]
    restore_engine(engine, optimizer, state.tensors, done)
    if adversary is not None:
        restore_module(adversary.module, adversary.optimizer, state.tensors["discriminator"], done)
    return done
