"""Fixtures of the integration tests: one demo run as a user would start it, and one Ray for everything else."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.ray_runtime import RayConfig, ray_cluster

REPOSITORY = Path(__file__).parents[2]
CCSR = str(Path(sys.executable).with_name("ccsr"))


def run_ccsr(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command that a user runs, without a compiler within reach."""
    return subprocess.run(
        [CCSR, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false", "COLUMNS": "200", **environment},
        check=False,
    )


@dataclass
class DemoRun:
    out: Path
    stdout: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """`ccsr demo`, once per test run."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = run_ccsr("demo", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return DemoRun(out, done.stdout)


@pytest.fixture(scope="session")
def ray_session() -> None:
    """One Ray cluster for all tests that start jobs in this process."""
    with ray_cluster(RayConfig(num_cpus=2)):
        yield
