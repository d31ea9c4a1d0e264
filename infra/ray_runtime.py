"""The Ray cluster that a job runs on: the one it is pointed at, or one in this process's machine."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from infra.config import Config
from infra.errors import CcsrError, ClusterError


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
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"Ray cannot be reached ({str(error).splitlines()[0][:200]})",
            where=address or "this machine",
            todo="check the address and that the cluster runs, or leave it empty for a local one",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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
