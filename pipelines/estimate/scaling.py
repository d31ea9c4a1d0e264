"""`ccsr estimate`: how an update's time grows with the number of GPUs, part by part, and what limits it.

The parts are counted or measured, the limits of network and storage are stated. Not in the model: exchange that
overlaps the backward pass, ranks of different speed, validation. The same arithmetic with a machine's own limits
predicts gloo ranks on its cores (`benchmarks/scaling.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.display.table import Cell, Table, cell
from training.config import TrainConfig

if TYPE_CHECKING:
    from pipelines.estimate.training import TrainEstimate

RAY_TASKS = 1.46
"""CPU time of a sample in Ray's tasks over that in a loop (benchmarks/ingest.md)."""
SAMPLE_BYTES_PER_PIXEL = 2.0
"""Of a stored HR crop: PNGs of photographs take a third less than their 3 bytes."""
GOAL = 0.9
REMEDIES = {
    "exchange": "a faster network, zero_stage 1 (one exchange an update), or more samples a GPU and update",
    "degradation": "runtime.ingest_cpus: {cpus}, with as many cores a GPU, or a stored LR",
    "storage": "shards under several prefixes, or a copy on the nodes' own disks",
    "checkpoints": "a larger runtime.checkpoint_every",
}


@dataclass(frozen=True)
class Limits:
    """Stated, not measured: eight H100 with NVLink and 400 Gbit/s of network a node; S3 as Amazon states it."""

    ranks_per_node: int = 8
    link_bytes_per_second: float = 300e9  # of a GPU to the others of its node
    node_bytes_per_second: float = 50e9
    hop_seconds: float = 20e-6  # of one step of a ring
    storage_requests_per_second: float = 5500
    storage_bytes_per_second: float = 12.5e9
    host_bytes_per_second: float = 10e9  # a checkpoint's copy from the GPU
    cores: int | None = None  # that all ranks share; None: each has its own


@dataclass(frozen=True)
class Parts:
    """Of one worker. `gradient_bytes`: of the float32 gradients, exchanged once an update, or after `exchange_every`
    samples."""

    sample_seconds: float
    gradient_bytes: float
    exchange_every: int | None = None
    fixed_seconds: float = 0.0
    ingest_seconds: float = 0.0
    ingest_cpus: int = 1
    sample_bytes: float = 0.0
    checkpoint_bytes: float = 0.0
    checkpoint_every: int = 500


def update_seconds(parts: Parts, limits: Limits, num_ranks: int, batch: int) -> dict[str, float]:
    """Seconds of an update of `batch` samples by what they are spent on; their sum is the update's time.

    An exchange is a ring inside each node, then one between nodes (2 (n - 1) / n of the bytes each). Degradation and
    storage work ahead: only what exceeds the computation shows.
    """
    crowd = max(1.0, num_ranks / limits.cores) if limits.cores else 1.0
    inside, nodes = min(num_ranks, limits.ranks_per_node), -(-num_ranks // limits.ranks_per_node)
    exchanges = math.ceil(batch / num_ranks / parts.exchange_every) if parts.exchange_every else 1
    ring = 2 * (inside - 1) / inside * parts.gradient_bytes / limits.link_bytes_per_second
    ring += 2 * (nodes - 1) / nodes * parts.gradient_bytes / limits.node_bytes_per_second
    hops = 2 * (inside - 1 + nodes - 1) * limits.hop_seconds
    found = {
        "compute": crowd * (batch / num_ranks * parts.sample_seconds + parts.fixed_seconds),
        "exchange": crowd * exchanges * (ring + hops),
    }
    busy = sum(found.values())
    degraded = batch / num_ranks * parts.ingest_seconds / parts.ingest_cpus
    read = batch * max(1 / limits.storage_requests_per_second, parts.sample_bytes / limits.storage_bytes_per_second)
    found["degradation"] = max(0.0, degraded - busy) if degraded >= read else 0.0
    found["storage"] = max(0.0, read - busy) if read > degraded else 0.0
    found["checkpoints"] = parts.checkpoint_bytes / limits.host_bytes_per_second / parts.checkpoint_every
    return found


def parts_of(config: TrainConfig, one: "TrainEstimate") -> Parts:
    """What `ccsr estimate` has counted and measured for one number of GPUs."""
    rate = one.samples_per_second / one.num_gpus
    return Parts(
        sample_seconds=1 / rate,
        gradient_bytes=4.0 * (one.step.num_trained if one.step else 0),
        exchange_every=one.micro_batch_size if config.runtime.zero_stage == 2 else None,
        ingest_seconds=RAY_TASKS * one.ingest_cores / rate,
        ingest_cpus=max(1, config.runtime.ingest_cpus),
        sample_bytes=SAMPLE_BYTES_PER_PIXEL * config.crop_px**2,
        checkpoint_bytes=one.checkpoint_bytes,
        checkpoint_every=config.runtime.checkpoint_every,
    )


def scaling_table(config: TrainConfig, first: "TrainEstimate", sizes: Sequence[int]) -> Table:
    """A row for each number of GPUs, with the config's global batch, where they can share it, and with one that grows
    with them. Efficiency is the speed's share of that of as many GPUs that wait for nothing."""
    limits, parts, batch = Limits(), parts_of(config, first), config.global_batch_size
    per_gpu = batch // first.num_gpus
    table = Table(
        ("GPUs", "global batch", "samples/s", "efficiency", "loses most to", "without it", "removed by"),
        f"scaling (goal: {GOAL:.0%})",
        [
            f"stated: {limits.ranks_per_node} GPUs a node with {limits.link_bytes_per_second / 1e9:.0f} GB/s between "
            f"them, {limits.node_bytes_per_second * 8e-9:.0f} Gbit/s between nodes, storage of "
            f"{limits.storage_requests_per_second:,.0f} requests/s, {limits.storage_bytes_per_second / 1e9:.1f} GB/s; "
            "no overlap of exchange and backward, equally fast ranks"
        ],
    )
    cpus = math.ceil(parts.ingest_seconds / parts.sample_seconds)
    for num_gpus in sizes:
        if batch % num_gpus:
            why = f"{batch} samples cannot be shared by {num_gpus}"
            table.add(num_gpus, batch, None, None, why, None, f"global_batch_size: {per_gpu * num_gpus}")
        for size in sorted({per_gpu * num_gpus, *([] if batch % num_gpus else [batch])}):
            found = update_seconds(parts, limits, num_gpus, size)
            total, ideal = sum(found.values()), size / num_gpus * parts.sample_seconds
            worst = max(REMEDIES, key=lambda name: found[name])
            without = _percent(ideal / (total - found[worst]))
            lost = f"{worst} ({found[worst] / total:.1%})"
            remedy = REMEDIES[worst].format(cpus=cpus)
            table.add(num_gpus, size, cell(size / total, ",.0f"), _percent(ideal / total), lost, without, remedy)
    return table


def _percent(share: float) -> Cell:
    return Cell(share, ((f"{share:.1%}", "good" if share >= GOAL else "bad"),))
