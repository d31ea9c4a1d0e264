"""`ccsr estimate` of a training config: what stands where, bytes, GPU-hours and cost, at several numbers of GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.errors import ConfigError
from training.config import TrainConfig
from training.cost import StepCost, ingest_seconds, step_cost
from training.ingest import window
from training.measure import PEAK_FLOPS
from training.memory import memory_needed

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30


@dataclass(frozen=True)
class Assumed:
    """What is not counted but assumed: the card, the share of its peak that training reaches, a GPU-hour's price."""

    card: str = "H100"
    mfu: float = 0.4
    price: float = 3.0

    @property
    def flops_per_second(self) -> float:
        """Of one GPU. ConfigError for a card without a known peak."""
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


def estimate_training(config: TrainConfig, assumed: Assumed, sizes: Sequence[int]) -> list[TrainEstimate]:
    """One estimate for the config's own number of workers and each of `sizes` that can share its global batch.

    FLOPs and activations are counted on the config's networks, CPU time of a sample is measured here, the speed of a
    GPU is assumed; all GPUs are taken to work without waiting for each other. A size for which the config's
    micro-batch is too large gets the largest that fits; in stage 2, whose result depends on it, it is left out.
    """
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


def _micro_batch(config: TrainConfig, num_gpus: int) -> int | None:
    """The largest micro-batch, up to the config's, in which `num_gpus` can share the global batch; None without one."""
    largest = config.runtime.micro_batch_size
    smallest = largest if "micro_batch_size" in config.runtime_in_result() else 1
    fitting = range(largest, smallest - 1, -1)
    return next((size for size in fitting if config.global_batch_size % (size * num_gpus) == 0), None)


def _estimate(
    config: TrainConfig, assumed: Assumed, cost: StepCost, rate: float, ingest: float, num_gpus: int, micro: int
) -> TrainEstimate:
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


def train_table(config: TrainConfig, assumed: Assumed, estimates: Sequence[TrainEstimate]) -> "Table":
    """A column for each number of GPUs."""
    from rich.table import Table

    updates, batch = config.num_updates, config.global_batch_size
    slower = "; precision fp32 reaches a fraction of that" if config.precision == "fp32" else ""
    table = Table(
        title=f"stage {config.stage}: {updates:,} updates of {batch} = {updates * batch:,} samples",
        caption=f"assumed, not measured: {assumed.card} at {assumed.mfu:.0%} of its dense bf16 peak, perfect scaling, "
        f"{assumed.price:.2f} per GPU-hour (--card, --mfu, --price){slower}",
    )
    table.add_column("where")
    table.add_column("what")
    for one in estimates:
        table.add_column(f"{one.num_gpus} GPUs", justify="right")

    def add(where: str, what: str, values: list[str]) -> None:
        table.add_row(where, what, *values)

    add("GPU nodes", "workers, one GPU each", [str(one.num_gpus) for one in estimates])
    add("", "micro-batch x accumulation", [f"{one.micro_batch_size} x {one.accumulation}" for one in estimates])
    for name in estimates[0].gpu_bytes:
        add("", f"{name}, GiB a GPU", [f"{one.gpu_bytes[name] / GIB:.2f}" for one in estimates])
    add("", "together, GiB a GPU", [f"{sum(one.gpu_bytes.values()) / GIB:.2f}" for one in estimates])
    add("", "gradients exchanged, GiB a GPU and update", [f"{one.exchanged_bytes / GIB:.2f}" for one in estimates])
    table.add_section()
    add("CPU nodes", "cores of degradation for one GPU", [f"{one.ingest_cores:.2f}" for one in estimates])
    add("", "cores together", [f"{one.ingest_cores * one.num_gpus:.1f}" for one in estimates])
    add("", "batches on their way, MiB a GPU", [f"{one.window_bytes / 2**20:.0f}" for one in estimates])
    table.add_section()
    add("head node", "the driver: a core, no GPU", ["" for _ in estimates])
    table.add_section()
    add("storage", "a checkpoint, GiB", [f"{one.checkpoint_bytes / GIB:.2f}" for one in estimates])
    add("in all", "samples/s", [f"{one.samples_per_second:.1f}" for one in estimates])
    add("", "hours", [f"{one.hours:,.1f}" for one in estimates])
    add("", "GPU-hours", [f"{one.gpu_hours:,.1f}" for one in estimates])
    add("", "cost", [f"{one.cost:,.0f}" for one in estimates])
    return table
