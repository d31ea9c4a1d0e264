"""`--dry-run`: what a job would do, where, for how long, and what of it is there already."""

import os
from typing import Any

from infra.display.table import Table
from infra.run import Progress


def preview_table(config: Any, progress: Progress, num_gpus: int, where: str | None = None) -> Table:
    """One job; `where`: the cluster that it is to be submitted to, else the one that this process would use.

    Shards are timed by making the samples of a few files in a temporary folder; training by counted FLOPs on an
    assumed card.
    """
    table = Table(("what", "value"), f"{config.job}: a dry run, nothing is written")
    table.add("reads", progress.reads)
    table.add("makes", progress.what)
    table.add("output", config.output)
    table.add("there already", f"{progress.done:,} of {progress.total:,} {progress.unit}")
    table.add("runs on", where or _place(config, num_gpus))
    table.add("takes", _time(config, 1 - progress.done / max(1, progress.total)))
    return table


def _place(config: Any, num_gpus: int) -> str:
    runtime = config.runtime
    address = runtime.ray.address or os.environ.get("RAY_ADDRESS")
    processes = runtime.workers.max if hasattr(runtime, "workers") else runtime.num_actors
    power = f"{num_gpus} GPUs" if num_gpus else f"{processes or runtime.ray.num_cpus or os.cpu_count()} CPUs"
    return f"{power} of {f'the cluster {address}' if address else 'this machine, by a Ray that is started here'}"


def _time(config: Any, share: float) -> str:
    """Of the `share` that is left."""
    from pipelines.estimate import Assumed, estimate_shards, estimate_training

    if share <= 0:
        return "nothing is left to compute"
    if config.job == "shard":
        estimate = estimate_shards(config)
        workers = min(estimate.num_workers, estimate.num_shards)
        hours = share * estimate.seconds.value / workers / 3600
        return f"about {hours:.2g} hours with {workers} workers as fast as this machine"
    if config.job == "train" and config.runtime.device == "cuda":
        assumed = Assumed()
        hours = share * estimate_training(config, assumed, [])[0].hours
        return f"about {hours:.2g} hours, assuming {assumed.card} at {assumed.mfu:.0%} of its peak; see `ccsr estimate`"
    return "unknown: there is no estimate for " + ("training on CPUs" if config.job == "train" else config.job)
