"""Signs of trouble in a running job: ranks that are slow, numbers that jump, replicas that differ."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from infra.errors import ModelError
from training.run.agreement import WorkerContext, agree, all_objects

WATCHED = ("loss", "gradient_norm")
WINDOW, FEWEST, SPIKE = 100, 20, 10.0


class Stopwatch:
    """Seconds of the blocks that it runs in; on a GPU those of its stream, read once the work is under way."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._spans: list[tuple[Any, Any]] = []
        self.last = 0.0
        """What `seconds` returned last."""

    @contextmanager
    def running(self) -> Iterator[None]:
        began = self._mark()
        yield
        self._spans.append((began, self._mark()))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Of all blocks since the last call."""
        spans, self._spans = self._spans, []
        if self._on_gpu:
            spans[-1][1].synchronize()
            self.last = sum(began.elapsed_time(ended) for began, ended in spans) / 1000
        else:
            self.last = sum(ended - began for began, ended in spans)
        return self.last


class Spikes:
    """Loss and gradient norm far above what this process has seen lately."""

    def __init__(self) -> None:
        self._before = {name: deque[float](maxlen=WINDOW) for name in WATCHED}

    def __call__(self, values: Mapping[str, float]) -> dict[str, float]:
        """{"NAME_spike": how far an update's value is above the median of the WINDOW before, in median absolute
        deviations}, where that is more than SPIKE; nothing before FEWEST updates."""
        found = {}
        for name, before in self._before.items():
            if name not in values:
                continue
            if len(before) >= FEWEST:
                middle = median(before)
                spread = max(median(abs(value - middle) for value in before), 1e-3 * abs(middle), 1e-12)
                above = (values[name] - middle) / spread
                if above > SPIKE:
                    found[f"{name}_spike"] = above
            before.append(values[name])
        return found


def by_rank(context: WorkerContext, rates: Mapping[str, float]) -> dict[str, float]:
    """Collective. The share of their time in which ranks waited for their own data: the mean, the largest and whose
    that is; and what their machines read."""
    ranks = all_objects(context, (rates["data_wait_share"], context.node()))
    shares = [share for share, _ in ranks]
    found = {"data_wait_share": sum(shares) / len(shares), "data_wait_share_max": max(shares)}
    found["most_waiting_rank"] = float(shares.index(max(shares)))
    numbers = {f"speed/{name}": value for name, value in found.items()}
    return numbers | {name: value for _, node in ranks for name, value in node.items()}


def check_replicas(context: WorkerContext, tensors: Mapping[str, Tensor], num_updates: int, output: str) -> None:
    """Collective. ModelError on a rank whose copy of one of `tensors`, which all ranks hold, is not rank 0's.

    Compares one sum a tensor, of its bits as integers, made on the tensor's device.
    """
    sums = torch.stack([_sum_of_bits(tensor).to(context.device) for tensor in tensors.values()])
    expected = sums.clone()
    if context.world_size > 1:
        torch.distributed.broadcast(expected, 0)
    equal = (sums == expected).tolist()
    error = None
    if not all(equal):
        error = ModelError(
            f"{list(tensors)[equal.index(False)]} on rank {context.rank} differs from rank 0's after update "
            f"{num_updates}; nothing was saved",
            where=output,
            todo="run the same command again: it resumes from the checkpoint before; if this comes back, let all "
            "workers have the same kind of GPU",
        )
    agree(context, error)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(integers).sum(dtype=torch.int64)
