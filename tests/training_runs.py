"""Small training runs on synthetic shards, in this process or in separate gloo workers, without Ray.

As a program: `python -m tests.training_runs SPEC RANK`, SPEC being a JSON file that `run_workers` writes.
"""

import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.config import parse_config
from infra.files.publish import publish_if_absent, write_bytes
from infra.files.storage import sha256_file
from infra.imaging.images import encode_png
from infra.seeding import rng_for
from infra.shards.manifest import Manifest, ShardRecord, commit_record, write_manifest
from infra.shards.shard import IndexedEntry, write_tar
from tests.small_networks import seeded_lpips, small_dino, smaller_tiny
from training.config import TrainConfig
from training.data.batches import Batch, stack, updates
from training.data.samples import TrainingSample
from training.models import CcsrModel
from training.run.step.stages import Stage, build_stage

REPOSITORY = Path(__file__).parents[1]


def collate(samples: Sequence[TrainingSample]) -> Batch:
    """A micro-batch of samples, as the ingest makes it."""
    return Batch.of([s.key for s in samples], [s.position for s in samples], stack(samples))


def noise_shards(folder: Path, num_samples: int = 24, size: int = 32) -> str:
    """A shard set whose pixels are raw Philox words and integer means of them: the same bits everywhere."""

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        words = rng_for(5, "pixels", number).bit_generator.random_raw(size * size // 16 * 3)
        small = (words >> np.uint64(40)).astype(np.uint8).reshape(size // 4, size // 4, 3)
        fine = (words[:, None] >> np.arange(0, 64, 4, dtype=np.uint64) & np.uint64(63)).astype(np.uint8)
        hr = np.kron(small, np.ones((4, 4, 1), np.uint8)) // 2 + fine.reshape(size, size, 3)
        lr = hr.reshape(size // 4, 4, size // 4, 4, 3).astype(np.uint32).sum((1, 3)) // 16
        facts = json.dumps({"degradation": {"clean": False}}).encode()
        images = {"hr.png": encode_png(hr), "lr.png": encode_png(lr.astype(np.uint8))}
        return f"noise-{number:03d}", {**images, "json": facts}

    with tempfile.TemporaryDirectory() as scratch:
        tar = Path(scratch) / "000000.tar"
        entries = write_tar(tar, "shards/000000.tar", map(sample, range(num_samples)))
        indexed = [IndexedEntry(e.key, e.shard, e.offset_bytes, e.length_bytes) for e in entries]
        publish_if_absent(tar, f"{folder}/shards/000000.tar")
        record = ShardRecord(0, "shards/000000.tar", sha256_file(tar), tar.stat().st_size, indexed, [])
    commit_record(str(folder), record)
    write_manifest(str(folder), 1, scale=4, has_lr=True)
    return str(folder)


def train_config(data: str, output: Path | str, *, stage: int = 1, num_updates: int, **changes: Any) -> TrainConfig:
    """The tiny model, 4 samples of 32 px an update in micro-batches of 2. Stage 2 with GAN and discriminator learns
    slowly: faster, the last bits of 30 updates grow to per cents of the loss."""
    learning_rate = 1e-4 if stage == 2 else 1e-3
    values = {
        "job": "train",
        "init_from": "random",
        "output": str(output),
        "stage": stage,
        "data": [data],
        "model": {"family": "v1"},
        "crop_px": 32,
        "global_batch_size": 4,
        "num_updates": num_updates,
        "optimizer": {"learning_rate": learning_rate},
    }
    if stage == 2:
        loss = {"gan_weight": 0.1, "discriminator_width": 16, "discriminator_learning_rate": learning_rate}
        values |= {"num_steps": 6, "decoder_loss": loss}
    runtime = {"micro_batch_size": 2, "checkpoint_every": 10, **changes.pop("runtime", {})}
    return parse_config(values | {"runtime": runtime} | changes, TrainConfig, where="test")


def finished_run(folder: Path, tracking_uri: str | None) -> TrainConfig:
    """A run of 3 updates of 4 samples whose second one was the best, exported on its way too; in MLflow its
    validation's numbers."""
    from infra.mlflow.tracking import track
    from training.run.checkpoint import TrainingState, save_checkpoint

    tracking = {"uri": tracking_uri, "experiment": folder.name, "register": "sr@champion"}
    data = noise_shards(folder / "set", 4)
    validation = {"data": [data]}
    config = train_config(data, folder / "run", num_updates=3, tracking=tracking, validation=validation)
    scores = {1: (20.0, 0.3), 2: (25.0, 0.1), 3: (24.0, 0.2)}  # update -> PSNR-Y, L-STD
    for update, (psnr, _) in scores.items():
        facts = {"position": 4 * update, "num_updates": update, "validation": {"psnr_y": psnr}}
        save_checkpoint(config.output, TrainingState(facts, {"weights": {}}), keep=9)
    for name in ("exports/000000000004", "best", "model"):
        write_bytes(f"{config.output}/{name}/ccsr.json", name.encode())
    write_bytes(f"{config.output}/trained.json", b'{"num_updates": 3, "position": 12}')
    with track(config.tracking, {"job": "train", "fingerprint": "1", "config": {}}, output=config.output) as tracker:
        for update, (psnr, std) in scores.items():
            tracker.metrics({"validation/psnr_y": psnr, "validation/l_std": std}, 4 * update)
    return config


class Losses:
    """Takes the place of rank 0's MLflow run: keeps the losses, in FILE too; stage 2's `d_values` in FILE.d_loss; and
    all else that came with them, the last in FILE.last."""

    def __init__(self, file: Path | None = None) -> None:
        self.values: list[float] = []
        self.d_values: list[float] = []
        self.reports: list[dict[str, float]] = []
        self._file = file

    def metrics(self, values: dict[str, float], step: int) -> None:
        if "loss/loss" not in values:  # a validation's
            return
        values = {name.rpartition("/")[2]: value for name, value in values.items()}
        self.reports.append(values)
        if self._file is not None:
            Path(f"{self._file}.last").write_text(json.dumps(values))
        for kept, name, suffix in ((self.values, "loss", ""), (self.d_values, "d_loss", ".d_loss")):
            if name in values:
                kept.append(values[name])
                if self._file is not None:
                    with open(f"{self._file}{suffix}", "a") as file:
                        file.write(f"{values[name]!r}\n")

    def file(self, place: str, content: bytes) -> None:
        pass

    def image(self, key: str, png: bytes, step: int) -> None:
        pass


def train_here(config: TrainConfig, rank: int = 0, world_size: int = 1, losses: Losses | None = None) -> list[float]:
    """Run the loop in this process, which is in a process group; the losses of the updates that it did."""
    from training.run.export import initial_model
    from training.run.worker import WorkerContext, train

    losses = losses or Losses()
    manifests = [Manifest.load(part.path) for part in config.data]
    context = WorkerContext(rank, world_size, "cpu", {}, tracker=losses if rank == 0 else None)
    train(config, manifests, initial_model(config), context)
    return losses.values


def join_group(rank: int, world_size: int, port: int) -> None:
    """Make this process one of a gloo group, as the workers of `ccsr train` are."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from training.run.step.engine import load_deepspeed

    deepspeed = load_deepspeed()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_workers(folder: Path, runs: list[dict[str, Any]], world_size: int = 2) -> None:
    """Let processes of one group do `runs` one after another.

    Each is {"config", "losses"} and perhaps "poison" (a position), "bad_gradient" (an update), "resave" (an output),
    "temporary" (the folder for temporary files), "seed_by_rank", "small" or "late" (a rank).
    """
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"world_size": world_size, "port": free_port(), "runs": runs}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"worker-{rank}.log" for rank in range(world_size)]
    workers = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.training_runs", str(spec), str(rank)]
        with log.open("w") as file:
            workers.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file))
    try:
        assert [worker.wait(timeout=900) for worker in workers] == [0] * world_size, logs[0].read_text()[-5000:]
    finally:
        for worker in workers:
            worker.kill()


def poisoned(position: int) -> Callable[..., Iterator[list[Any]]]:
    """In place of the loop's `updates`: the sample at `position` is not a number."""

    def stream(*arguments: Any, **named: Any) -> Iterator[list[Any]]:
        for batches in updates(*arguments, **named):
            yield [replace(b, hr=b.hr * float("nan")) if position in b.positions else b for b in batches]

    return stream


def late(seconds: float) -> Callable[..., Iterator[list[Any]]]:
    """In place of the loop's `updates`: each update's batches are late."""

    def stream(*arguments: Any, **named: Any) -> Iterator[list[Any]]:
        for batches in updates(*arguments, **named):
            time.sleep(seconds)
            yield batches

    return stream


def with_bad_gradient(update: int) -> Callable[..., Stage]:
    """In place of the loop's `build_stage`: at an update, from 0, a gradient is infinite and the loss is not."""

    def build(model: CcsrModel, config: TrainConfig) -> Stage:
        stage = build_stage(model, config)
        num_micro_steps = config.global_batch_size // config.runtime.micro_batch_size
        num_micro_steps //= torch.distributed.get_world_size()
        calls = itertools.count()

        def spoil(gradient: Tensor) -> Tensor:
            return gradient * (float("inf") if next(calls) // num_micro_steps == update else 1)

        next(stage.trained.parameters()).register_hook(spoil)
        return stage

    return build


def resave(config: TrainConfig, rank: int, world_size: int, output: str) -> None:
    """Restore the newest checkpoint into engines of this world size and write what they hold to `output`."""
    from training.run import worker as loop
    from training.run.checkpointer import Checkpoints
    from training.run.export import initial_model

    context = loop.WorkerContext(rank, world_size, "cpu", {})
    stage = loop.build_stage(initial_model(config), config)
    engine, optimizer = loop.make_engine(stage, config, context.world_size, context.device)
    critic = loop.TrainedCritic(stage.critic, config, context) if stage.critic else None
    parts = engine, optimizer, critic
    done = Checkpoints(config, *parts, context).resume()
    with Checkpoints(config.model_copy(update={"output": output}), *parts, context) as copy:
        copy.save(done)


def main(spec_file: str, rank: int) -> None:
    """A run's losses, and each rank's [kind of error, where] in LOSSES.RANK, are for the test to read."""
    from infra.errors import CcsrError
    from training.run import worker as loop
    from training.run.agreement import OtherRankError
    from training.run.step import critics
    from training.run.step import stages as steps

    critics.load_dino, steps.load_lpips = small_dino, seeded_lpips
    gc.set_threshold(100_000)  # by default torch's own objects are searched every few runs
    spec = json.loads(Path(spec_file).read_text())
    join_group(rank, spec["world_size"], spec["port"])
    for run in spec["runs"]:
        config = parse_config(run["config"], TrainConfig, where="spec")
        if "seed_by_rank" in run:
            config = config.model_copy(update={"seed": rank})
        loop.updates = poisoned(run["poison"]) if "poison" in run else updates
        if run.get("late") == rank:
            loop.updates = late(0.5)
        loop.build_stage = with_bad_gradient(run["bad_gradient"]) if "bad_gradient" in run else build_stage
        tempfile.tempdir = run.get("temporary")
        outcome = ["", ""]
        try:
            with smaller_tiny() if "small" in run else nullcontext():
                if "resave" in run:
                    resave(config, rank, spec["world_size"], run["resave"])
                else:
                    train_here(config, rank, spec["world_size"], Losses(Path(run["losses"])))
        except (CcsrError, OtherRankError) as error:
            outcome = [type(error).__name__, getattr(error, "where", "")]
        Path(f"{run['losses']}.{rank}").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
