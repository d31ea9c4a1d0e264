"""The GPU benchmark in its small form on a CPU, so that it works the first time a GPU is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_runs_in_small_without_ray_or_deepspeed(tmp_path):
    """They are replaced by two modules that fail to import."""
    for name in ("ray", "deepspeed"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')")
    small = ["--preset", "tiny", "--crop-px", "64", "--micro-batches", "2", "--accumulation", "2"]
    switches = ["ours", "ours, encode_ahead", "ours, adamw8bit"]
    few = ["--warm-up", "1", "--updates", "1", "--blocks", "2", "--out", str(tmp_path / "result.json")]
    done = subprocess.run(
        [sys.executable, "-P", "benchmarks/gpu_step.py", *small, *few, "--variants", *switches],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [(result["variant"], result["micro_batch"]) for result in results] == [
        one for name in switches for one in (("published", 4), (name, 2))
    ]
    assert all(len(result["seconds"]) == 2 and result["samples_per_second"] > 0 for result in results)
    assert results[0]["tflops_per_second"] > 0
    assert all(result["mfu"] is None for result in results)


def test_the_table_of_switches_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "benchmarks" / "gpu_step.md").read_text()))
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert len(named) > 8
    assert not [name for name in named if f"def {name}(" not in tests]
