"""`ccsr estimate` of a shard config: shards, bytes and core-hours."""

import math
import os
import statistics
import time
from dataclasses import dataclass

from infra.display.progress import progress
from infra.display.table import Table, cell
from infra.files.publish import temporary_folder
from infra.process.memory import GIB
from infra.shards.manifest import ShardRecord
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.files import SourceFile
from pipelines.sharding.job import latent_encoder, with_model_found, write_shard
from pipelines.sharding.plan import plan_shards
from pipelines.sharding.recipe import resolve_degradation
from pipelines.sharding.reports.card import evenly
from pipelines.sharding.screening.dedupe import hash_file
from pipelines.sharding.sources import list_sources

NUM_FILES = 16
MIB = 2**20


@dataclass(frozen=True)
class Amount:
    """An estimated total and two standard errors of it."""

    value: float
    spread: float


@dataclass(frozen=True)
class ShardEstimate:
    """What a run will make. `core_seconds` is processor time; `seconds` adds the waiting for files, for one worker.
    `hash_core_seconds`, a part of both: of `dedupe`'s pass over all files."""

    num_files: int
    num_measured: int
    num_shards: int
    num_workers: int
    samples: Amount
    num_bytes: Amount
    core_seconds: Amount
    seconds: Amount
    hash_core_seconds: Amount


def estimate_shards(config: ShardConfig, *, num_files: int = NUM_FILES) -> ShardEstimate:
    """Make the samples of `num_files` files, spread evenly over the sources, into a temporary folder, and scale up.

    The number of shards is exact, but for `dedupe`: its pass is measured on these files, so near-duplicates are counted
    as samples. Ray's start and the network at the output are left out.
    """
    config = with_model_found(config)
    recipe, encoder = resolve_degradation(config), latent_encoder(config)
    files = list_sources(config.sources)
    measured: list[tuple[float, float, float, float, float]] = []
    with temporary_folder("estimate") as folder:

        def hash_first(file: SourceFile) -> None:
            if config.dedupe is not None:
                hash_file(file, config)

        def make(file: SourceFile, name: str) -> list[ShardRecord]:
            place = config.model_copy(update={"output": str(folder / name)})
            return [write_shard(place, recipe, shard, encoder) for shard in plan_shards([file], place)]

        chosen = evenly(files, num_files)
        hash_first(chosen[0])
        make(chosen[0], "warm-up")  # imports and first calls are not a million samples' share
        with progress("measuring", len(chosen)) as advance:
            for number, file in enumerate(chosen):
                wall, cpu = time.perf_counter(), time.process_time()
                hash_first(file)
                hashed = time.process_time() - cpu if config.dedupe is not None else 0.0
                records = make(file, str(number))
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                num_samples = sum(len(record.entries) for record in records)
                num_bytes = sum(entry.length_bytes for record in records for entry in record.entries)
                measured.append((num_samples, num_bytes, cpu, wall, hashed))
                advance()
    return ShardEstimate(
        len(files),
        len(chosen),
        len(plan_shards(files, config)),
        config.runtime.num_actors or os.cpu_count() or 1,
        *(scaled_up(list(column), len(files)) for column in zip(*measured, strict=True)),
    )


def scaled_up(values: list[float], total: int) -> Amount:
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
        table.add(what, cell(value, form or form_of(value)), cell(spread or None, form or form_of(spread)))

    unit, size = ("GiB", GIB) if estimate.num_bytes.value >= GIB else ("MiB", MIB)
    add("shards", Amount(estimate.num_shards, 0), form=",.0f")
    add("samples", estimate.samples, form=",.0f")
    add(f"size, {unit}", estimate.num_bytes, 1 / size, ",.2f")
    add("size of a shard, MiB", estimate.num_bytes, 1 / estimate.num_shards / MIB, ",.2f")
    add("core-hours", estimate.core_seconds, 1 / 3600)
    if estimate.hash_core_seconds.value:
        add("of them looking for near-duplicates", estimate.hash_core_seconds, 1 / 3600)
    add(f"hours with {workers} workers of one core", estimate.seconds, 1 / workers / 3600)
    return table


def form_of(value: float) -> str:
    """The format of an estimate."""
    return ",.1f" if value >= 10 else ".3g"
