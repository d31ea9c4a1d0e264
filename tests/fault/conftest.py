"""Fixtures of the fault tests: photographs, a Ray for the jobs, and the shard set that an undisturbed run makes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from shard_jobs import ShardJob, save_photos

from infra.errors import ClusterError
from infra.process.ray_runtime import RayConfig, ray_cluster


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fault") / "photos"
    save_photos(folder)
    return folder


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """A Ray cluster that the jobs' drivers connect to: each starting its own would take most of the time."""
    with ExitStack() as stack:
        for attempt in range(4):  # Ray gives its node 30 seconds to start, which is short on a busy machine
            try:
                stack.enter_context(ray_cluster(RayConfig(num_cpus=2)))
                break
            except ClusterError:
                if attempt == 3:
                    raise
        import ray

        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def whole(photos: Path, address: str) -> str:
    """An undisturbed run's output."""
    output = str(photos.parent / "whole")
    code, printed = ShardJob(photos, output, address).run()
    assert code == 0, printed
    return output
