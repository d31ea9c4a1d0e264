"""The scaling model of `ccsr estimate` against measured gloo ranks on this machine's cores.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling [--ranks 1 2 4 --rounds 1]

Parts come from one rank (an update of 8 and of 16 samples gives a sample's and an update's own time) and from an
all_reduce of two ranks. Predicted and measured are updates of the training loop itself, of 16 samples. Times are CPU
times of a rank, times the ranks that share a core: what an update takes where nothing else runs. Gloo sleeps while it
waits, so waiting for another rank is not in them. More ranks than cores share them: 4 on 2 cores show no speed-up, only
that what they cost is understood.
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
from statistics import median
from typing import Any

import torch

from pipelines.estimate.scaling import Parts, on_cores
from tests.training_runs import free_port, join_group, noise_shards, train_config

BATCHES = (8, 16)
UPDATES, WARM_UP = 5, 2
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
    """One rank: the median CPU time of an update, or of an all_reduce."""
    from infra.manifest import Manifest
    from training.run.export import initial_model
    from training.run.worker import WorkerContext, train

    join_group(rank, spec["world_size"], spec["port"])
    if spec["batch"] is None:
        flat, times = torch.zeros(SHARE_BYTES // 4), []
        for _ in range(UPDATES):
            began = time.process_time()
            torch.distributed.all_reduce(flat)
            times.append(time.process_time() - began)
        seconds, trained = median(times[WARM_UP:]), 0
    else:
        runtime = {"micro_batch_size": 1, "checkpoint_every": 1000}
        output = f"{spec['folder']}/run-{spec['port']}"
        config = train_config(
            spec["data"], output, num_updates=UPDATES, global_batch_size=spec["batch"], crop_px=64, runtime=runtime
        )
        clock, model = Clock(), initial_model(config)
        context = WorkerContext(rank, spec["world_size"], "cpu", {}, tracker=clock)
        train(config, [Manifest.load(spec["data"])], model, context)
        trained = sum(weight.numel() for weight in model.trained_part(1).parameters())
        seconds = median(b - a for a, b in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False))
    if rank == 0:
        print(json.dumps({"seconds": seconds, "trained": trained}))


def run(folder: str, data: str, world_size: int, batch: int | None) -> dict[str, float]:
    """What rank 0 of a group of `world_size` measured."""
    text = json.dumps({"world_size": world_size, "port": free_port(), "batch": batch, "folder": folder, "data": data})
    command = [sys.executable, "-m", "benchmarks.scaling", "--spec", text, "--rank"]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for rank in range(world_size)
    ]
    outputs = [process.communicate()[0] for process in ranks]
    assert not any(process.returncode for process in ranks)
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--spec")
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args()
    if options.spec:
        rank_main(json.loads(options.spec), options.rank)
        return
    cores = len(os.sched_getaffinity(0))
    few, many = BATCHES
    rows: dict[int, list[tuple[float, float]]] = {number: [] for number in options.ranks}
    with tempfile.TemporaryDirectory() as folder:
        data = noise_shards(Path(folder) / "data", 16, 64)
        for _ in range(options.rounds):
            alone = {batch: run(folder, data, 1, batch) for batch in BATCHES}
            per_sample = (alone[many]["seconds"] - alone[few]["seconds"]) / (many - few)
            fixed = alone[few]["seconds"] - few * per_sample
            parts = Parts(per_sample, 4 * alone[few]["trained"], fixed_seconds=fixed)
            link = SHARE_BYTES / run(folder, data, 2, None)["seconds"]  # 2 (n - 1) / n is 1
            print(f"a sample {per_sample:.3f} s, an update's own {fixed:.3f} s, gloo {link / 1e9:.2f} GB/s", flush=True)
            for number in options.ranks:
                measured = alone[many] if number == 1 else run(folder, data, number, many)
                crowd = max(1.0, number / cores)
                rows[number].append((on_cores(parts, link, cores, number, many), crowd * measured["seconds"]))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.0f}")
    print("| ranks | predicted, s | measured, s | difference |\n|---|---|---|---|")
    for number, pairs in rows.items():
        predicted, measured = (median(values) for values in zip(*pairs, strict=True))
        print(f"| {number} | {predicted:.3f} | {measured:.3f} | {predicted / measured - 1:+.1%} |")


if __name__ == "__main__":
    main()
