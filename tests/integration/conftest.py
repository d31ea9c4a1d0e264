"""Fixtures of the integration tests: one demo run as a user would start it, and one Ray for everything else."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.process.ray_runtime import RayConfig, ray_cluster

REPOSITORY = Path(__file__).parents[2]
CCSR = str(Path(sys.executable).with_name("ccsr"))


def run_ccsr(
    *arguments: str, cwd: Path = REPOSITORY, program: Sequence[str] = (CCSR,), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command that a user runs, without a compiler within reach."""
    return subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false", "COLUMNS": "200", **environment},
        check=False,
    )


NUM_RUNS, NUM_STEPS, NUM_UPDATES = 3, 6, 6
FEWER = {
    "evaluate.yaml": {"num_runs": (10, NUM_RUNS), "num_steps": (45, NUM_STEPS)},
    "train_*.yaml": {"num_updates": (24, NUM_UPDATES), "checkpoint_every": (12, NUM_UPDATES // 2)},
}
ON_CONFIGS = """
import sys
from pathlib import Path
from pipelines import demo
from pipelines.cli.main import main
demo.CONFIGS = Path(sys.argv.pop(1))
main()
"""


@dataclass
class DemoRun:
    out: Path
    stdout: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """`ccsr demo`, once per test run, but with fewer restorations of each photograph, steps of them and updates."""
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "out"
    shutil.copytree(REPOSITORY / "configs" / "demo", folder / "configs")
    for pattern, values in FEWER.items():
        for path in (folder / "configs").glob(pattern):
            text = path.read_text()
            for name, (shipped, number) in values.items():
                text, found = re.subn(rf"\b{name}: {shipped}\b", f"{name}: {number}", text)
                assert found, f"{path.name} has no {name}: {shipped}"
            path.write_text(text)
    return run_demo(out, [sys.executable, "-c", ON_CONFIGS, str(folder / "configs")])


@pytest.fixture(scope="session")
def shipped_demo(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """`ccsr demo` as a user has it, which takes minutes."""
    return run_demo(tmp_path_factory.mktemp("shipped") / "out", [CCSR])


def run_demo(out: Path, program: Sequence[str]) -> DemoRun:
    done = run_ccsr("demo", "--out", str(out), program=program)
    assert done.returncode == 0, done.stdout + done.stderr
    return DemoRun(out, done.stdout)


@pytest.fixture(scope="session")
def ray_session() -> None:
    """One Ray cluster for all tests that start jobs in this process."""
    with ray_cluster(RayConfig(num_cpus=2)):
        yield


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs do their work in this process: each actor would import the networks anew. For tests of what happens before
    and after the work."""

    def here(make: Callable[[], Callable[[Any], Any]], items: Sequence[Any], **_: Any) -> Iterator[Any]:
        return map(make(), items) if items else iter(())

    for job in ("evaluation.job", "pipelines.sharding.job"):
        monkeypatch.setattr(f"{job}.on_ray", here)
