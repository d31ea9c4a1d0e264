"""`ccsr estimate` of a train config: hours, cost, placement, and the micro-batch that fits on 24, 40 and 80 GB."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress, product
from typing import TYPE_CHECKING, Any

from infra.display.table import Cell, Table, cell
from infra.errors import ConfigError
from infra.process.memory import GIB
from pipelines.estimate.shards import MIB, form_of
from training.config import TrainConfig

if TYPE_CHECKING:
    from training.run.cost.requirements import StepCost

CARDS_GIB = (24, 40, 80)
USABLE = 0.9
SWITCHES = ("activation_checkpointing", "optimizer.kind: adamw8bit", "offload_optimizer")


@dataclass(frozen=True)
class Assumed:
    """What is not counted but assumed: card, share of its peak that training reaches, US dollars of a GPU-hour. With
    `threads`, CPUs as fast as this one in the card's place, and no price."""

    card: str = "H100"
    mfu: float = 0.4
    price: float = 3.0
    threads: int = 0

    @classmethod
    def for_runtime(cls, runtime: Any, card: str | None = None, mfu: float = 0.4, price: float = 3.0) -> "Assumed":
        """What a job of this `runtime` computes on, unless a card is named."""
        return (
            cls(threads=runtime.threads)
            if runtime.device == "cpu" and card is None
            else cls(card or "H100", mfu, price)
        )

    @property
    def flops_per_second(self) -> float:
        """Of one GPU, or of one process here, measured. ConfigError for a card without a known peak."""
        from training.run.cost.requirements import measured_flops
        from training.run.monitoring.meter import PEAK_FLOPS

        if self.threads:
            return measured_flops(self.threads)
        if self.card not in PEAK_FLOPS:
            raise ConfigError(
                f"the peak of a card called {self.card!r} is not known",
                where="--card",
                todo=f"choose one of: {', '.join(PEAK_FLOPS)}",
            )
        return self.mfu * PEAK_FLOPS[self.card]

    @property
    def processor(self) -> str:
        if self.threads:
            return f"CPUs as fast as this one, {self.threads} thread{'s' * (self.threads > 1)} a process"
        return f"{self.card} at {self.mfu:.0%} of its peak"


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
    from training.run.cost.requirements import ingest_seconds, step_cost

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
    from training.run.cost.requirements import memory_needed

    activations = cost.activation_bytes * micro // config.runtime.micro_batch_size
    needed = memory_needed(cost.num_trained, cost.num_frozen, config, num_gpus)
    needed |= ({"critic": cost.critic_bytes} if cost.critic_bytes else {}) | {"activations": activations}
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
    from training.run.cost.parameters import networks_table

    updates, batch = config.num_updates, config.global_batch_size
    kind = "worker" if assumed.threads else "GPU"
    slower = "; precision fp32 reaches a fraction of that" if config.precision == "fp32" else ""
    basis = f"assumed, not measured: {assumed.processor} (dense bf16), perfect scaling, "
    basis += f"{assumed.price:.2f} USD per GPU-hour (--card, --mfu, --price){slower}"
    if assumed.threads:
        basis = f"measured here: a convolution; assumed: {assumed.processor}, perfect scaling (--card: on GPUs)"
    gpus = [f"{one.num_gpus} {kind}s" for one in estimates]
    answer = Table(
        ("what", *gpus, "unit"),
        f"stage {config.stage}: {updates:,} updates of {batch} = {updates * batch:,} samples",
        [basis],
    )
    places = Table(("where", "what", *gpus, "unit"), "placement", ["head node: the driver, one core, no GPU"])

    def add(
        table: Table, names: tuple[str, ...], of: Callable[[TrainEstimate], Any], unit: str, form: str = ""
    ) -> None:
        table.add(*names, *(cell(of(one), form or form_of(of(one))) for one in estimates), unit)

    add(answer, ("time",), lambda one: one.hours, "hours")
    add(answer, (f"{kind} time",), lambda one: one.gpu_hours, f"{kind}-hours")
    if not assumed.threads:
        add(answer, ("cost",), lambda one: one.cost, "USD", ",.2f")
    add(answer, ("speed",), lambda one: one.samples_per_second, "samples/s")
    add(answer, (f"{kind} memory",), lambda one: sum(one.gpu_bytes.values()) / GIB, f"GiB a {kind}", ".2f")
    add(answer, ("CPUs for degradation",), lambda one: one.ingest_cores * one.num_gpus, "cores", ",.1f")
    splits = ([one.micro_batch_size, one.accumulation] for one in estimates)
    cells = (Cell(split, ((" x ".join(map(str, split)), ""),)) for split in splits)
    places.add(f"{kind} node", "micro-batch x accumulation", *cells, "samples x steps")
    for name in estimates[0].gpu_bytes:
        parts = (cell(one.gpu_bytes[name] / GIB, ".2f") for one in estimates)
        places.add(f"{kind} node", name, *parts, f"GiB a {kind}")
    exchanged = (f"{kind} node", "gradients exchanged")
    add(places, exchanged, lambda one: one.exchanged_bytes / GIB, f"GiB a {kind} and update", ".2f")
    add(places, ("CPU node", "degradation"), lambda one: one.ingest_cores, f"cores a {kind}", ".2f")
    add(places, ("CPU node", "batches in flight"), lambda one: one.window_bytes / MIB, f"MiB a {kind}", ".0f")
    add(places, ("storage", "a checkpoint"), lambda one: one.checkpoint_bytes / GIB, "GiB", ".2f")
    return [answer, places, networks_table(config)]


def fit_table(config: TrainConfig, counted: "StepCost | None" = None) -> Table:
    """A row for each choice of `SWITCHES`: bytes on one GPU by `step_cost`, and for each card the largest micro-batch,
    up to the config's, that fits. Where the result depends on it, the config's or none. `counted`: the
    config's own step cost, where it is known."""
    from training.run.cost.requirements import memory_needed, step_cost

    largest = config.runtime.micro_batch_size
    sizes = [n for n in range(largest, 0, -1) if config.global_batch_size % n == 0]
    sizes = sizes[:1] if config.runtime_in_result() else sizes
    table = Table(
        ("with", "GPU memory, GiB", *(f"{card} GB" for card in CARDS_GIB)),
        f"one GPU: largest micro-batch that fits (config: {largest}), {config.precision}",
        [
            f"counted, not measured: weights, gradients, optimiser state, what a forward keeps; {1 - USABLE:.0%} of a "
            "card are left for a step's temporaries and the driver"
            + ("; without LPIPS, and a PatchGAN in DINO's place" if config.learns_images else "")
        ],
    )

    def switched(kind: str = config.optimizer.kind, **switches: object) -> TrainConfig:
        optimizer = config.optimizer.model_copy(update={"kind": kind})
        return config.model_copy(update={"optimizer": optimizer, "runtime": config.runtime.model_copy(update=switches)})

    costs = {config.runtime.activation_checkpointing: counted or step_cost(config)}
    other = not config.runtime.activation_checkpointing
    costs[other] = step_cost(switched(activation_checkpointing=other))
    moments = (("adamw", False), ("adamw8bit", False), ("adamw", True))  # offloaded ones are in no GPU's memory
    for again, (kind, offload) in product((False, True), moments):
        zero_stage = max(int(offload), config.runtime.zero_stage)
        one = switched(kind, activation_checkpointing=again, offload_optimizer=offload, zero_stage=zero_stage)
        cost = costs[again]
        held = sum(memory_needed(cost.num_trained, cost.num_frozen, one, 1).values()) + cost.critic_bytes
        # Between two updates, without activations, a checkpoint has the 8-bit moments in float32.
        saved = 8 * cost.num_trained if kind == "adamw8bit" and not offload else 0
        totals = {size: (held + max(cost.activation_bytes * size // largest, saved)) / GIB for size in sizes}
        fits = (next((n for n, total in totals.items() if total <= USABLE * card), None) for card in CARDS_GIB)
        chosen = compress(SWITCHES, (again, kind == "adamw8bit", offload))
        names = " + ".join(chosen) or "none of the three below"
        cells = (Cell(size, ((str(size), "good") if size else ("no", "bad"),)) for size in fits)
        table.add(names, cell(totals[largest], ".1f"), *cells)
    return table
