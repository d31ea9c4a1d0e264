"""The Ray cluster that a job runs on: the one it is pointed at, or one in this process's machine."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from infra.config import Config
from infra.errors import CcsrError, ClusterError, error_from_json, error_to_json


class RayConfig(Config):
    """Without `address`: RAY_ADDRESS if set, else a cluster is started here and stopped at the end."""

    address: str | None = None
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of a cluster started here; default: all")
    object_store_bytes: int = Field(256 * 2**20, ge=80 * 2**20)


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[None]:
    """Be connected to Ray inside the block. A cluster that was connected to before the block is used and kept."""
    # Set before ray is imported: no usage report leaves the machine, and uv does not wrap the workers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        else:
            # Ray Data's own actors make Ray's core warn at every start; the workers' logs stay as they are.
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            ray.init(
                num_cpus=config.num_cpus,
                object_store_memory=config.object_store_bytes,
                include_dashboard=False,
                log_to_driver=sys.flags.dev_mode,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # a node that starts too slowly is the bare class; a bad address has one of its own
        raise ClusterError(
            f"Ray cannot be reached ({str(error).splitlines()[0][:200]})",
            where=address or "this machine",
            todo="check the address and that the cluster runs, or leave it empty for a local one",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def on_actors(
    make: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]],
    tasks: Sequence[dict[str, Any]],
    *,
    ray_config: RayConfig,
    num_actors: int,
    use_gpu: bool,
    output: str,
) -> Iterator[dict[str, Any]]:
    """Yield what actors return for `tasks`, as it comes; each of `num_actors` calls `make` once, on a GPU or one CPU.

    A task is a dict of plain values of the same kinds in each. A CcsrError in an actor is raised here; ClusterError
    where a worker is lost.
    """
    if not tasks:
        return
    with ray_cluster(ray_config):
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        DataContext.get_current().enable_progress_bars = False

        class Actor:
            # Ray warns of constructor arguments, because they would be lost with the object store's node.
            work: Callable[[dict[str, Any]], dict[str, Any]] | None = None

            def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
                try:
                    self.work = self.work or make()
                    return {"result": json.dumps(self.work(task)), "error": ""}
                except CcsrError as error:  # Ray Data does not carry it to the driver
                    return {"result": "", "error": error_to_json(error)}

        done = ray.data.from_items(list(tasks), override_num_blocks=len(tasks)).map(
            Actor,
            compute=ActorPoolStrategy(size=min(num_actors, len(tasks))),
            num_cpus=0 if use_gpu else 1,
            num_gpus=1 if use_gpu else 0,
        )
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise error_from_json(row["error"])
                yield json.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise lost_worker(error, output) from error


def lost_worker(error: BaseException, output: str) -> ClusterError:
    """What to tell where `user_error` finds nothing that the user did."""
    return ClusterError(
        f"a worker failed ({type(error).__name__}: {str(error).strip().splitlines()[-1][:300]})",
        where=output,
        todo="run the same command again to go on from what is complete; --debug shows the traceback",
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
