"""Peak memory of an evaluation's driver and actor for 1x, 2x and 4x as many images: it must not grow with them.

python benchmarks/evaluation_memory.py [--images 100] [--side 192]
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import psutil

from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from infra.config import parse_config
from infra.imaging.images import encode_png
from infra.process.ray_runtime import RayConfig, ray_cluster
from infra.seeding import rng_for


class PeakMemory:
    """While the block runs, the largest memory of this process and of each kind of its children's, in MiB.

    Memory of a process alone (USS): pages that it shares, the object store's among them, do not count.
    """

    def __init__(self) -> None:
        self.peak: dict[str, float] = defaultdict(float)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    title = " ".join(process.cmdline())
                    kind = "actor" if "MapWorker" in title or "Map(" in title else None
                    kind = "driver" if process.pid == psutil.Process().pid else kind
                    if kind:
                        self.peak[kind] = max(self.peak[kind], process.memory_full_info().uss / 2**20)
                except psutil.Error:
                    continue


def save_images(folder: Path, num_images: int, side: int) -> None:
    """Pairs of pictures, and two unlike outputs of each."""
    for number in range(num_images):
        rng = rng_for(0, "picture", number)
        hr = cv2.resize(rng.uniform(30, 220, (16, 16, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
        pictures = {"hr": hr, "lr": cv2.resize(hr, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)}
        pictures |= {f"outputs/runs/{run:02d}": hr + rng.normal(0, 9, hr.shape) for run in range(2)}
        for name, pixels in pictures.items():
            path = folder / name / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)))


def measure(num_images: int, side: int) -> None:
    """Evaluate once and print a line of the table."""
    with ray_cluster(RayConfig(num_cpus=2)), tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        save_images(place, num_images, side)
        values = {
            "job": "evaluate",
            "output": f"{place}/result",
            "data": [{"hr": f"{place}/hr", "lr": f"{place}/lr"}],
            "num_runs": 2,
            "methods": [{"kind": "bicubic"}, {"kind": "outputs", "name": "o", "outputs": f"{place}/outputs"}],
            "tracking": {"uri": f"sqlite:///{place}/mlflow.db"},
        }
        with PeakMemory() as memory:
            run_evaluate(parse_config(values, EvaluateConfig, where="benchmark"))
        print(f"{num_images:>8}{memory.peak['driver']:>14.0f}{memory.peak['actor']:>14.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--once", action="store_true", help="one line of the table")
    options = parser.parse_args()
    if options.once:
        measure(options.images, options.side)
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, ray {version('ray')}, {options.side} px")
    print(f"{'images':>8}{'driver, MiB':>14}{'actor, MiB':>14}", flush=True)
    for factor in (1, 2, 4):  # each in a new process
        command = [sys.executable, __file__, "--once", f"--images={factor * options.images}", f"--side={options.side}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
