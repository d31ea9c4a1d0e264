"""Closing and opening a shard set of a million samples: time and memory of the driver, on a local disk.

OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/million_samples.py
"""

import hashlib
import tempfile
import time
from pathlib import Path

import psutil

from infra.manifest import Manifest, ShardRecord, commit_record, write_manifest
from infra.shards import IndexedEntry
from training.data.order import Order

NUM_SHARDS, PER_SHARD, SAMPLE_BYTES = 3907, 256, 500_000


def record(number: int) -> ShardRecord:
    shard = f"shards/{number:06d}.tar"
    digest = hashlib.sha256(shard.encode()).digest()
    entries = [
        IndexedEntry(
            f"photos-{number:06d}-{i:03d}-0", shard, i * SAMPLE_BYTES, SAMPLE_BYTES, i * 7919, number * 256 + i
        )
        for i in range(PER_SHARD)
    ]
    return ShardRecord(number, shard, digest.hex(), PER_SHARD * SAMPLE_BYTES, entries)


def main() -> None:
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as output:
        for number in range(NUM_SHARDS):
            commit_record(output, record(number))

        def report(name: str, began: float) -> None:
            gib = process.memory_info().rss / 2**30
            print(f"| {name} | {time.process_time() - began:.1f} | {gib:.2f} |", flush=True)

        print("| step | CPU s | memory of the process, GiB |\n|---|---|---|")
        began = time.process_time()
        manifest = write_manifest(output, NUM_SHARDS, scale=4, has_lr=True)
        report("write index.parquet and manifest.json from the records", began)
        began = time.process_time()
        manifest = Manifest.load(output)
        num_entries = len(manifest.entries)
        report("load them as training does", began)
        began = time.process_time()
        order = Order(0, (num_entries,), (1.0,))
        for position in range(0, num_entries, 97):
            order.sample_at(position)
        report("look up 10,000 positions of an epoch", began)
        print(f"index.parquet: {(Path(output) / 'index.parquet').stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
