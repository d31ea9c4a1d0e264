"""Where Ray Train's workers run, in which environment, what they show, and the error of those that were lost."""

import os
from typing import Any

from infra.errors import ClusterError
from infra.process.gauges import show
from infra.process.ray_runtime import cpu_work, lost_worker
from training.config import TrainConfig
from training.runtime import TrainRuntime

# torch's record of the last NCCL collectives, which each rank writes where one times out: who was in which.
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": "/tmp/ccsr_collectives_rank_",
}


def environment(runtime: TrainRuntime) -> dict[str, str]:
    """The workers' variables; the driver's own settings of the flight recorder count."""
    found = {"OMP_NUM_THREADS": str(runtime.threads)}
    found |= {name: os.environ[name] for name in ("CCSR_WEIGHTS",) if name in os.environ}
    if runtime.device != "cuda":
        return found | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return found | {name: os.environ.get(name, value) for name, value in FLIGHT_RECORDER.items()}


def placement(runtime: TrainRuntime) -> Any:
    """Where Ray Train puts the workers, and what it reserves for each: its GPU alone, or one CPU."""
    from ray.train import ScalingConfig

    workers = runtime.workers
    number: Any = (workers.min, workers.max) if workers.min < workers.max else workers.max
    if runtime.device == "cuda":
        return ScalingConfig(num_workers=number, use_gpu=True)
    place = cpu_work(runtime.ray)
    return ScalingConfig(
        num_workers=number,
        label_selector=place.pop("label_selector"),
        resources_per_worker={"CPU": 1, **place},
    )


def show_rates(config: TrainConfig, rank: int, values: dict[str, float]) -> None:
    """A rank's numbers for Prometheus; what is the same on all comes from rank 0."""
    show({f"ccsr_{name}": values[name] for name in ("data_wait_share", "forward_seconds")}, rank=str(rank))
    if rank == 0:
        rate = values["samples_per_second"]
        show({"ccsr_samples_per_second": rate, "ccsr_update_seconds": config.global_batch_size / rate})


def lost_error(error: BaseException, config: TrainConfig, ranks: list[str]) -> ClusterError:
    """The last failure, with what the ranks could still tell about it."""
    lost = lost_worker(error, config.output)
    told = "".join(f"; {line}" for line in ranks[:4])
    limit = f"; runtime.max_restarts is {config.runtime.max_restarts}"
    todo = lost.todo
    prefix = environment(config.runtime).get("TORCH_FR_DUMP_TEMP_FILE")
    if prefix:
        todo += f"; after a collective's timeout each rank's node has its last collectives in {prefix}RANK"
    return ClusterError(lost.what + told + limit, where=lost.where, todo=todo)
