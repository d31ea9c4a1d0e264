"""Times every degradation preset on one thread, in milliseconds and in multiples of a yardstick, as a Markdown table.

The yardstick (decode a quality-95 JPEG of the 512 x 512 HR patch, area-downscale it by 4) is timed between the draws,
so that a busy machine slows both. Process CPU time; with --pair also the throughput of two processes at once.
"""

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# tests/ is not installed; its photographs serve here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from degradation import PRESETS, degrade, load_preset
from infra import rng_for
from tests.golden.wheel_photos import PHOTOS, patch

REQUIRED = {"realesrgan": 34.0, "stablesr": 30.0, "ccsr": 21.0, "bsrgan": 6.5, "bsrgan_plus": 14.5}
REACH = {"realesrgan": 25.0, "stablesr": 22.0, "ccsr": 12.0, "bsrgan": 5.0, "bsrgan_plus": 10.0}


def timed(function: Callable[[], object]) -> float:
    """CPU milliseconds of one call."""
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


def yardstick(encoded: np.ndarray) -> np.ndarray:
    return cv2.resize(cv2.imdecode(encoded, cv2.IMREAD_COLOR), (128, 128), interpolation=cv2.INTER_AREA)


def measure(name: str, photos: list[np.ndarray], draws: int) -> tuple[np.ndarray, np.ndarray]:
    """(draws,) ms of the preset and of the yardstick, one after the other on the same photo."""
    config = load_preset(name)
    encoded = [cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1] for photo in photos]
    for k in range(30):
        degrade(photos[k % len(photos)], config, rng_for(0, name, "warm-up", k))
    rows = []
    for k in range(draws):
        photo, rng = photos[k % len(photos)], rng_for(0, name, k)
        ours = timed(lambda photo=photo, rng=rng: degrade(photo, config, rng))
        rows.append((ours, timed(lambda k=k: yardstick(encoded[k % len(photos)]))))
    return np.array(rows).T


def loop(name: str, seconds: float, start: float) -> float:
    """Images per second of one process that degrades from `start` (wall clock) for `seconds`."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    photo, config, count = patch("motorcycle"), load_preset(name), 0
    for k in range(20):
        degrade(photo, config, rng_for(1, k))
    while time.time() < start:
        time.sleep(0.01)
    while time.time() < start + seconds:
        degrade(photo, config, rng_for(1, count))
        count += 1
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=350)
    parser.add_argument("--pair", action="store_true", help="also: two processes against one")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    photos = [patch(name) for name in PHOTOS]
    results = {name: measure(name, photos, arguments.draws) for name in PRESETS}
    unit = np.mean([row[1].mean() for row in results.values()])
    print(f"* command: `python benchmarks/degradation_speed.py {' '.join(sys.argv[1:])}`".rstrip())
    print(f"* date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    versions = f"OpenCV {cv2.__version__}, PyTorch {torch.__version__}, NumPy {np.__version__}"
    print(f"* machine: {_cpu()}, one thread; {versions}")
    print(f"* {len(photos)} photos, {arguments.draws} draws per preset; yardstick {unit:.2f} ms over the whole run\n")
    print("| preset | mean ms | median ms | its yardstick ms | multiple (mean) | required | reach |")
    print("|---" * 7 + "|")
    for name, (ours, stick) in results.items():
        times = f"{ours.mean():.1f} | {np.median(ours):.1f} | {stick.mean():.2f} | {ours.mean() / stick.mean():.1f}"
        print(f"| {name} | {times} | {REQUIRED.get(name, '')} | {REACH.get(name, '')} |")
    if arguments.pair:
        with ProcessPoolExecutor(2) as pool:
            start = time.time() + 8
            one = pool.submit(loop, "ccsr", 8, start).result()
            start = time.time() + 8
            two = sum(future.result() for future in [pool.submit(loop, "ccsr", 8, start) for _ in range(2)])
        print(f"\nccsr, images per second: one process {one:.1f}, two processes {two:.1f} ({two / one:.2f} times)")


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
