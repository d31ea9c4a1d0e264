"""Ingest by Ray tasks: the same batches as one process, in order, bounded, and whole after a worker was killed."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.cloudpickle
import torch

from infra import StorageError
from infra.imaging.images import UnusableImageError
from infra.shards.manifest import Manifest
from tests.training_runs import noise_shards, train_config
from tests.unit.photos import make_shard_set, make_two_sets, save_photos, shard_config
from training.config import TrainConfig
from training.data.batches import Batch, updates, window
from training.data.samples import Place, SampleMaker, SampleReader, TrainingSample
from training.run.checkpoint import complete_checkpoints, load_checkpoint
from training.run.driver import run_train

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test module


@dataclass(frozen=True)
class LoggedMaker(SampleMaker):
    """Writes down when a sample begins and ends and in which process; kills that process at one position, once."""

    log: str = ""
    killed_at: int = -1

    def __call__(self, place: Place) -> TrainingSample:
        self._write("begin", place.position)
        if place.position == self.killed_at and not os.path.exists(f"{self.log}.killed"):
            Path(f"{self.log}.killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        sample = super().__call__(place)
        self._write("end", place.position)
        return sample

    def _write(self, event: str, position: int) -> None:
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{event} {position} {os.getpid()}\n".encode())
        os.close(file)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return make_two_sets(tmp_path_factory.mktemp("ingest"))


def config(
    manifests: list[Manifest], *, num_updates: int = 6, degradation: str | None = "ccsr", **runtime: Any
) -> TrainConfig:
    values = {
        "job": "train",
        "init_from": "random",
        "output": "o",
        "stage": 1,
        "data": [manifest.uri for manifest in manifests],
        "crop_px": 32,
        "degradation": degradation,
        "num_updates": num_updates,
        "global_batch_size": 4,
        "runtime": {"micro_batch_size": 2, **runtime},
    }
    return TrainConfig.model_validate(values)


def logged(reader: SampleReader, log: Path, **more: Any) -> SampleReader:
    own = {field.name: getattr(reader.maker, field.name) for field in fields(SampleMaker)}
    reader.maker = LoggedMaker(**own, log=str(log), **more)
    return reader


def events(log: Path) -> list[tuple[str, int, int]]:
    lines = (line.split() for line in log.read_text().splitlines())
    return [(event, int(position), int(pid)) for event, position, pid in lines]


def assert_equal(ours: Iterator[list[Batch]], reference: Iterator[list[Batch]]) -> int:
    count = 0
    for batches, others in zip(ours, reference, strict=True):
        for one, other in zip(batches, others, strict=True):
            assert (one.keys, one.positions) == (other.keys, other.positions)
            assert torch.equal(one.hr, other.hr)
            assert torch.equal(one.lr, other.lr)
            assert (one.hr.stride(), one.lr.stride()) == (other.hr.stride(), other.lr.stride()), (
                "rounding depends on it"
            )
            count += 1
    return count


@pytest.mark.parametrize(("degradation", "start"), [("ccsr", 1), (None, 0)])
def test_tasks_give_the_bytes_of_one_process(
    ray_session: None, shards: list[Manifest], tmp_path: Path, degradation: str | None, start: int
) -> None:
    """Of two ranks, one beginning in mid-epoch (position 4 of 5)."""
    here, there = (config(shards, degradation=degradation, ingest_cpus=cpus) for cpus in (0, 2))
    for rank in range(2):
        log = tmp_path / f"log{rank}"
        place = {"start": start, "rank": rank, "world_size": 2}
        ours = updates(logged(SampleReader(shards, there), log), there, **place)
        assert assert_equal(ours, updates(SampleReader(shards, here), here, **place)) == 6 - start
        assert os.getpid() not in {pid for *_, pid in events(log)}, "nothing is degraded in the training process"


def test_a_killed_workers_task_runs_again_with_the_same_bytes(
    ray_session: None, shards: list[Manifest], tmp_path: Path
) -> None:
    here, there = (config(shards, ingest_cpus=cpus) for cpus in (0, 2))
    place = {"start": 0, "rank": 0, "world_size": 1}
    ours = updates(logged(SampleReader(shards, there), tmp_path / "log", killed_at=12), there, **place)
    assert assert_equal(ours, updates(SampleReader(shards, here), here, **place)) == 12
    killed = int((tmp_path / "log.killed").read_text())
    tries = [pid for event, position, pid in events(tmp_path / "log") if (event, position) == ("begin", 12)]
    assert tries[0] == killed
    assert len(tries) > 1
    assert killed not in tries[1:]


def test_a_slow_loop_stops_the_tasks_at_the_window_and_a_rank_keeps_to_its_cpus(
    ray_session: None, shards: list[Manifest], tmp_path: Path
) -> None:
    settings = config(shards, num_updates=50, ingest_cpus=1, prefetch_batches=3)
    assert window(settings, 1) == 6
    reader = logged(SampleReader(shards, settings), tmp_path / "log")
    stream = updates(reader, settings, start=0, rank=0, world_size=1)
    ahead = 12  # samples: six micro-batches of two
    for taken in (1, 2, 3):
        assert [batch.positions for batch in next(stream)] == [
            [4 * taken - 4, 4 * taken - 3],
            [4 * taken - 2, 4 * taken - 1],
        ]
        deadline = time.monotonic() + 60
        while len(events(tmp_path / "log")) < 2 * (4 * taken + ahead) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        done = [position for event, position, _ in events(tmp_path / "log") if event == "end"]
        assert done == list(range(4 * taken + ahead)), "the window is full, in order, and nothing is beyond it"
    running = np.cumsum([1 if event == "begin" else -1 for event, *_ in events(tmp_path / "log")])
    assert running.max() == 1, "one task at a time, although two CPUs are free"
    stream.close()


def test_errors_of_a_task_arrive_as_they_were(ray_session: None, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)] * 4)
    manifest = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    shard = tmp_path / "set" / "shards" / "000000.tar"
    whole = shard.read_bytes()
    settings = config([manifest], num_updates=40, ingest_cpus=1)
    damaged = bytearray(whole)
    damaged[SampleReader([manifest], settings).place(2).entry.offset_bytes + 1200] ^= 1
    shard.write_bytes(damaged)
    stream = updates(SampleReader([manifest], settings), settings, start=0, rank=0, world_size=1)
    with pytest.raises(UnusableImageError, match="damaged") as unusable:
        next(stream)
    assert unusable.value.reason == "truncated"
    shard.write_bytes(whole)
    stream = updates(SampleReader([manifest], settings), settings, start=0, rank=0, world_size=1)
    next(stream)
    shard.unlink()
    with pytest.raises(StorageError, match="no such file") as lost:
        for _ in stream:
            pass
    assert lost.value.where == str(shard)


@pytest.mark.slow
def test_a_training_run_with_ingest_elsewhere_ends_as_without(ray_session: None, tmp_path: Path) -> None:
    """A Ray Train worker's placement group has no room for the tasks: they must not wait to get into it."""
    ends = []
    for cpus in (0, 1):
        settings = train_config(
            noise_shards(tmp_path / "set"),
            tmp_path / f"out{cpus}",
            num_updates=3,
            degradation="ccsr",
            tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            runtime={"ingest_cpus": cpus, "checkpoint_every": 3},
        )
        run_train(settings)
        ends.append(load_checkpoint(complete_checkpoints(settings.output)[-1]).tensors["weights"])
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
