"""`ccsr estimate`: shards, bytes and core-hours of a shard config; hours, cost and placement of a train config; the
parameters of a model."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import ConfigError
from infra.manifest import ShardRecord
from infra.progress import progress
from infra.table import Cell, Table, cell
from pipelines.card import evenly
from pipelines.config import ShardConfig
from pipelines.plan import plan_shards
from pipelines.shard import latent_encoder, resolve_degradation, write_shard
from pipelines.sources import SourceFile, list_sources

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.cost import StepCost

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
        num_files=len(files),
        num_measured=len(chosen),
        num_shards=len(plan_shards(files, config)),
        num_workers=config.runtime.num_workers or os.cpu_count() or 1,
        **dict(
            zip(
                ("samples", "num_bytes", "core_seconds", "seconds"),
                (_scaled_up(list(column), len(files)) for column in zip(*measured, strict=True)),
                strict=True,
            )
        ),
    )


def _scaled_up(values: list[float], total: int) -> Amount:
    """The sum over `total` files of which `values` are an even part; nothing is unknown where they are all of them."""
    unknown = math.sqrt(1 - len(values) / total)
    deviation = statistics.stdev(values) if len(values) > 1 else values[0] if unknown else 0.0
    return Amount(total * statistics.fmean(values), 2 * total * unknown * deviation / math.sqrt(len(values)))


def shard_table(estimate: ShardEstimate) -> Table:
    """What a shard config will make."""
    title = f"by {estimate.num_measured} of {estimate.num_files:,} files, ± two standard errors"
    table = Table(("what", "estimate", "±", "unit"), title)
    workers = min(estimate.num_workers, estimate.num_shards)

    def add(what: str, amount: Amount, unit: str, share: float = 1, form: str | None = None) -> None:
        value, spread = amount.value * share, amount.spread * share
        table.add(what, cell(value, form or _form(value)), cell(spread or None, form or _form(spread)), unit)

    size, size_unit = (GIB, "GiB") if estimate.num_bytes.value >= GIB else (MIB, "MiB")
    add("shards", Amount(estimate.num_shards, 0), "", form=",.0f")
    add("samples", estimate.samples, "", form=",.0f")
    add("size", estimate.num_bytes, size_unit, 1 / size, form=",.2f")
    add("size of a shard", estimate.num_bytes, "MiB", 1 / estimate.num_shards / MIB, form=",.2f")
    add("processor time", estimate.core_seconds, "core-hours", 1 / 3600)
    add(f"time with {workers} workers of one core", estimate.seconds, "hours", 1 / workers / 3600)
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
        from training.measure import PEAK_FLOPS

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


def estimate_training(config: "TrainConfig", assumed: Assumed, sizes: Sequence[int]) -> list[TrainEstimate]:
    """One estimate for the config's own number of workers and each of `sizes` that can share its global batch.

    FLOPs and activations are counted on the config's networks, CPU time of a sample is measured here, the speed of a
    GPU is assumed; all GPUs are taken to work without waiting for each other. A size for which the config's
    micro-batch is too large gets the largest that fits.
    """
    from training.cost import ingest_seconds, step_cost

    rate, ingest = assumed.flops_per_second, ingest_seconds(config)
    cost: StepCost | None = None
    estimates = []
    for num_gpus in dict.fromkeys([config.runtime.num_workers, *sizes]):
        micro = _micro_batch(config, num_gpus)
        if micro is None:
            continue
        if cost is None:
            cost = step_cost(config)
        estimates.append(_estimate(config, assumed, cost, rate, ingest, num_gpus, micro))
    return estimates


def _micro_batch(config: "TrainConfig", num_gpus: int) -> int | None:
    """The largest micro-batch, up to the config's, in which `num_gpus` can share the global batch."""
    fitting = range(config.runtime.micro_batch_size, 0, -1)
    return next((size for size in fitting if config.global_batch_size % (size * num_gpus) == 0), None)


def _estimate(
    config: "TrainConfig", assumed: Assumed, cost: "StepCost", rate: float, ingest: float, num_gpus: int, micro: int
) -> TrainEstimate:
    from training.cost import memory_needed
    from training.ingest import window

    activations = cost.activation_bytes * micro // config.runtime.micro_batch_size
    needed = memory_needed(cost.num_trained, cost.num_frozen, config, num_gpus) | {"activations": activations}
    runtime = config.runtime.model_copy(update={"micro_batch_size": micro, "num_workers": num_gpus})
    ahead = window(config.model_copy(update={"runtime": runtime}), num_gpus)
    per_gpu = rate / cost.flops_per_sample
    hours = config.num_updates * config.global_batch_size / (per_gpu * num_gpus) / 3600
    accumulation = config.global_batch_size // (micro * num_gpus)
    size = 2 if config.precision == "bf16" else 4
    exchanges = accumulation if config.runtime.zero_stage == 2 else 1  # ZeRO 2 reduces after every micro-batch
    return TrainEstimate(
        num_gpus=num_gpus,
        micro_batch_size=micro,
        accumulation=accumulation,
        gpu_bytes=needed,
        checkpoint_bytes=12 * cost.num_trained,  # fp32: weights and two moments
        exchanged_bytes=2 * (num_gpus - 1) * size * cost.num_trained * exchanges // num_gpus,
        window_bytes=ahead * micro * 6 * config.crop_px**2,  # HR and enlarged LR, 8-bit RGB
        ingest_cores=ingest * per_gpu,
        samples_per_second=per_gpu * num_gpus,
        hours=hours,
        gpu_hours=hours * num_gpus,
        cost=hours * num_gpus * assumed.price,
    )


def train_tables(config: "TrainConfig", assumed: Assumed, estimates: Sequence[TrainEstimate]) -> list[Table]:
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

    def add(table: Table, *names: str, values: list[float], unit: str, form: str | None = None) -> None:
        table.add(*names, *(cell(value, form or _form(value)) for value in values), unit)

    add(answer, "time", values=[one.hours for one in estimates], unit="hours")
    add(answer, "GPU time", values=[one.gpu_hours for one in estimates], unit="GPU-hours")
    add(answer, "cost", values=[one.cost for one in estimates], unit="USD", form=",.2f")
    add(answer, "speed", values=[one.samples_per_second for one in estimates], unit="samples/s")
    memory = [sum(one.gpu_bytes.values()) / GIB for one in estimates]
    add(answer, "GPU memory", values=memory, unit="GiB a GPU", form=".2f")
    cores = [one.ingest_cores * one.num_gpus for one in estimates]
    add(answer, "CPUs for degradation", values=cores, unit="cores", form=",.1f")
    splits = ([one.micro_batch_size, one.accumulation] for one in estimates)
    cells = (Cell(split, ((" x ".join(map(str, split)), ""),)) for split in splits)
    places.add("GPU node", "micro-batch x accumulation", *cells, "samples x steps")
    for name in estimates[0].gpu_bytes:
        parts = [one.gpu_bytes[name] / GIB for one in estimates]
        add(places, "GPU node", name, values=parts, unit="GiB a GPU", form=".2f")
    exchanged = [one.exchanged_bytes / GIB for one in estimates]
    add(places, "GPU node", "gradients exchanged", values=exchanged, unit="GiB a GPU and update", form=".2f")
    ingest = [one.ingest_cores for one in estimates]
    add(places, "CPU node", "degradation", values=ingest, unit="cores a GPU", form=".2f")
    windows = [one.window_bytes / MIB for one in estimates]
    add(places, "CPU node", "batches in flight", values=windows, unit="MiB a GPU", form=".0f")
    checkpoints = [one.checkpoint_bytes / GIB for one in estimates]
    add(places, "storage", "a checkpoint", values=checkpoints, unit="GiB", form=".2f")
    return [answer, places, _networks_table(config)]


def _networks_table(config: "TrainConfig") -> Table:
    """The parameters of the networks that a train config has, and which of them it trains."""
    from training.cost import discriminator_table, parameter_table

    stage = "stage2" if config.stage == 2 else "stage1"
    rows = [
        row
        for row in parameter_table(config.model.preset, config.model.family)
        if not str(row["name"]).startswith("v1 only") and (row["name"] != "feature wrapping" or config.stage == 2)
    ]
    table = Table(("part", "parameters", "trained"), f"{config.model.preset}, {config.model.family}: networks")
    for row in rows:
        table.add(row["name"], row["parameters"], "yes" if row[stage] else "")
    table.add("a model directory", sum(int(row["parameters"]) for row in rows), "")
    trained = sum(int(row["parameters"]) for row in rows if row[stage])
    table.add(f"trained by this config (stage {config.stage})", trained, "")
    if config.stage == 2:
        patch, *dino = discriminator_table(config.decoder_loss.discriminator_width)
        for row in [patch] if config.decoder_loss.discriminator == "patch" else dino:
            table.add(str(row["name"]).partition(": ")[2], row["parameters"], "yes" if row["stage2"] else "")
    return table


def model_tables(preset: str) -> list[Table]:
    """The parameters of CCSR's networks and of the discriminators, counted on modules without memory."""
    from training.cost import PAPER_MILLIONS, discriminator_table, parameter_table

    rows = parameter_table(preset)
    table = Table(("part", "parameters", "trained in"), f"{preset}: networks")
    num_shared = sum(not str(row["name"]).startswith("v1 only") for row in rows)
    for number, row in enumerate(rows, 1):
        table.add(row["name"], row["parameters"], _trained_in(row))
        if number == num_shared:
            table.add("a model directory", sum(int(row["parameters"]) for row in rows[:number]), "")
    if preset == "tiny":
        return [table]
    total = sum(int(row["parameters"]) for row in rows)
    table.add(f"CCSR v1 as published (paper: {PAPER_MILLIONS} M)", total, "")
    others = Table(table.columns, "discriminators")
    for row in discriminator_table():
        others.add(row["name"], row["parameters"], _trained_in(row))
    return [table, others]


def _trained_in(row: dict[str, str | int | bool]) -> str:
    return ", ".join(name for name, key in (("stages 0, 1", "stage1"), ("stage 2", "stage2")) if row[key])
