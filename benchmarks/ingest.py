"""The ingest with many ranks on one machine: Ray tasks (the product) against Ray Data against one process.

    python benchmarks/ingest.py [--ranks 32] [--cpus 4] [--updates 6] [--size 512]

Ranks are threads of actors that need no CPU, eight in each; `--cpus` are the logical CPUs that degrade.
Every rank takes its micro-batches and checks positions and pixels against the in-process reader.
"""

import argparse
import os
import platform
import re
import tempfile
import threading
import time
import zlib
from collections.abc import Generator
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import psutil
import ray
import torch

from infra import rng_for
from infra.config import parse_config
from infra.imaging.images import encode_png
from infra.process.ray_runtime import RayConfig, ray_cluster
from infra.shards.manifest import Manifest
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import run_shard
from training.config import TrainConfig
from training.data.batches import Batch, make_arrays, updates, window
from training.data.order import positions_of
from training.data.samples import Place, SampleMaker, SampleReader, TrainingSample

Sums = dict[int, int]


@dataclass(frozen=True)
class CountedMaker(SampleMaker):
    """Leaves one byte per sample in a file, so that what is made but not taken can be counted."""

    log: str = ""

    def __call__(self, place: Place) -> TrainingSample:
        sample = super().__call__(place)
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, b".")
        os.close(file)
        return sample


def checksum(image: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(image))


class Ranks:
    """Training processes without a model: a thread of this actor simulates each."""

    def __init__(self, world_size: int, reader: SampleReader) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.world_size, self.reader = world_size, reader

    def ready(self) -> None:
        pass

    def run(
        self, rank: int, candidate: str, config: SimpleNamespace, step_seconds: float, stop_after: int, sums: Sums
    ) -> tuple[float, float, float]:
        """Seconds to the first batch, seconds waited after it, seconds in all after it. Raises where a batch is wrong.

        After `stop_after` updates the rank takes nothing for 15 s.
        """
        stream = self._tasks(rank, config) if candidate == "tasks" else self._ray_data(rank, config)
        asked = time.perf_counter()
        first = began = waited = 0.0
        expected = self._micro_batches(rank, config)
        taken = []
        for number, (positions, hr, lr) in enumerate(stream):
            arrived = time.perf_counter()
            if number == 0:
                first, began = arrived - asked, arrived
            else:
                waited += arrived - asked
            taken.append(positions)
            for position, one, other in zip(positions, hr, lr, strict=True):
                if position in sums and sums[position] != checksum(one) ^ checksum(other):
                    raise ValueError(f"position {position} has other pixels than in one process")
            if number + 1 == stop_after:
                time.sleep(15)
                stream.close()
                return first, 0.0, 0.0
            time.sleep(step_seconds)
            asked = time.perf_counter()
        if taken != expected:
            raise ValueError(f"rank {rank} took {taken}, not {expected}")
        return first, waited, asked - began

    def _micro_batches(self, rank: int, config: SimpleNamespace) -> list[list[int]]:
        """The positions of each micro-batch that the rank takes, in order."""
        sizes = {
            "global_batch_size": config.global_batch_size,
            "micro_batch_size": config.runtime.micro_batch_size,
        }
        return [
            list(positions)
            for update in range(config.num_updates)
            for positions in positions_of(update, rank, self.world_size, **sizes)
        ]

    def _tasks(
        self, rank: int, config: SimpleNamespace
    ) -> Generator[tuple[list[int], np.ndarray, np.ndarray], None, None]:
        def arrays(batch: Batch) -> tuple[list[int], np.ndarray, np.ndarray]:
            return batch.positions, batch.hr.permute(0, 2, 3, 1).numpy(), batch.lr.permute(0, 2, 3, 1).numpy()

        for (batch,) in updates(self.reader, config, start=0, rank=rank, world_size=self.world_size):
            yield arrays(batch)

    def _ray_data(
        self, rank: int, config: SimpleNamespace
    ) -> Generator[tuple[list[int], np.ndarray, np.ndarray], None, None]:
        from ray.data import DataContext, ExecutionResources

        reader = self.reader
        context = DataContext.get_current()
        context.enable_progress_bars = False
        options = context.execution_options
        options.preserve_order = True
        options.resource_limits = ExecutionResources(cpu=config.runtime.ingest_cpus)
        size = config.runtime.micro_batch_size
        micro_batches = [[reader.place(p) for p in positions] for positions in self._micro_batches(rank, config)]
        shared = ray.put((reader.maker, micro_batches))

        def make(rows: dict[str, np.ndarray]) -> dict[str, Any]:
            torch.set_num_threads(1)
            cv2.setNumThreads(1)
            maker, all_places = ray.get(shared)
            (number,) = rows["id"]
            places = all_places[int(number)]
            return {"position": np.array([place.position for place in places]), **make_arrays(maker, places)}

        count = len(micro_batches)
        tasks = ray.data.range(count, override_num_blocks=count).map_batches(make, batch_size=None, num_cpus=1)
        for rows in tasks.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=1):
            yield rows["position"].tolist(), rows["hr"], rows["lr"]


class Usage:
    """Polls CPU seconds and memory of Ray's processes and the object store's content while the block runs."""

    def __init__(self) -> None:
        self.cpu: dict[tuple[int, float], float] = {}
        self.before: dict[tuple[int, float], float] = {}
        self.peak_memory = self.peak_store = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Usage":
        self._poll()
        self.before = dict(self.cpu)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()

    @property
    def cpu_seconds(self) -> float:
        return sum(seconds - self.before.get(process, 0.0) for process, seconds in self.cpu.items())

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._poll()

    def _poll(self) -> None:
        from ray._private.internal_api import memory_summary

        memory = 0.0
        for process in psutil.Process().children(recursive=True):
            try:
                times, sizes = process.cpu_times(), process.memory_info()
                self.cpu[process.pid, process.create_time()] = times.user + times.system
                memory += (sizes.rss - sizes.shared) / 2**20
            except psutil.Error:
                continue
        self.peak_memory = max(self.peak_memory, memory)
        found = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(stats_only=True))
        self.peak_store = max(self.peak_store, float(found[1]) if found else float("nan"))


def make_shards(folder: Path, size: int, num_images: int) -> str:
    """A shard set without LR images: smooth colour, edges and noise, so that PNG and JPEG have work to do."""
    for number in range(num_images):
        rng = rng_for(0, "picture", number)
        image = cv2.resize(rng.uniform(30, 220, (24, 24, 3)), (size + 64, size + 64), interpolation=cv2.INTER_CUBIC)
        image[:: rng.integers(7, 40)] *= 0.6
        image += rng.normal(0, 6, image.shape)
        path = folder / "photos" / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_png(np.clip(np.rint(image), 0, 255).astype(np.uint8)))
    values = {
        "job": "shard",
        "output": str(folder / "shards"),
        "sources": [{"kind": "folder", "name": "photos", "path": str(folder / "photos")}],
        "degradation": None,
        "samples_per_shard": 16,
    }
    return run_shard(parse_config(values, ShardConfig, where="benchmark")).uri


def train_config(shards: str, options: argparse.Namespace) -> TrainConfig:
    values = {
        "job": "train",
        "output": "none",
        "stage": 1,
        "data": [shards],
        "crop_px": options.size,
        "degradation": "ccsr",
        "global_batch_size": options.ranks * 4,
        "num_updates": 1,
        "runtime": {"num_workers": options.ranks, "micro_batch_size": 4, "ingest_cpus": options.per_rank},
    }
    return parse_config(values, TrainConfig, where="benchmark")


def plain(config: TrainConfig, num_updates: int) -> SimpleNamespace:
    """What the ingest asks of a config, without the networks that importing TrainConfig brings: 300 MB a rank."""
    runtime = SimpleNamespace(**{name: getattr(config.runtime, name) for name in type(config.runtime).model_fields})
    return SimpleNamespace(global_batch_size=config.global_batch_size, num_updates=num_updates, runtime=runtime)


def in_process(reader: SampleReader, num_samples: int) -> tuple[Sums, float]:
    """Checksums of the first samples, and CPU seconds a sample, of one thread."""
    make_arrays(reader.maker, [reader.place(0)])
    sums: Sums = {}
    began = time.process_time()
    for first in range(0, num_samples, 4):
        arrays = make_arrays(reader.maker, [reader.place(position) for position in range(first, first + 4)])
        for offset, (hr, lr) in enumerate(zip(arrays["hr"], arrays["lr"], strict=True)):
            sums[first + offset] = checksum(hr) ^ checksum(lr)
    return sums, (time.process_time() - began) / num_samples


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--cpus", type=int, default=4, help="logical CPUs of the local Ray")
    parser.add_argument("--per-rank", type=int, default=1, help="runtime.ingest_cpus")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--candidates", nargs="+", default=["tasks", "data"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ray {version('ray')}")
    print(f"{options.ranks} ranks, {options.cpus} logical CPUs, micro-batch 4, {options.size} px, recipe ccsr")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ray_cluster(RayConfig(num_cpus=options.cpus, object_store_bytes=2 * 2**30)),
    ):
        config = train_config(make_shards(Path(scratch), options.size, 64), options)
        reader = SampleReader([Manifest.load(part.path) for part in config.data], config)
        sums, alone = in_process(reader, 64)
        print(f"one process: {alone * 1000:.1f} CPU ms a sample\n", flush=True)
        log = Path(scratch) / "made"
        reader.maker = CountedMaker(*(getattr(reader.maker, f.name) for f in fields(reader.maker)), log=str(log))
        actor = ray.remote(num_cpus=0, max_concurrency=8)(Ranks)
        actors = [actor.remote(options.ranks, reader) for _ in range(-(-options.ranks // 8))]
        ray.get([one.ready.remote() for one in actors])
        for candidate in options.candidates:
            measure(candidate, actors, plain(config, options.updates), sums, alone, log)


def measure(candidate: str, actors: list[Any], config: SimpleNamespace, sums: Sums, alone: float, log: Path) -> None:
    num_samples = config.num_updates * config.global_batch_size
    rate = 0.0
    for trial in ("cold", "warm"):
        results, usage, seconds, _ = run(candidate, actors, config, sums, log)
        rate = num_samples / seconds
        first = [result[0] for result in results]
        print(
            f"{candidate} {trial}: {rate:.1f} samples/s, {usage.cpu_seconds / num_samples * 1000:.1f} CPU ms a sample "
            f"({usage.cpu_seconds / num_samples / alone:.2f} x one process), first batch median {np.median(first):.1f} "
            f"max {max(first):.1f} s, peak memory {usage.peak_memory:.0f} MiB, object store {usage.peak_store:.0f} MiB",
            flush=True,
        )
    *_, made = run(candidate, actors, with_updates(config, 60), sums, log, stop_after=1)
    ahead = made / config.runtime.num_workers / config.runtime.micro_batch_size - 1
    bound = window(config, config.runtime.num_workers)
    print(f"{candidate} slow: {ahead:.2f} micro-batches ahead of each rank after 15 s (window of the tasks: {bound})")
    step = 2 * config.global_batch_size / rate
    results, *_ = run(candidate, actors, with_updates(config, 10), sums, log, step_seconds=step)
    waits = [waited / total for _, waited, total in results]
    print(
        f"{candidate} at half its rate (steps of {step:.1f} s): waits {100 * np.mean(waits):.2f} % of the time, "
        f"worst rank {100 * max(waits):.2f} %, first batch up to {max(result[0] for result in results):.1f} s\n",
        flush=True,
    )


def with_updates(config: SimpleNamespace, num_updates: int) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(config), "num_updates": num_updates})


def run(
    candidate: str,
    actors: list[Any],
    config: SimpleNamespace,
    sums: Sums,
    log: Path,
    step_seconds: float = 0.0,
    stop_after: int = 0,
) -> tuple[list[tuple[float, float, float]], Usage, float, int]:
    log.write_bytes(b"")
    began = time.perf_counter()
    with Usage() as usage:
        ranks = range(config.runtime.num_workers)
        calls = [
            actors[rank // 8].run.remote(rank, candidate, config, step_seconds, stop_after, sums) for rank in ranks
        ]
        results = ray.get(calls)
        seconds = time.perf_counter() - began
    return results, usage, seconds, log.stat().st_size


if __name__ == "__main__":
    main()
