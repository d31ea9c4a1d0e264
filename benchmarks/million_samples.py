"""A shard set of 1, 10 and 100 million made-up samples: the driver's cost of planning and closing it, two ranks' cost
of opening it at one time and of finding samples. A local disk; the set of 100 million consists of its index and
manifest alone.

OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/million_samples.py 1 10 100
"""

import hashlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from infra.process.ray_runtime import ITEMS_AT_ONCE
from infra.shards.byte_index import SHARDS_PER_PART, put_part
from infra.shards.manifest import Manifest, ShardRecord, put_manifest, record_uri, write_manifest
from infra.shards.shard import IndexedEntry
from pipelines.sharding import sources
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.plan import plan_shards, source_id
from pipelines.sharding.sources import list_sources, source_facts
from training.config import TrainConfig
from training.data.samples import SampleReader

PER_SHARD, SAMPLE_BYTES, NUM_PLACES = 256, 500_000, 20_000
FACTS = {"scale": 4, "has_lr": True}


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


def close_from_records(output: str, num_shards: int) -> None:
    for number in range(num_shards):
        place = Path(record_uri(output, number))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(record(number).to_bytes())
    process, began, cpu = psutil.Process(), time.perf_counter(), time.process_time()
    before = process.memory_info().rss
    write_manifest(output, num_shards, **FACTS)
    gib = (process.memory_info().rss - before) / 2**30
    print(
        f"close: {time.process_time() - cpu:.1f} CPU s, {time.perf_counter() - began:.1f} s, {gib:.2f} GiB", flush=True
    )


def make_index(output: str, num_shards: int) -> None:
    import pyarrow as pa

    parts, shards = [], []
    for start in range(0, num_shards, SHARDS_PER_PART):
        numbers = np.repeat(np.arange(start, min(start + SHARDS_PER_PART, num_shards)), PER_SHARD)
        within = np.arange(len(numbers)) % PER_SHARD
        names = {number: f"shards/{number:06d}.tar" for number in range(numbers[0], numbers[-1] + 1)}
        columns = {
            "key": [f"photos-{number:06d}-{i:03d}-0" for number, i in zip(numbers, within, strict=True)],
            "shard": [names[number] for number in numbers],
            "offset_bytes": within * SAMPLE_BYTES,
            "length_bytes": np.full(len(numbers), SAMPLE_BYTES),
            "phash": within.astype(np.uint64) * 7919,
            "source_hash": numbers.astype(np.uint64) * 256,
        }
        parts.append(put_part(output, len(parts), pa.table(columns)))
        shards += [
            {"shard": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}
            | {"num_bytes": PER_SHARD * SAMPLE_BYTES, "num_samples": PER_SHARD}
            for name in names.values()
        ]
    put_manifest(output, {"shards": shards, "index": parts, "quarantined": [], "dropped": {}, **FACTS})


def rank(output: str, number: int) -> None:
    """Open the set, find samples, then wait for the other one before memory is measured."""
    values = {"job": "train", "output": "o", "stage": 0, "data": [output], "init_from": "random", "num_updates": 1}
    config = TrainConfig.model_validate(values)
    import pyarrow.parquet  # noqa: F401  not a cost of the index

    process = psutil.Process()
    before, began, cpu = process.memory_full_info(), time.perf_counter(), time.process_time()
    reader = SampleReader([Manifest.load(output)], config)
    opened, opened_cpu, began = time.perf_counter() - began, time.process_time() - cpu, time.process_time()
    for position in range(number, 2 * NUM_PLACES, 2):
        reader.place(position)
    place = (time.process_time() - began) / NUM_PLACES
    print("ready", flush=True)
    sys.stdin.readline()
    after = process.memory_full_info()
    numbers = {"open_s": opened, "open_cpu_s": opened_cpu, "place_cpu_us": place * 1e6}
    numbers |= {"own_gib": (after.uss - before.uss) / 2**30, "resident_gib": (after.rss - before.rss) / 2**30}
    print(json.dumps({name: round(value, 3) for name, value in numbers.items()}), flush=True)
    sys.stdin.readline()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def plan(million: int) -> None:
    """The driver's cost beyond listing a folder: the list of files, its identity, and every shard's plan as it is sent
    to a worker. Memory is anonymous: what is mapped the system can take back."""
    names = (f"2026/11/{number:09d}.jpg" for number in range(million * 10**6))
    sources.list_in_parts = lambda root, **_: ((name, SAMPLE_BYTES) for name in names)
    source = {"kind": "folder", "name": "photos", "path": "/photos"}
    config = ShardConfig.model_validate({"job": "shard", "output": "o", "sources": [source]})
    began, before, most = time.process_time(), anonymous_bytes(), 0
    files = list_sources(config.sources)
    listed = time.process_time()
    source_id(files)
    source_facts(config.sources, files)
    shards = plan_shards(files, config)
    assert len(files) == million * 10**6
    identified = time.process_time()
    for start in range(0, len(shards), ITEMS_AT_ONCE):
        sent = [pickle.dumps(shard) for shard in shards[start : start + ITEMS_AT_ONCE]]
        most = max(most, anonymous_bytes() - before)
        del sent
    ended = time.process_time()
    print(
        f"plan: {ended - began:.1f} CPU s ({listed - began:.1f} the list, {identified - listed:.1f} its identity, "
        f"{ended - identified:.1f} the shards), {most / 2**30:.2f} GiB",
        flush=True,
    )


def main(millions: list[int]) -> None:
    for million in millions:
        num_shards = -(-million * 10**6 // PER_SHARD)
        with tempfile.TemporaryDirectory() as output:
            print(f"{million} million in {num_shards} shards", flush=True)
            if million <= 10:
                subprocess.run([sys.executable, __file__, "plan", str(million)], check=True)
            (make_index if million > 10 else close_from_records)(output, num_shards)
            parts = [path.stat().st_size for path in Path(output).glob("index*")]
            print(f"{len(parts)} parts of {sum(parts) / 2**20:.0f} MiB in all", flush=True)
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "rank", output, str(number)], stdin=-1, stdout=-1, text=True
                )
                for number in range(2)
            ]
            for step in range(2):
                for process in ranks:
                    said = process.stdout.readline().strip()  # type: ignore[union-attr]
                    print(f"rank: {said}" if step else "", end="\n" if step else "", flush=True)
                for process in ranks:
                    process.stdin.write("\n")  # type: ignore[union-attr]
                    process.stdin.flush()  # type: ignore[union-attr]
            assert [process.wait() for process in ranks] == [0, 0]


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "plan":
        plan(int(sys.argv[2]))
    else:
        main([int(argument) for argument in sys.argv[1:]])
