"""Shard, train and evaluate for an hour while workers, nodes, network, disks, MLflow and S3 fail in a seeded order.

    python benchmarks/soak.py [--minutes 60]

Runs `tests/fault/test_soak.py`, which compares every result with an undisturbed run's and prints what it survived.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    command = [sys.executable, "-m", "pytest", "-s", "tests/fault/test_soak.py"]
    environment = {**os.environ, "CCSR_SOAK_MINUTES": str(minutes)}
    sys.exit(subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
