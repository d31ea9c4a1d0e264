"""The training loop of one worker: batches in order, DeepSpeed steps, checkpoints, metrics from rank 0."""

import math
from contextlib import ExitStack, closing, nullcontext
from typing import Any

import torch

from infra.errors import ModelError, StoppedError
from infra.process.memory import to_device
from infra.shards.manifest import Manifest
from training.config import TrainConfig
from training.data.batches import Batch, updates
from training.data.samples import SampleReader
from training.models import CcsrModel
from training.run.agreement import WorkerContext, agree, all_objects, attempt, gathered, limit_collectives
from training.run.checkpoint import advice
from training.run.checkpointer import Checkpoints
from training.run.cost.requirements import check_memory, step_cost
from training.run.monitoring.health import Spikes, Stopwatch, by_rank
from training.run.monitoring.meter import Meter, Profile
from training.run.monitoring.mlflow_training import grouped
from training.run.monitoring.validation import Validation
from training.run.step.ahead import Mover, mover
from training.run.step.critics import TrainedCritic
from training.run.step.eight_bit import check_optimizer
from training.run.step.engine import averaged, make_engine, step, update_average
from training.run.step.stages import Stage, build_stage


def train(config: TrainConfig, manifests: list[Manifest], model: CcsrModel, context: WorkerContext) -> None:
    """Train to `num_updates`, from the newest intact checkpoint if there is one; the last one holds the result.

    torch.distributed must be initialised. A user's error ends all ranks: it is raised where it happened (ModelError
    with the batch's keys for a loss that is not finite), OtherRankError elsewhere. StoppedError, after a checkpoint,
    where the run was asked to stop.
    """
    stage, error = attempt(lambda: _stage(config, model, context))
    agree(context, error)
    engine, optimizer = make_engine(stage, config, context.world_size, context.device)
    limit_collectives(config.runtime.collective_timeout_seconds)
    critic = TrainedCritic(stage.critic, config, context) if stage.critic else None
    with ExitStack() as ends:
        checkpoints = ends.enter_context(Checkpoints(config, engine, optimizer, critic, context))
        done = checkpoints.resume()
        reader = SampleReader(manifests, config, checkpoints.order)
        stream = updates(reader, config, start=done, rank=context.rank, world_size=context.world_size)
        ends.enter_context(closing(stream))
        validation, error = attempt(lambda: Validation.load(config))
        agree(context, error)
        profiled = config.runtime.profile and context.rank == 0
        profile = ends.enter_context(Profile(config, context)) if profiled else None
        flops = step_cost(config).flops_per_sample if config.runtime.compile else None
        meter = Meter(config, context.device, context.world_size, flops_per_sample=flops)
        stopwatch, spikes = Stopwatch(context.device), Spikes()
        moved = mover(stage, config, context.device)
        for update in range(done, config.num_updates):
            batches, error = attempt(lambda: next(stream))
            meter.batch_arrived()  # before the others' have: a rank's wait is its own
            if agree(context, error or checkpoints.failure(), stop=context.stop_asked(update)):
                checkpoints.save(update)
                checkpoints.wait()
                saved = f"saved a checkpoint after {update} of {config.num_updates} updates" if update else ""
                raise StoppedError(
                    f"the run was asked to stop and {saved or 'had done no update: there was nothing to save'}",
                    where=config.output,
                    todo="run the same command again to resume",
                )
            learning_rate = config.optimizer.rate_at(update)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            terms = _update(engine, critic, batches, update, config, context, meter, stopwatch, moved)
            if config.ema is not None:
                update_average(engine, optimizer, config.ema.decay_at(update))
            meter.update_done(terms)
            finished = update + 1
            position = finished * config.global_batch_size
            if (marks := spikes(terms)) and context.tracker is not None:
                context.tracker.metrics(grouped(marks), step=position)
            if finished % config.runtime.log_every == 0 or finished == config.num_updates:
                terms["learning_rate"] = learning_rate
                rates = meter.values()
                context.measured(rates | {"forward_seconds": stopwatch.last})
                _report(context, finished, grouped(terms | rates) | by_rank(context, rates), step=position)
            scores = None
            if validation is not None and validation.due(finished):
                with meter.aside(), nullcontext() if config.ema is None else averaged(engine, optimizer):
                    scores = validation(stage.model, context, position)
            if finished % config.runtime.checkpoint_every == 0 or finished == config.num_updates:
                checkpoints.save(finished, scores)
            if profile is not None:
                profile.update_done()
            meter.wait_for_batch()


def _stage(config: TrainConfig, model: CcsrModel, context: WorkerContext) -> Stage:
    check_optimizer(config.optimizer)
    check_memory(model, config, context)
    return build_stage(model, config)


def _update(
    engine: Any,
    critic: TrainedCritic | None,
    batches: list[Batch],
    update: int,
    config: TrainConfig,
    context: WorkerContext,
    meter: Meter,
    stopwatch: Stopwatch,
    moved: Mover,
) -> dict[str, float]:
    """One optimiser update over this rank's micro-batches.

    Returns each loss term's mean over all samples, "loss_max" (the largest of all micro-batches), "gradient_norm" and
    the critic's "PREFIXgradient_norm" (before clipping), and which rank's forward passes took longest: unlike the rest
    of an update they wait for no other rank. ModelError with the samples' keys where one of them is not finite.
    """
    names: list[str] = []
    rows: list[torch.Tensor] = []
    gradient_norm = None
    for micro_step, batch in enumerate(moved(batches)):
        with meter.counting(micro_step):
            with stopwatch.running():
                terms = engine(batch, update=update)
            if critic is not None:
                terms[f"{critic.prefix}loss"] = critic.accumulate(len(batches))
            engine.backward(terms["loss"])
        gradient_norm = step(engine)
        names = list(terms)
        rows.append(torch.stack([value.detach().float() for value in terms.values()]))
    here = torch.stack(rows)
    largest = {"loss_max": here[:, names.index("loss")].max()}
    if critic is not None:
        largest[f"{critic.prefix}gradient_norm"] = critic.step()
    if gradient_norm is not None:
        largest["gradient_norm"] = torch.as_tensor(gradient_norm, device=context.device)
    largest["forward_seconds_max"] = to_device(torch.tensor(stopwatch.seconds()), context.device)
    over_ranks = gathered(context, torch.cat([here.mean(0), torch.stack(list(largest.values()))]))
    seconds = over_ranks[:, -1]
    slow = {"forward_seconds_mean": seconds.mean(), "slowest_rank": seconds.argmax().float()}
    numbers = torch.cat(
        [over_ranks[:, : len(names)].mean(0), over_ranks[:, len(names) :].amax(0), torch.stack(list(slow.values()))]
    )
    values = dict(zip([*names, *largest, *slow], numbers.tolist(), strict=True))
    # All ranks hold the same values, so all of them come here, without a check at each micro-step.
    wrong = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        own = [batch for batch, row in zip(batches, here.isfinite().all(1).tolist(), strict=True) if not row]
        agree(context, _not_finite(own, batches, wrong, update, context, config.output))
    return values


def _not_finite(
    own: list[Batch], batches: list[Batch], wrong: list[str], update: int, context: WorkerContext, output: str
) -> ModelError | None:
    """Collective. The error of a rank whose `own` micro-batches gave a loss that is not finite; where all losses of all
    ranks were finite and the gradient was not, each rank's error, with the keys of the whole update."""
    keys = [key for batch in own for key in batch.keys]
    if not any(all_objects(context, keys)):
        keys = [key for rank in all_objects(context, [key for batch in batches for key in batch.keys]) for key in rank]
    if not keys:
        return None
    return ModelError(
        f"not finite at update {update}: {', '.join(wrong)}",
        where=f"samples {', '.join(keys)}",
        todo=advice(output),
    )


def _report(context: WorkerContext, update: int, values: dict[str, float], *, step: int) -> None:
    if context.tracker is not None:
        context.tracker.metrics(values, step=step)
    if context.on_update is not None:
        context.on_update(update, f"loss {values['loss/loss']:.4f}, {values['speed/samples_per_second']:.1f} samples/s")
