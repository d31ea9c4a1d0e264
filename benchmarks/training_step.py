"""The loop's update against a bare loop over the same DeepSpeed engine, and that against plain PyTorch; one CPU worker.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py [--rounds 12]

All three take the same batch in turns, in one process: a round is one update of each. The loop's includes its logging
to a real MLflow store (sqlite) after every update, which a separate thread posts: shown without that thread's work,
which in a run overlaps the next update, and with it counted in full. The ingest is not part (benchmarks/ingest.py).
"""

import argparse
import copy
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed
import numpy as np
import torch

import training.run.step.engine
import training.run.worker
from infra import rng_for
from infra.config import parse_config
from infra.mlflow.server import TrackingConfig
from infra.mlflow.tracking import track
from infra.process.background import BackgroundTracker
from tests.training_runs import collate
from training.config import TrainConfig
from training.data.batches import Batch
from training.data.samples import TrainingSample
from training.models import build_model
from training.run.agreement import WorkerContext

WARM_UP_ROUNDS = 2  # the loop counts FLOPs in the first


class Clock:
    """Wall and CPU seconds (all threads) of one call."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, call: Callable[[], Any]) -> None:
        began = self.now()
        call()
        self.add(began)

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def add(self, began: tuple[float, float]) -> None:
        wall, cpu = self.now()
        self.wall.append(wall - began[0])
        self.cpu.append(cpu - began[1])


class Bench:
    """Takes the place of the loop's engine set-up and of its stream, and runs the other two between two updates."""

    def __init__(self, config: TrainConfig, tracker: BackgroundTracker) -> None:
        self.config, self.tracker = config, tracker
        self.loop, self.posted, self.bare, self.plain = Clock(), Clock(), Clock(), Clock()
        self._make_engine = training.run.worker.make_engine

    def engine(
        self, stage: Any, config: TrainConfig, world_size: int, device: str
    ) -> tuple[Any, torch.optim.Optimizer]:
        self._plain = copy.deepcopy(stage)
        settings = config.optimizer
        self._optimizer = torch.optim.AdamW(
            [p for p in self._plain.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        engine, optimizer = self._make_engine(stage, config, world_size, device)
        self._engine = engine
        return engine, optimizer

    def stream(self, *_: object, **__: object) -> Iterator[list[Batch]]:
        batches = make_batches(self.config)
        ready = [batch.to("cpu") for batch in batches]  # the loop's own step moves and scales its batches
        for number in range(self.config.num_updates):
            self.bare(lambda: self._bare_update(ready))
            self.plain(lambda: self._plain_update(ready))
            began = Clock.now()
            yield batches
            self.loop.add(began)
            while self.tracker.num_waiting:
                time.sleep(0.001)
            self.posted.add(began)
            walls = (clock.wall[-1] for clock in (self.loop, self.bare, self.plain))
            print(f"round {number}: " + ", ".join(f"{wall:.3f}" for wall in walls) + " s", flush=True)

    def _bare_update(self, batches: list[Batch]) -> None:
        for batch in batches:
            self._engine.backward(self._engine(batch)["loss"])
            self._engine.step()

    def _plain_update(self, batches: list[Batch]) -> None:
        for batch in batches:
            (self._plain(batch)["loss"] / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self._plain.trained.parameters(), self.config.optimizer.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def make_batches(config: TrainConfig) -> list[Batch]:
    """One update's micro-batches of random pixels."""
    size, micro = config.crop_px, config.runtime.micro_batch_size

    def sample(position: int) -> TrainingSample:
        rng = rng_for(0, "benchmark", position)
        hr, lr = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (size, size // 4))
        return TrainingSample(str(position), position, hr, lr)

    starts = range(0, config.global_batch_size, micro)
    return [collate([sample(position) for position in range(start, start + micro)]) for start in starts]


def ratios(one: Clock, other: Clock) -> str:
    parts = []
    for name in ("wall", "cpu"):
        # The loop takes no batch after its last, so its clock has one reading fewer than the others.
        pairs = list(zip(getattr(one, name), getattr(other, name), strict=False))[WARM_UP_ROUNDS:]
        found = sorted(first / second for first, second in pairs)
        parts.append(f"{median(found):.4f} ({found[len(found) // 4]:.4f} to {found[-1 - len(found) // 4]:.4f})")
    return " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--crop-px", type=int, default=128)
    parser.add_argument("--zero-stage", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29547"}
    os.environ.update(alone | {"DS_ACCELERATOR": "cpu"})
    training.run.step.engine.load_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    with tempfile.TemporaryDirectory(prefix="ccsr-benchmark-") as folder:
        values = {
            "job": "train",
            "output": str(Path(folder) / "out"),
            "stage": 1,
            "data": ["none"],
            "crop_px": options.crop_px,
            "global_batch_size": 2 * options.micro_batch,
            "num_updates": WARM_UP_ROUNDS + options.rounds + 1,
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
            "runtime": {"micro_batch_size": options.micro_batch, "zero_stage": options.zero_stage},
        }
        config = parse_config(values, TrainConfig, where="benchmark")
        run = {"job": "train", "fingerprint": "benchmark", "config": {}}
        with track(TrackingConfig(uri=config.tracking.uri), run) as logged:
            tracker = BackgroundTracker(logged)
            bench = Bench(config, tracker)
            training.run.worker.make_engine, training.run.worker.updates = bench.engine, bench.stream  # type: ignore[assignment]
            training.run.worker.SampleReader = lambda *_: None  # type: ignore[assignment,misc]
            training.run.worker.train(
                config, [], build_model(config.model, 0), WorkerContext(0, 1, "cpu", {}, tracker=tracker)
            )
            tracker.close()
    names = ("torch", "deepspeed", "mlflow")
    print(f"\n{date.today()}  {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ", end="")
    print(", ".join(f"{name} {version(name)}" for name in names) + f"; {options}")
    for name in ("loop", "posted", "bare", "plain"):
        clock: Clock = getattr(bench, name)
        wall, cpu = median(clock.wall[WARM_UP_ROUNDS:]), median(clock.cpu[WARM_UP_ROUNDS:])
        print(f"{name:<6} median {wall:.3f} s, CPU {cpu:.3f} s")
    print("| ratio | wall: median (quartiles) | CPU: median (quartiles) |\n|---|---|---|")
    print(f"| loop / bare loop over the engine | {ratios(bench.loop, bench.bare)} |")
    print(f"| the same, its MLflow posts waited for | {ratios(bench.posted, bench.bare)} |")
    print(f"| engine / plain PyTorch | {ratios(bench.bare, bench.plain)} |")


if __name__ == "__main__":
    main()
