"""Agreement between ranks, so that all of them continue, stop or fail together."""

import faulthandler
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch

from infra.errors import CcsrError

T = TypeVar("T")


class Log(Protocol):
    """Where rank 0 puts numbers and pictures; it must not make the loop wait."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def file(self, place: str, content: bytes) -> None: ...
    def image(self, key: str, png: bytes, step: int) -> None: ...


@dataclass
class WorkerContext:
    """What differs between workers, and whom they report to. `facts` goes into every checkpoint.

    `stop_asked(update)` is called at the start of each update and returns whether to stop the run.
    `export(weights, uri)` writes a model directory with these trained weights.
    """

    rank: int
    world_size: int
    device: str
    facts: Mapping[str, Any]
    tracker: Log | None = None
    on_update: Callable[[int, str], None] | None = None
    stop_asked: Callable[[int], bool] = lambda update: False
    warn: Callable[[str], None] = print
    export: Callable[[dict[str, torch.Tensor], str], None] | None = None
    measured: Callable[[dict[str, float]], None] = lambda values: None
    node: Callable[[], dict[str, float]] = dict  # this rank's machine since the last call, where no other rank reads it
    agreed: bool = False  # all ranks know that the run ends here


class OtherRankError(Exception):
    """Another rank has raised the user's error; this rank exits silently."""


def agree(context: WorkerContext, error: CcsrError | None = None, *, stop: bool = False) -> bool:
    """Collective. Raises `error`, or OtherRankError where only other ranks have one; else whether any says `stop`.

    Without this a rank that fails leaves the others waiting in their next collective.
    """
    flags = torch.tensor([error is not None, stop], dtype=torch.int32, device=context.device)
    if context.world_size > 1:
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    failed, stopped = flags.tolist()
    context.agreed |= bool(failed or stopped)  # for good: what is saved after a stop may agree again
    if error is not None:
        raise error
    if failed:
        raise OtherRankError
    return bool(stopped)


def attempt(call: Callable[[], Any]) -> tuple[Any, CcsrError | None]:
    """What `call` returns, or the user's error that it raises, for `agree`."""
    try:
        return call(), None
    except CcsrError as error:
        return None, error


def from_rank_0(context: WorkerContext, number: int) -> int:
    """Collective. Rank 0's `number`."""
    told = torch.tensor([number], dtype=torch.int64, device=context.device)
    if context.world_size > 1:
        torch.distributed.broadcast(told, 0)
    return int(told)


def gathered(context: WorkerContext, row: torch.Tensor) -> torch.Tensor:
    """Collective. Every rank's `row` (N,), as (world_size, N)."""
    rows = row.new_zeros(context.world_size, len(row))
    rows[context.rank] = row
    if context.world_size > 1:
        torch.distributed.all_reduce(rows)
    return rows


def all_objects(context: WorkerContext, own: T) -> list[T]:
    """Collective. Every rank's object, in the ranks' order."""
    objects: list[Any] = [own]
    if context.world_size > 1:
        objects = [None] * context.world_size
        torch.distributed.all_gather_object(objects, own)
    return objects


def limit_collectives(seconds: float) -> None:
    """Let every collective of every process group fail after `seconds`; DeepSpeed makes groups with torch's default."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside the block SIGTERM does not end this process; the function says whether it came.

    Through faulthandler, because Ray runs the training loop outside the main thread, where Python sets no handlers.
    """
    with tempfile.TemporaryFile() as note:
        faulthandler.register(signal.SIGTERM, file=note, all_threads=False)
        try:
            yield lambda: os.fstat(note.fileno()).st_size > 0
        finally:
            faulthandler.unregister(signal.SIGTERM)
