"""The Ray cluster that a job runs on: the one it is pointed at, or one in this process's machine."""

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from infra.config import Config
from infra.errors import CcsrError, ClusterError, ConfigError, line_of
from infra.process.numerics import NumericsConfig, set_numerics
from infra.process.ray_start import (
    ONE_MACHINE,
    local_token,
    not_started,
    only_on_loopback,
    use_token,
    without_log_level,
)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

KIND = "ccsr.io/kind"
GPU_KIND = "gpu"
MAX_GPUS = "ccsr.io/max-gpus"
MAX_CPUS = "ccsr.io/max-cpus"
ITEMS_AT_ONCE = 4096


class RayConfig(Config):
    """Without `address`: RAY_ADDRESS if set, else a cluster is started here and stopped at the end."""

    address: str | None = None
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of a cluster started here; default: all")
    object_store_bytes: int = Field(256 * 2**20, ge=80 * 2**20, description="of a cluster started here")
    task_memory_bytes: int = Field(
        0,
        ge=0,
        description="memory that a node must have free for each CPU task, actor or worker; 0: no memory is reserved",
    )

    def unused(self) -> dict[str, str]:
        return dict.fromkeys(("num_cpus", "object_store_bytes"), "beside address") if self.address else {}


def cpu_work(config: RayConfig) -> dict[str, Any]:
    """Options of a Ray task or actor that needs no GPU: not on a node labelled as GPU node, and the config's memory.

    Nodes without the label take everything, so on one machine this says nothing.
    """
    memory = {"memory": config.task_memory_bytes} if config.task_memory_bytes else {}
    return {"label_selector": {KIND: f"!{GPU_KIND}"}, **memory}


@dataclass(frozen=True)
class GpuCount:
    """GPUs of the nodes that are there, and how many there may be once the cluster has grown."""

    present: int
    most: int


def count_gpus(nodes: Iterable[tuple[Mapping[str, float], Mapping[str, str]]]) -> GpuCount:
    """From each node's resources and labels; a cluster that grows says how far by the label MAX_GPUS of a node."""
    present, most = 0, 0
    for resources, labels in nodes:
        present += int(resources.get("GPU", 0))
        most = max(most, int(labels.get(MAX_GPUS, 0)))
    return GpuCount(present, max(present, most))


def check_gpus(needed: int, gpus: GpuCount, where: str) -> None:
    """Fail fast on GPUs that the cluster will not have. Raises ClusterError."""
    if needed > gpus.most:
        grown = f", {gpus.most} once it has grown" if gpus.most > gpus.present else ""
        raise ClusterError(
            f"this job needs {needed} GPUs, the cluster has {gpus.present}{grown}",
            where=where,
            todo="lower runtime.num_workers or num_actors, or add GPU nodes; an autoscaling cluster says "
            f"up to how many GPUs by the head's label {MAX_GPUS}",
        )


def _check_gpus_there(needed: int) -> None:
    """`check_gpus` of the cluster that this process is connected to."""
    if needed:
        check_gpus(needed, count_gpus(nodes_here()), "the cluster")


def _check_gpus_of_machine(needed: int) -> None:
    """ClusterError where a cluster on this machine would have too few GPUs."""
    if needed:
        import torch

        if needed > (present := torch.cuda.device_count()):
            raise ClusterError(
                f"this job needs {needed} GPUs, this machine has {present}",
                where="this machine (neither runtime.ray.address nor RAY_ADDRESS names a cluster)",
                todo="set runtime.device: cpu, or "
                + (f"use {present} GPUs, or " if present else "")
                + "name a cluster with GPUs by runtime.ray.address",
            )


def cpus_here() -> float:
    """CPUs of the connected cluster that `cpu_work` may take, or will once it has grown (the label MAX_CPUS)."""
    nodes = list(nodes_here())
    present = sum(resources.get("CPU", 0.0) for resources, labels in nodes if labels.get(KIND) != GPU_KIND)
    return max([present, *(float(labels.get(MAX_CPUS, 0)) for _, labels in nodes)])


def nodes_here() -> list[tuple[Mapping[str, float], Mapping[str, str]]]:
    import ray

    return [(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


@contextmanager
def ray_cluster(config: RayConfig, *, num_gpus: int = 0) -> Iterator[None]:
    """Be connected to Ray inside the block. A cluster that was connected to before the block is used and kept.

    ClusterError where Ray cannot be reached or has fewer than `num_gpus` GPUs and will not have more; a cluster that
    this machine's GPUs do not suffice for is not started.
    """
    # Set before ray is imported: no usage report leaves the machine, and uv does not wrap the workers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
    # What the Train tab of a cluster's dashboard shows; a cluster that is started here has no dashboard.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1" if address else "0")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            "this is the address of a job server, which `ccsr submit` and `ccsr jobs` use; work here needs Ray's own",
            where=f"{'runtime.ray.address' if config.address else 'RAY_ADDRESS'}: {address}",
            todo="unset RAY_ADDRESS and name the job server in RAY_API_SERVER_ADDRESS, or submit this command",
        )
    if address:
        use_token()
    if not address or only_on_loopback(address):
        os.environ.setdefault(ONE_MACHINE, "0")
    import ray

    if ray.is_initialized():
        os.environ.pop(ONE_MACHINE, None)
        gc.collect()  # actors of a job that failed here hold their CPUs as long as cycles of Ray Data's name them
        _check_gpus_there(num_gpus)
        yield
        return
    if not address:
        _check_gpus_of_machine(num_gpus)
    handler = signal.getsignal(signal.SIGTERM)
    with ExitStack() as ends:
        try:
            if address:
                ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
            else:
                # Ray Data's own actors make Ray's core warn at every start; the workers' logs stay as they are.
                os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
                ends.enter_context(local_token())
                with without_log_level():
                    ray.init(
                        num_cpus=config.num_cpus,
                        object_store_memory=config.object_store_bytes,
                        include_dashboard=False,
                        log_to_driver=sys.flags.dev_mode,
                        logging_level=logging.ERROR,
                    )
        except Exception as error:  # a slow node's is the bare class; a bad address has its own class
            raise not_started(error, address) from error
        finally:
            os.environ.pop(ONE_MACHINE, None)  # a `ray start` below this process is not meant
            if callable(handler) and threading.current_thread() is threading.main_thread():  # Ray's own aborts
                signal.signal(signal.SIGTERM, handler)
        ends.callback(ray.shutdown)
        _check_gpus_there(num_gpus)
        yield


@dataclass(frozen=True, slots=True)
class _Sealed:
    """Keeps Arrow from turning an item into columns, which could not tell an absent value from one of another type."""

    value: Any


def on_ray(
    make: Callable[[], Callable[[ItemT], ResultT]],
    items: Sequence[ItemT],
    *,
    config: RayConfig,
    num_actors: int | None,
    num_tasks: int | None = None,
    device: str,
    numerics: NumericsConfig | None,
    output: str,
) -> Iterator[ResultT]:
    """Yield `make()(item)` for each of `items` as results come, computed by Ray Data.

    Each of `num_actors` actors calls `make` once, on a GPU (`device`: cuda) or one CPU. None: a task per item, at most
    `num_tasks` at a time (None: as many as there are CPUs); tasks take CPUs as they come free. A CcsrError in a worker
    is raised here as itself; ClusterError where a worker is lost. Items and results travel pickled; tasks are made
    ITEMS_AT_ONCE at a time, which bounds memory. `numerics`: None for work without torch, which then is not imported.
    """
    if not items:
        return
    with ray_cluster(config, num_gpus=min(num_actors or 1, len(items)) if device == "cuda" else 0):
        import ray
        from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # failures are raised below
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True

        class Worker:
            # Ray warns of constructor arguments, because they would be lost with the object store's node.
            work: Callable[[ItemT], ResultT] | None = None

            def __call__(self, row: dict[str, _Sealed]) -> dict[str, _Sealed]:
                if self.work is None:
                    if numerics is not None:
                        set_numerics(numerics)
                    self.work = make()
                return {"item": _Sealed(self.work(row["item"].value))}

        def work(row: dict[str, _Sealed]) -> dict[str, _Sealed]:
            return Worker()(row)

        together = len(items) if num_actors else ITEMS_AT_ONCE  # actors would load their models again
        for start in range(0, len(items), together):
            rows = [{"item": _Sealed(item)} for item in items[start : start + together]]
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                Worker if num_actors else work,
                compute=ActorPoolStrategy(size=min(num_actors, len(rows)))
                if num_actors
                else TaskPoolStrategy(num_tasks),
                **({"num_cpus": 0, "num_gpus": 1} if device == "cuda" else {"num_cpus": 1, **cpu_work(config)}),
            )
            try:
                for row in results.iter_rows():
                    yield row["item"].value
            except ray.exceptions.RayError as error:
                raise user_error(error) or lost_worker(error, output) from error


def lost_worker(error: BaseException, output: str) -> ClusterError:
    """The error of a worker that failed without a CcsrError."""
    return ClusterError(
        f"a worker failed ({type(error).__name__}: {line_of(error, -1)})",
        where=output,
        todo="run the same command again to resume; --debug shows the traceback",
    )


def user_error(error: BaseException) -> CcsrError | None:
    """The CcsrError inside whatever Ray wrapped around it on the way from a worker."""
    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        current = pending.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        cause = getattr(current, "cause", None)
        if isinstance(current, CcsrError) and not isinstance(cause, CcsrError):
            return current
        failures = getattr(current, "worker_failures", None) or {}
        pending += [cause, current.__cause__, current.__context__, *failures.values()]
    return None
