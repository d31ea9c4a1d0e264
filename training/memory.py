"""Whether weights, gradients and optimiser state of a run fit the memory that is free, before they are made."""

import os

from torch import nn

from infra.errors import ConfigError
from infra.memory import free_memory
from training.config import TrainConfig
from training.models import CcsrModel
from training.ranks import WorkerContext

GIB = 2**30


def memory_needed(num_trained: int, num_frozen: int, config: TrainConfig, world_size: int) -> dict[str, int]:
    """Bytes per worker by kind. Without activations and discriminator, hence less than a run really takes.

    fp32 masters and two moments per trained parameter are shared out from ZeRO 1 on, fp32 gradients from ZeRO 2 on;
    bf16 gradients, which are added to those after each micro-batch, come on top.
    """
    size = 2 if config.precision == "bf16" else 4
    zero = config.runtime.zero_stage
    share = world_size if zero else 1
    masters = 4 * num_trained // share if zero else 0
    rounded = 2 * num_trained if size == 2 else 0
    return {
        "weights": size * (num_trained + num_frozen),
        "gradients": 4 * num_trained // (world_size if zero == 2 else 1) + rounded,
        "optimiser": masters + 8 * num_trained // share,
    }


def check_memory(model: CcsrModel, config: TrainConfig, context: WorkerContext) -> None:
    """ConfigError with the numbers where this worker's share of the free memory cannot hold the run.

    `model` is still in fp32 in the host's memory. Memory limits of a container are not seen.
    """
    device, world_size = context.device, context.world_size
    num_trained = _count(model.trained_part(config.stage))
    num_frozen = sum(map(_count, model.networks.values())) - num_trained
    needed = memory_needed(num_trained, num_frozen, config, world_size)
    total = sum(needed.values())
    free = free_memory(device)
    if not device.startswith("cuda"):
        if config.precision == "fp32":
            total -= needed["weights"]  # they are there already
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if total > free:
        parts = ", ".join(f"{name} {number / GIB:.2f}" for name, number in needed.items())
        raise ConfigError(
            f"this run needs {total / GIB:.2f} GiB more on each worker ({parts}), {free / GIB:.2f} are free",
            where=f"runtime: {world_size} workers, zero_stage {config.runtime.zero_stage}, {config.precision}",
            todo="more workers with zero_stage 1 or 2, precision bf16, or a larger machine",
        )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
