"""Checkpoints of a running engine: written in the background, one at a time; a failed write is reported."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import training.run.checkpoint
import training.run.checkpointer
from infra import DataError, StorageError
from infra.files import storage
from training.config import TrainConfig
from training.run.agreement import WorkerContext
from training.run.checkpoint import TrainingState, complete_checkpoints, load_checkpoint, save_checkpoint
from training.run.checkpointer import Checkpoints


class Run:
    """A module under plain AdamW, as ZeRO 0 has it, that learns to be zero."""

    def __init__(self, output: str, facts: dict[str, object] | None = None, **runtime: int) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        values = {
            "job": "train",
            "init_from": "random",
            "output": output,
            "stage": 1,
            "data": ["d"],
            "num_updates": 9,
            "global_batch_size": 4,
        }
        config = TrainConfig.model_validate({**values, "runtime": runtime})
        stage = SimpleNamespace(trained=self.module, model=SimpleNamespace(networks={"vae": self.module}))
        engine = SimpleNamespace(module=stage, zero_optimization_stage=lambda: 0)
        self.exported: list[str] = []
        export = lambda weights, uri: self.exported.append(uri)  # noqa: E731
        self.warnings: list[str] = []
        context = WorkerContext(0, 1, "cpu", facts or {}, export=export, warn=self.warnings.append)
        self.checkpoints = Checkpoints(config, engine, self.optimizer, None, context)

    def update(self) -> None:
        self.module(torch.ones(1, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Semaphore(0), threading.Semaphore(0)
    running: list[int] = []

    def slow(output: str, state: TrainingState, **options: Any) -> str:
        running.append(state.facts["num_updates"])
        entered.release()
        assert go_on.acquire(timeout=60)
        return save_checkpoint(output, state, **options)

    monkeypatch.setattr(training.run.checkpointer, "save_checkpoint", slow)
    run = Run(str(tmp_path))
    run.update()
    as_saved = run.module.weight.detach().clone()
    with run.checkpoints as checkpoints:
        checkpoints.save(1, {"psnr_y": 20.0, "l_std": 0.1})
        assert entered.acquire(timeout=60)
        run.update()  # changes the weights in place while the write is blocked
        assert not torch.equal(run.module.weight, as_saved)
        assert complete_checkpoints(str(tmp_path)) == []
        second = threading.Thread(target=checkpoints.save, args=(2,))
        second.start()
        second.join(0.5)
        assert second.is_alive()
        assert running == [1], "the second one waits for the first"
        go_on.release()
        second.join(60)
        go_on.release()
    first, last = (load_checkpoint(place) for place in complete_checkpoints(str(tmp_path)))
    assert torch.equal(first.tensors["weights"]["weight"], as_saved)
    assert torch.equal(last.tensors["weights"]["weight"], run.module.weight)
    assert first.facts["validation"] == {"psnr_y": 20.0, "l_std": 0.1}
    assert "validation" not in last.facts
    assert [state.facts["position"] for state in (first, last)] == [4, 8]


def test_a_run_goes_on_from_what_was_saved_as_if_never_stopped(tmp_path: Path) -> None:
    whole = Run(str(tmp_path / "whole"))
    for _ in range(4):
        whole.update()
    stopped = Run(str(tmp_path / "parts"))
    with stopped.checkpoints as checkpoints:
        assert checkpoints.resume() == 0
        for _ in range(2):
            stopped.update()
        checkpoints.save(2)
        checkpoints.save(2)  # nothing new: not written again
    resumed = Run(str(tmp_path / "parts"))
    with resumed.checkpoints as checkpoints:
        assert checkpoints.resume() == 2
        for _ in range(2):
            resumed.update()
    assert torch.equal(resumed.module.weight, whole.module.weight)
    assert not torch.equal(stopped.module.weight, whole.module.weight)


def test_a_lost_bucket_is_told_at_the_next_update_and_at_the_end(bucket: str) -> None:
    storage.s3_filesystem().mkdir("short-lived")
    run = Run("s3://short-lived/run")
    checkpoints = run.checkpoints
    run.update()
    checkpoints.save(1)
    written(checkpoints)
    assert len(complete_checkpoints("s3://short-lived/run")) == 1
    storage.s3_filesystem().rm("short-lived", recursive=True)
    run.update()
    checkpoints.save(2)
    with pytest.raises(StorageError, match="no such bucket"):
        written(checkpoints)
    assert isinstance(checkpoints.failure(), StorageError)
    run.update()
    checkpoints.save(3)  # not begun: the failure of the one before is not to be lost
    with pytest.raises(StorageError, match="no such bucket"):
        checkpoints.wait()
    with pytest.raises(StorageError, match="no such bucket"):
        checkpoints.__exit__(None, None, None)


def test_a_write_that_fails_while_another_error_ends_the_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise StorageError("the disk is full", where="there", todo="make room")

    monkeypatch.setattr(training.run.checkpointer, "save_checkpoint", full)
    run = Run(str(tmp_path))
    run.update()
    run.checkpoints.save(1)
    run.checkpoints.__exit__(DataError, DataError("not finite", where="here", todo="look"), None)
    assert run.warnings == ["the last checkpoint was not written either: the disk is full"]


def test_a_damaged_checkpoint_goes_once_a_later_one_stands(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    with run.checkpoints as checkpoints:
        for update in (1, 2):
            run.update()
            checkpoints.save(update)
    damaged = complete_checkpoints(str(tmp_path))[-1]
    Path(damaged, "weights.safetensors").write_bytes(b"damaged")
    resumed = Run(str(tmp_path))
    with resumed.checkpoints as checkpoints:
        assert checkpoints.resume() == 1
        assert damaged in complete_checkpoints(str(tmp_path))
        resumed.update()
        checkpoints.save(3)
    assert [int(place[-2:]) for place in complete_checkpoints(str(tmp_path))] == [4, 12]


def written(checkpoints: Checkpoints) -> None:
    checkpoints.wait()


def test_a_write_that_fails_half_way_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.run.checkpoint.upload

    def full(local: Path, uri: str) -> None:
        if local.name == "weights.safetensors":
            raise StorageError("the disk is full", where=uri, todo="make room")
        real(local, uri)

    run = Run(str(tmp_path))
    run.update()
    run.checkpoints.save(1)
    written(run.checkpoints)
    monkeypatch.setattr("training.run.checkpoint.upload", full)
    run.checkpoints.save(2)
    with pytest.raises(StorageError, match="full"):
        written(run.checkpoints)
    (kept,) = complete_checkpoints(str(tmp_path))
    assert load_checkpoint(kept).facts["num_updates"] == 1


def test_every_kth_checkpoint_is_exported_too(tmp_path: Path) -> None:
    run = Run(str(tmp_path), checkpoint_every=2, export_every=2)
    with run.checkpoints as checkpoints:
        for update in range(1, 9):
            run.update()
            if update % 2 == 0:
                checkpoints.save(update)
    assert run.exported == [f"{tmp_path}/exports/{position:012d}" for position in (16, 32)]


def test_a_checkpoint_of_other_datasets_is_refused(tmp_path: Path) -> None:
    run = Run(str(tmp_path), {"dataset_ids": ["aaaa"]})
    run.update()
    with run.checkpoints as checkpoints:
        checkpoints.save(1)
    other = Run(str(tmp_path), {"dataset_ids": ["bbbb"]})
    with pytest.raises(DataError, match="trained on the datasets aaaa, the config names bbbb"):
        other.checkpoints.resume()
