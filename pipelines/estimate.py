"""`ccsr estimate`: shards, bytes and core-hours of a shard config; hours, cost and placement of a train config; the
parameters of a model."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.display.progress import progress
from infra.display.table import Cell, Table, cell
from infra.errors import ConfigError
from infra.manifest import ShardRecord
from pipelines.sharding.card import evenly
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import latent_encoder, resolve_degradation, write_shard
from pipelines.sharding.plan import plan_shards
from pipelines.sharding.sources import SourceFile, list_sources
from training.config import TrainConfig

if TYPE_CHECKING:
    from training.run.requirements import StepCost

NUM_FILES = 16
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Amount:
    """An estimated total and two standard errors of it."""

    value: float
    spread: float


@dataclass(frozen=True)
class ShardEstimate:
    """What a run will make. `core_seconds` is processor time; `seconds` adds the waiting for files, for one worker."""

    num_files: int
    num_measured: int
    num_shards: int
    num_workers: int
    samples: Amount
    num_bytes: Amount
    core_seconds: Amount
    seconds: Amount


def estimate_shards(config: ShardConfig, *, num_files: int = NUM_FILES) -> ShardEstimate:
    """Make the samples of `num_files` files, spread evenly over the sources, into a temporary folder, and scale up.

    The number of shards is exact. Ray's start and the network at the output are left out.
    """
    recipe, encoder = resolve_degradation(config), latent_encoder(config)
    files = list_sources(config.sources)
    measured: list[tuple[float, float, float, float]] = []
    with tempfile.TemporaryDirectory(prefix="ccsr-estimate-") as folder:

        def make(file: SourceFile, name: str) -> list[ShardRecord]:
            place = config.model_copy(update={"output": str(Path(folder, name))})
            return [write_shard(place, recipe, shard, encoder) for shard in plan_shards([file], place)]

        chosen = evenly(files, num_files)
        make(chosen[0], "warm-up")  # imports and first calls are not a million samples' share
        with progress("measuring", len(chosen)) as advance:
            for number, file in enumerate(chosen):
                wall, cpu = time.perf_counter(), time.process_time()
                records = make(file, str(number))
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                num_samples = sum(len(record.entries) for record in records)
                num_bytes = sum(entry.length_bytes for record in records for entry in record.entries)
                measured.append((num_samples, num_bytes, cpu, wall))
                advance()
    return ShardEstimate(
        len(files),
        len(chosen),
        len(plan_shards(files, config)),
        config.runtime.num_actors or os.cpu_count() or 1,
        *(_scaled_up(list(column), len(files)) for column in zip(*measured, strict=True)),
    )


def _scaled_up(values: list[float], total: int) -> Amount:
    """The sum over `total` files of which `values` are an even part; nothing is unknown where they are all of them."""
    unknown = math.sqrt(1 - len(values) / total)
    deviation = statistics.stdev(values) if len(values) > 1 else values[0] if unknown else 0.0
    return Amount(total * statistics.fmean(values), 2 * total * unknown * deviation / math.sqrt(len(values)))


def shard_table(estimate: ShardEstimate) -> Table:
    """What a shard config will make."""
    title = f"by {estimate.num_measured} of {estimate.num_files:,} files, ± two standard errors"
    table = Table(("what", "estimate", "±"), title)
    workers = min(estimate.num_workers, estimate.num_shards)

    def add(what: str, amount: Amount, share: float = 1, form: str = "") -> None:
        value, spread = amount.value * share, amount.spread * share
        table.add(what, cell(value, form or _form(value)), cell(spread or None, form or _form(spread)))

    unit, size = ("GiB", GIB) if estimate.num_bytes.value >= GIB else ("MiB", MIB)
    add("shards", Amount(estimate.num_shards, 0), form=",.0f")
    add("samples", estimate.samples, form=",.0f")
    add(f"size, {unit}", estimate.num_bytes, 1 / size, ",.2f")
    add("size of a shard, MiB", estimate.num_bytes, 1 / estimate.num_shards / MIB, ",.2f")
    add("core-hours", estimate.core_seconds, 1 / 3600)
    add(f"hours with {workers} workers of one core", estimate.seconds, 1 / workers / 3600)
    return table


def _form(value: float) -> str:
    return ",.1f" if value >= 10 else ".3g"


@dataclass(frozen=True)
class Assumed:
    """What is not counted but assumed: card, share of its peak that training reaches, US dollars of a GPU-hour."""

    card: str = "H100"
    mfu: float = 0.4
    price: float = 3.0

    @property
    def flops_per_second(self) -> float:
        """Of one GPU. ConfigError for a card without a known peak."""
        from training.run.meter import PEAK_FLOPS

        if self.card not in PEAK_FLOPS:
            raise ConfigError(
                f"the peak of a card called {self.card!r} is not known",
                where="--card",
                todo=f"choose one of: {', '.join(PEAK_FLOPS)}",
            )
        return self.mfu * PEAK_FLOPS[self.card]


@dataclass(frozen=True)
class TrainEstimate:
    """One number of GPUs. Bytes are of one GPU or, `window_bytes`, of the batches on their way to it."""

    num_gpus: int
    micro_batch_size: int
    accumulation: int
    gpu_bytes: dict[str, int]
    checkpoint_bytes: int
    exchanged_bytes: int
    window_bytes: int
    ingest_cores: float
    samples_per_second: float
    hours: float
    gpu_hours: float
    cost: float
    step: "StepCost | None" = None


def estimate_training(config: TrainConfig, assumed: Assumed, sizes: Sequence[int]) -> list[TrainEstimate]:
    """One estimate for the config's own number of workers and each of `sizes` that can share its global batch.

    FLOPs and activations are counted on the config's networks, CPU time of a sample is measured here, the speed of a
    GPU is assumed; all GPUs are taken to work without waiting for each other. A size for which the config's
    micro-batch is too large gets the largest that fits; in stage 2, whose result depends on it, it is left out.
    """
    from training.run.requirements import ingest_seconds, step_cost

    rate, ingest = assumed.flops_per_second, ingest_seconds(config)
    cost: StepCost | None = None
    estimates = []
    for num_gpus in dict.fromkeys([config.runtime.workers.max, *sizes]):
        micro = _micro_batch(config, num_gpus)
        if micro is None:
            continue
        if cost is None:
            cost = step_cost(config)
        estimates.append(_estimate(config, assumed, cost, rate, ingest, num_gpus, micro))
    return estimates


def _micro_batch(config: TrainConfig, num_gpus: int) -> int | None:
    """The largest micro-batch, up to the config's, in which `num_gpus` can share the global batch."""
    largest = config.runtime.micro_batch_size
    smallest = largest if "micro_batch_size" in config.runtime_in_result() else 1
    fitting = range(largest, smallest - 1, -1)
    return next((size for size in fitting if config.global_batch_size % (size * num_gpus) == 0), None)


def _estimate(
    config: TrainConfig, assumed: Assumed, cost: "StepCost", rate: float, ingest: float, num_gpus: int, micro: int
) -> TrainEstimate:
    from training.data.batches import window
    from training.run.requirements import memory_needed

    activations = cost.activation_bytes * micro // config.runtime.micro_batch_size
    needed = memory_needed(cost.num_trained, cost.num_frozen, config, num_gpus) | {"activations": activations}
    runtime = config.runtime.model_copy(update={"micro_batch_size": micro, "num_workers": num_gpus})
    ahead = window(config.model_copy(update={"runtime": runtime}), num_gpus)
    per_gpu = rate / cost.flops_per_sample
    hours = config.num_updates * config.global_batch_size / (per_gpu * num_gpus) / 3600
    accumulation = config.global_batch_size // (micro * num_gpus)
    exchanges = accumulation if config.runtime.zero_stage == 2 else 1  # ZeRO 2 reduces after every micro-batch
    return TrainEstimate(
        num_gpus=num_gpus,
        micro_batch_size=micro,
        accumulation=accumulation,
        gpu_bytes=needed,
        checkpoint_bytes=(12 if config.ema is None else 16) * cost.num_trained,  # fp32: weights, moments, average
        exchanged_bytes=2 * (num_gpus - 1) * 4 * cost.num_trained * exchanges // num_gpus,
        window_bytes=ahead * micro * 6 * config.crop_px**2,  # HR and enlarged LR, 8-bit RGB
        ingest_cores=ingest * per_gpu,
        samples_per_second=per_gpu * num_gpus,
        hours=hours,
        gpu_hours=hours * num_gpus,
        cost=hours * num_gpus * assumed.price,
        step=cost,
    )


def train_tables(config: TrainConfig, assumed: Assumed, estimates: Sequence[TrainEstimate]) -> list[Table]:
    """The answer, a column for each number of GPUs; then what is placed where; then the config's networks."""
    updates, batch = config.num_updates, config.global_batch_size
    slower = "; precision fp32 reaches a fraction of that" if config.precision == "fp32" else ""
    gpus = [f"{one.num_gpus} GPUs" for one in estimates]
    answer = Table(
        ("what", *gpus, "unit"),
        f"stage {config.stage}: {updates:,} updates of {batch} = {updates * batch:,} samples",
        [
            f"assumed, not measured: {assumed.card} at {assumed.mfu:.0%} of its dense bf16 peak, perfect scaling, "
            f"{assumed.price:.2f} USD per GPU-hour (--card, --mfu, --price){slower}"
        ],
    )
    places = Table(("where", "what", *gpus, "unit"), "placement", ["head node: the driver, one core, no GPU"])

    def add(
        table: Table, names: tuple[str, ...], of: Callable[[TrainEstimate], Any], unit: str, form: str = ""
    ) -> None:
        table.add(*names, *(cell(of(one), form or _form(of(one))) for one in estimates), unit)

    add(answer, ("time",), lambda one: one.hours, "hours")
    add(answer, ("GPU time",), lambda one: one.gpu_hours, "GPU-hours")
    add(answer, ("cost",), lambda one: one.cost, "USD", ",.2f")
    add(answer, ("speed",), lambda one: one.samples_per_second, "samples/s")
    add(answer, ("GPU memory",), lambda one: sum(one.gpu_bytes.values()) / GIB, "GiB a GPU", ".2f")
    add(answer, ("CPUs for degradation",), lambda one: one.ingest_cores * one.num_gpus, "cores", ",.1f")
    splits = ([one.micro_batch_size, one.accumulation] for one in estimates)
    cells = (Cell(split, ((" x ".join(map(str, split)), ""),)) for split in splits)
    places.add("GPU node", "micro-batch x accumulation", *cells, "samples x steps")
    for name in estimates[0].gpu_bytes:
        parts = (cell(one.gpu_bytes[name] / GIB, ".2f") for one in estimates)
        places.add("GPU node", name, *parts, "GiB a GPU")
    exchanged = ("GPU node", "gradients exchanged")
    add(places, exchanged, lambda one: one.exchanged_bytes / GIB, "GiB a GPU and update", ".2f")
    add(places, ("CPU node", "degradation"), lambda one: one.ingest_cores, "cores a GPU", ".2f")
    add(places, ("CPU node", "batches in flight"), lambda one: one.window_bytes / MIB, "MiB a GPU", ".0f")
    add(places, ("storage", "a checkpoint"), lambda one: one.checkpoint_bytes / GIB, "GiB", ".2f")
    return [answer, places, _networks_table(config)]


def _networks_table(config: TrainConfig) -> Table:
    """The parameters of the networks that a train config has, and which of them it trains."""
    from training.run.requirements import discriminator_table, parameter_table, regulariser_row

    stage = "stage2" if config.stage == 2 else "stage1"
    rows = [
        row
        for row in parameter_table(config.model.preset, config.model.family)
        if not str(row["name"]).startswith("v1 only") and (row["name"] != "feature wrapping" or config.stage == 2)
    ]
    table = Table(("part", "parameters", "trained"), f"{config.model.preset}, {config.model.family}: networks")
    for row in rows:
        table.add(row["name"], row["parameters"], "yes" if row[stage] else "")
    table.add("a model directory", _total(rows), "")
    table.add(f"trained by this config (stage {config.stage})", _total([row for row in rows if row[stage]]), "")
    if config.learns_images:
        patch, *dino = discriminator_table(config.decoder_loss.discriminator_width)
        critics = [patch] if config.decoder_loss.discriminator == "patch" else dino
        for row in critics if config.vsd is None else [regulariser_row(config.model.preset)]:
            trained = row["stage1"] or row["stage2"]
            table.add(str(row["name"]).partition(": ")[2], row["parameters"], "yes" if trained else "")
    return table


def model_tables(preset: str) -> list[Table]:
    """The parameters of CCSR's networks and of the discriminators, counted on modules without memory."""
    from training.run.requirements import PAPER_MILLIONS, discriminator_table, parameter_table

    rows = parameter_table(preset)
    table = Table(("part", "parameters", "trained in"), f"{preset}: networks")
    others = Table(table.columns, "discriminators")
    for one, listed in ((table, rows), (others, discriminator_table())):
        for row in listed:
            stages = (name for name, key in (("stages 0, 1", "stage1"), ("stage 2", "stage2")) if row[key])
            one.add(row["name"], row["parameters"], ", ".join(stages))
    shared = [row for row in rows if not str(row["name"]).startswith("v1 only")]
    table.add("a model directory", _total(shared), "")
    if preset == "tiny":
        return [table]
    table.add(f"CCSR v1 as published (paper: {PAPER_MILLIONS} M)", _total(rows), "")
    return [table, others]


def _total(rows: Sequence[dict[str, str | int | bool]]) -> int:
    return sum(int(row["parameters"]) for row in rows)
