"""`ccsr estimate` of a shard config: shards, samples, bytes and core-hours, from a few sources that are really made."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.manifest import ShardRecord
from infra.progress import progress
from pipelines.card import evenly
from pipelines.config import ShardConfig
from pipelines.plan import plan_shards
from pipelines.shard import latent_encoder, resolve_degradation, write_shard
from pipelines.sources import SourceFile, list_sources

if TYPE_CHECKING:
    from rich.table import Table

NUM_FILES = 16


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


def estimate_table(estimate: ShardEstimate) -> "Table":
    """The estimate as a table for a terminal."""
    from rich.table import Table

    table = Table(title=f"by {estimate.num_measured} of {estimate.num_files:,} files, ± two standard errors")
    for name in ("what", "estimate", "±"):
        table.add_column(name, justify="left" if name == "what" else "right")

    def add(name: str, amount: Amount, show: Callable[[float], str], share: float = 1.0) -> None:
        table.add_row(name, show(amount.value * share), show(amount.spread * share) if amount.spread else "")

    add("shards", Amount(estimate.num_shards, 0), "{:,.0f}".format)
    add("samples", estimate.samples, "{:,.0f}".format)
    add("size", estimate.num_bytes, _size)
    add("size of a shard", estimate.num_bytes, _size, 1 / estimate.num_shards)
    add("core-hours", estimate.core_seconds, _hours)
    workers = min(estimate.num_workers, estimate.num_shards)
    add(f"hours with {workers} workers of one core", estimate.seconds, _hours, 1 / workers)
    return table


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.2f} MiB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}" if seconds >= 36000 else f"{seconds / 3600:.4f}"
