"""`--dry-run`: what a job would do, where, for how long, and what of it is there already."""

import math
import os
from typing import Any

from infra.display.table import Table
from infra.run import Progress


def preview_table(config: Any, progress: Progress, num_gpus: int, where: str | None = None) -> Table:
    """One job; `where`: the cluster that it is to be submitted to, else the one that this process would use.

    Shards are timed by making the samples of a few files in a temporary folder; training and evaluation by the counted
    FLOPs of their networks, on an assumed card or on CPUs as fast as this one.
    """
    table = Table(("what", "value"), f"{config.job}: a dry run, nothing is written")
    table.add("reads", progress.reads)
    table.add("makes", progress.what)
    table.add("output", config.output)
    table.add("there already", f"{progress.done:,} of {progress.total:,} {progress.unit}")
    table.add("runs on", where or _place(config, num_gpus))
    table.add("takes", _time(config, progress))
    return table


def _place(config: Any, num_gpus: int) -> str:
    """A run with a range of workers takes as many as there are; its least number is what has to be there."""
    runtime = config.runtime
    address = runtime.ray.address or os.environ.get("RAY_ADDRESS")
    least, most = _processes(config)
    number = f"{least} to {most}" if least != most else most or runtime.ray.num_cpus or os.cpu_count()
    power = f"{number} {'GPUs' if num_gpus else 'CPUs'}"
    return f"{power} of {f'the cluster {address}' if address else 'this machine, by a Ray that is started here'}"


def _processes(config: Any) -> tuple[Any, Any]:
    """The least and the most that work at once; None: as many as there are CPUs."""
    if config.job == "train":
        return config.runtime.workers.min, config.runtime.workers.max
    return config.runtime.num_actors, config.runtime.num_actors


def _time(config: Any, progress: Progress) -> str:
    """Of what is left."""
    from pipelines.estimate.shards import estimate_shards
    from pipelines.estimate.training import Assumed

    share = 1 - progress.done / max(1, progress.total)
    if share <= 0:
        return "nothing is left to compute"
    runtime = config.runtime
    if config.job == "shard":
        estimate = estimate_shards(config)
        workers = min(estimate.num_workers, estimate.num_shards)
        hours = share * estimate.seconds.value / workers / 3600
        return f"about {_amount(hours)} with {workers} workers as fast as this machine"
    if not progress.flops:
        return "not estimated: no network of a known size computes"
    least, most = _processes(config)
    assumed = Assumed.for_runtime(runtime)
    by_all = " with all of them" if least < most else ""
    hours = share * progress.flops / (assumed.flops_per_second * most) / 3600
    return f"about {_amount(hours)} for the networks alone{by_all}, assuming {assumed.processor}"


def _amount(hours: float) -> str:
    minutes = math.ceil(60 * hours)
    return f"{hours:,.3g} hours" if minutes > 60 else f"{minutes} minutes" if minutes > 1 else "a minute"
