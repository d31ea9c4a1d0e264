"""The scaling model of `ccsr estimate` against measured gloo ranks on this machine's cores.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling [--ranks 1 2 4 --rounds 5]

Parts come from one rank (an update of 4 and of 16 samples gives a sample's and an update's own time) and from an
all_reduce of two ranks. Predicted and measured are updates of the training loop itself, of 16 samples. Times are CPU
times of a rank, times the ranks that share a core: what an update takes where nothing else runs. Gloo sleeps while it
waits, so waiting for another rank is not in them. More ranks than cores share them: 4 on 2 cores show no speed-up, only
that what they cost is understood.

A core's CPU time depends on what its neighbour does, so no measurement leaves a core idle: one rank is measured as a
separate group beside others like it. A round measures parts and updates within minutes of each other; the difference
is the median of the rounds' own, and their range is printed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from infra.shards.manifest import Manifest
from pipelines.estimate.scaling import Limits, Parts, update_seconds
from tests.training_runs import free_port, join_group, noise_shards, train_config
from training.run.export import initial_model
from training.run.worker import WorkerContext, train

FEW, MANY = 4, 16
LINK = 0  # in place of a batch: an all_reduce
UPDATES, WARM_UP = 6, 2
CORES = len(os.sched_getaffinity(0))
SHARE_BYTES = 64 * 2**20


class Clock:
    """In the place of the loop's tracker: the CPU time at each update's end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.ends.append(time.process_time())

    def file(self, place: str, content: bytes) -> None:
        pass


def rank_main(spec: dict[str, Any], rank: int) -> None:
    """One rank: the mean CPU time of an update of each batch, or of an all_reduce."""
    join_group(rank, spec["world_size"], spec["port"])
    print(json.dumps([_all_reduce() if batch == LINK else _update(spec, rank, batch) for batch in spec["batches"]]))


def _all_reduce() -> float:
    flat, ends = torch.zeros(SHARE_BYTES // 4), []
    for _ in range(UPDATES):
        torch.distributed.all_reduce(flat)
        ends.append(time.process_time())
    return _mean(ends)


def _update(spec: dict[str, Any], rank: int, batch: int) -> float:
    runtime = {"micro_batch_size": 1, "checkpoint_every": 1000}
    output = f"{spec['folder']}/run-{spec['port']}-{batch}"
    changes = {"global_batch_size": batch, "crop_px": 64, "runtime": runtime}
    config, clock = train_config(spec["data"], output, num_updates=UPDATES, **changes), Clock()
    context = WorkerContext(rank, spec["world_size"], "cpu", {}, tracker=clock)
    train(config, [Manifest.load(spec["data"])], initial_model(config), context)
    return _mean(clock.ends)


def _mean(ends: list[float]) -> float:
    return (ends[-1] - ends[WARM_UP - 1]) / (len(ends) - WARM_UP)


def run(folder: str, data: str, world_size: int, batches: list[int]) -> list[float]:
    """The mean over ranks of what they measured, in as many groups of `world_size` as keep every core busy."""
    ranks = []
    for _ in range(max(1, CORES // world_size)):
        values = {"world_size": world_size, "port": free_port(), "batches": batches, "folder": folder, "data": data}
        command = [sys.executable, "-m", "benchmarks.scaling", "--spec", json.dumps(values), "--rank"]
        for rank in range(world_size):
            ranks.append(subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [process.communicate() for process in ranks]
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, errors.decode()
    return [mean(of_batch) for of_batch in zip(*(json.loads(o.splitlines()[-1]) for o, _ in outputs), strict=True)]


def on_cores(parts: Parts, link_bytes_per_second: float, num_ranks: int) -> float:
    """Predicted seconds of an update of gloo ranks that share this machine's cores."""
    limits = Limits(ranks_per_node=num_ranks, link_bytes_per_second=link_bytes_per_second, cores=CORES, hop_seconds=0)
    return sum(update_seconds(parts, limits, num_ranks, MANY).values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spec")
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args()
    if options.spec:
        rank_main(json.loads(options.spec), options.rank)
        return
    model = initial_model(train_config("none", "none", num_updates=1))
    trained = sum(weight.numel() for weight in model.trained_part(1).parameters())
    rows: dict[int, list[tuple[float, float]]] = {number: [] for number in options.ranks}
    with tempfile.TemporaryDirectory() as folder:
        data = noise_shards(Path(folder) / "data", 16, 64)
        for _ in range(options.rounds):
            few, many = run(folder, data, 1, [FEW, MANY])
            link_seconds, pair = run(folder, data, 2, [LINK, MANY])
            per_sample = (many - few) / (MANY - FEW)
            fixed, link = few - FEW * per_sample, SHARE_BYTES / link_seconds  # 2 (n - 1) / n is 1
            parts = Parts(per_sample, 4 * trained, fixed_seconds=fixed)
            print(f"a sample {per_sample:.3f} s, an update's own {fixed:.3f} s, gloo {link / 1e9:.2f} GB/s", flush=True)
            known = {1: many, 2: pair}
            for number in options.ranks:
                measured = known[number] if number in known else run(folder, data, number, [MANY])[0]
                crowd = max(1.0, number / CORES)
                rows[number].append((on_cores(parts, link, number), crowd * measured))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {CORES} cores, load {os.getloadavg()[0]:.0f}")
    print("| ranks | predicted, s | measured, s | difference | of single rounds |\n|---|---|---|---|---|")
    for number, pairs in rows.items():
        predicted, measured = (median(values) for values in zip(*pairs, strict=True))
        off = sorted(one / other - 1 for one, other in pairs)
        spread = f"{off[0]:+.1%} to {off[-1]:+.1%}"
        print(f"| {number} | {predicted:.3f} | {measured:.3f} | {median(off):+.1%} | {spread} |")


if __name__ == "__main__":
    main()
