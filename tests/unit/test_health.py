"""Signs of trouble: spikes among noise, a replica that differs by one bit, and where to read what ranks waited for."""

import json
import multiprocessing
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infra import ModelError
from infra.seeding import rng_for
from tests.training_runs import free_port, noise_shards, run_workers, train_config
from training.run.agreement import OtherRankError, WorkerContext
from training.run.launch import FLIGHT_RECORDER, environment, lost_error
from training.run.monitoring.health import Spikes, Stopwatch, by_rank, check_replicas


def test_a_spike_is_marked_and_noise_is_not() -> None:
    spikes, rng = Spikes(), rng_for(0, "loss")
    values = [{"loss": float(loss), "gradient_norm": 2.0} for loss in rng.normal(-1, 0.2, 300)]
    assert not any(spikes(one) for one in values)
    assert spikes({"loss": 4.0, "gradient_norm": 2.0}) == {"loss_spike": pytest.approx(5 / 0.13, rel=0.3)}
    assert spikes({"loss": -6.0, "gradient_norm": 2.5}).keys() == {"gradient_norm_spike"}, "down is no spike"
    assert not Spikes()({"loss": 1e9}), "nothing to compare with yet"


def test_the_stopwatch_adds_up_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((1.0, 1.5, 10.0, 12.0))
    monkeypatch.setattr("training.run.monitoring.health.time", SimpleNamespace(perf_counter=lambda: next(times)))
    stopwatch = Stopwatch("cpu")
    for _ in range(2):
        with stopwatch.running():
            pass
    assert stopwatch.seconds() == 2.5
    assert stopwatch.seconds() == 0


def compare(rank: int, port: int, answers: "multiprocessing.Queue[tuple[int, str]]") -> None:
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=60))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    context = WorkerContext(rank, 2, "cpu", {})
    tensors = {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(7)}
    check_replicas(context, tensors, 1, "out")
    if rank == 1:
        tensors["b"].view(torch.int16)[1, 1] ^= 1
    try:
        check_replicas(context, tensors, 2, "out")
    except (ModelError, OtherRankError) as error:
        answers.put((rank, str(error)))


@pytest.mark.slow
def test_one_bit_of_one_replica_is_found_and_named() -> None:
    spawn = multiprocessing.get_context("spawn")
    answers, port = spawn.Queue(), free_port()
    ranks = [spawn.Process(target=compare, args=(rank, port, answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = dict(answers.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert found[0] == ""
    assert "b on rank 1 differs from rank 0's after update 2; nothing was saved" in found[1]


@pytest.mark.slow
def test_a_rank_whose_data_is_late_is_named_and_the_others_wait_is_not_theirs(tmp_path: Path) -> None:
    config = train_config(noise_shards(tmp_path / "set", 8), tmp_path / "run", num_updates=4)
    losses = tmp_path / "losses"
    run_workers(tmp_path, [{"config": config.model_dump(mode="json"), "losses": str(losses), "late": 1, "small": True}])
    last = json.loads(Path(f"{losses}.last").read_text())
    assert last["most_waiting_rank"] == 1
    assert last["data_wait_share_max"] > 0.1
    assert last["data_wait_share"] < 0.75 * last["data_wait_share_max"]


def test_all_ranks_nodes_are_logged_by_one() -> None:
    context = WorkerContext(0, 1, "cpu", {}, node=lambda: {"system/host/cpu_utilization_percentage": 50.0})
    assert by_rank(context, {"data_wait_share": 0.25}) == {
        "speed/data_wait_share": 0.25,
        "speed/data_wait_share_max": 0.25,
        "speed/most_waiting_rank": 0.0,
        "system/host/cpu_utilization_percentage": 50.0,
    }


def test_the_record_of_collectives_is_on_and_named_with_the_lost_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = train_config("d", "o", num_updates=1, runtime={"device": "cuda"})
    assert FLIGHT_RECORDER.items() <= environment(on_gpu.runtime).items()
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/scratch/rank_")
    assert environment(on_gpu.runtime)["TORCH_FR_DUMP_TEMP_FILE"] == "/scratch/rank_"
    assert "in /scratch/rank_RANK" in lost_error(RuntimeError("died"), on_gpu, []).todo
    on_cpu = train_config("d", "o", num_updates=1)
    assert not FLIGHT_RECORDER.keys() & environment(on_cpu.runtime).keys()
    assert "RANK" not in lost_error(RuntimeError("died"), on_cpu, []).todo
