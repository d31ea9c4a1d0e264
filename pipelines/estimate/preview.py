"""`--dry-run`: what a job would do, where, for how long, and what of it is there already."""

import math
import os
from collections.abc import Callable
from typing import Any

from infra.display.table import Table
from infra.run import Progress

Processes = tuple[int | None, int | None]
"""The least and the most that work at once; None: as many as there are CPUs."""


def preview_table(
    config: Any,
    progress: Progress,
    num_gpus: int,
    processes: Processes,
    time: Callable[[Any, Progress, Processes], str],
    where: str | None = None,
) -> Table:
    """One job; `time`: of what is left; `where`: the cluster that it is to be submitted to, else the one that this
    process would use.

    Shards are timed by making the samples of a few files in a temporary folder; training and evaluation by the counted
    FLOPs of their networks, on an assumed card or on CPUs as fast as this one.
    """
    table = Table(("what", "value"), f"{config.job}: a dry run, nothing is written")
    table.add("reads", progress.reads)
    table.add("makes", progress.what)
    table.add("output", config.output)
    table.add("there already", f"{progress.done:,} of {progress.total:,} {progress.unit}")
    table.add("runs on", where or _place(config, num_gpus, processes))
    left = progress.done < max(1, progress.total)
    table.add("takes", time(config, progress, processes) if left else "nothing is left to compute")
    return table


def _place(config: Any, num_gpus: int, processes: Processes) -> str:
    """A run with a range of workers takes as many as there are; its least number is what has to be there."""
    ray = config.runtime.ray
    address = ray.address or os.environ.get("RAY_ADDRESS")
    least, most = processes
    number = f"{least} to {most}" if least != most else most or ray.num_cpus or os.cpu_count()
    power = f"{number} {'GPUs' if num_gpus else 'CPUs'}"
    return f"{power} of {f'the cluster {address}' if address else 'this machine, by a Ray that is started here'}"


def time_of_shards(config: Any, progress: Progress, processes: Processes) -> str:
    from pipelines.estimate.shards import estimate_shards

    estimate = estimate_shards(config)
    workers = min(estimate.num_workers, estimate.num_shards)
    hours = _share_left(progress) * estimate.seconds.value / workers / 3600
    return f"about {_amount(hours)} with {workers} workers as fast as this machine"


def time_of_networks(config: Any, progress: Progress, processes: tuple[int, int]) -> str:
    from pipelines.estimate.training import Assumed

    if not progress.flops:
        return "not estimated: no network of a known size computes"
    least, most = processes
    assumed = Assumed.for_runtime(config.runtime)
    by_all = " with all of them" if least < most else ""
    hours = _share_left(progress) * progress.flops / (assumed.flops_per_second * most) / 3600
    return f"about {_amount(hours)} for the networks alone{by_all}, assuming {assumed.processor}"


def _share_left(progress: Progress) -> float:
    return 1 - progress.done / max(1, progress.total)


def _amount(hours: float) -> str:
    minutes = math.ceil(60 * hours)
    return f"{hours:,.3g} hours" if minutes > 60 else f"{minutes} minutes" if minutes > 1 else "a minute"
