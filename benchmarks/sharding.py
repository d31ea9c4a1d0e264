"""What `ccsr shard` costs beside a bare loop over the same images, and its workers' memory, as Markdown.

python benchmarks/sharding.py [--images 160] [--rounds 3] [--photos FOLDER --s3 URI]

The loops are separate processes and are timed in turn with the jobs, which run on a Ray that is up. A job counts
from its first committed shards to its last; what comes before and after is reported apart. `--photos` instead shards
a folder of photographs, to disk and to S3, which must make one and the same set.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

# tests/ is not installed; its photographs serve here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import psutil
import ray

from infra.imaging.images import decode_image, encode_png, list_images
from infra.process.ray_runtime import RayConfig, ray_cluster
from infra.seeding import rng_for
from pipelines.sets.verify import verify
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import run_shard
from tests.golden.wheel_photos import PHOTOS

CCSR = str(Path(sys.executable).with_name("ccsr"))
WIDTH, HEIGHT = 2040, 1356  # of most of DIV2K
PER_SHARD = 8
LOAD = os.getloadavg()[0]
CROPS: dict[str, dict[str, Any]] = {
    "centre crop 512": {"kind": "center", "size_px": 512},
    "whole": {"kind": "whole"},
}


def save_photos(folder: Path, num_images: int) -> None:
    """2K photographs: those of two wheels enlarged, other ones by shift and mirror, with a camera's noise."""
    folder.mkdir()
    pictures = []
    for package, path in PHOTOS.values():
        picture = cv2.imread(str(Path(str(files(package))) / path))[..., ::-1]
        scale = 1.1 * max(WIDTH / picture.shape[1], HEIGHT / picture.shape[0])
        pictures.append(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))
    for number in range(num_images):
        rng = rng_for(0, "photo", number)
        picture = pictures[number % len(pictures)]
        y, x = (int(rng.integers(side - size)) for side, size in zip(picture.shape, (HEIGHT, WIDTH), strict=False))
        window = picture[y : y + HEIGHT, x : x + WIDTH][:, :: rng.choice([-1, 1])]
        noisy = window + rng.normal(0, 1.5, window.shape)
        (folder / f"{number:04d}.png").write_bytes(encode_png(np.clip(noisy, 0, 255).astype(np.uint8)))


def shard_values(photos: Path, output: str, crop: str, num_actors: int = 1) -> dict[str, Any]:
    return {
        "job": "shard",
        "output": output,
        "sources": [{"kind": "folder", "name": "set", "path": str(photos)}],
        "crop": CROPS[crop],
        "degradation": "ccsr",
        "samples_per_shard": PER_SHARD,
        "runtime": {"num_actors": num_actors, "ray": {"address": ray.get_runtime_context().gcs_address}},
    }


def loop(values: dict[str, Any], tar_folder: str | None, part: int, num_parts: int) -> None:
    """Make every sample of a part in this process, into memory or by webdataset's writer; print CPU and wall seconds.

    Decode, crop, degrade, encode, hash (source and members): no index, no perceptual hash, no commit.
    """
    import hashlib

    import torch
    import webdataset

    from degradation import degrade
    from pipelines.sharding.job import resolve_degradation
    from pipelines.sharding.plan import plan_shards
    from pipelines.sharding.sample import crop_image
    from pipelines.sharding.sources import list_sources

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    config = ShardConfig.model_validate(values)
    recipe = resolve_degradation(config)
    samples = [sample for shard in plan_shards(list_sources(config.sources), config) for sample in shard.samples]
    writer = tar_folder and webdataset.ShardWriter(f"{tar_folder}/%06d.tar", maxcount=PER_SHARD, verbose=0)
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, wall = time.process_time(), time.perf_counter()
    for sample in samples[part::num_parts]:
        data = Path(sample.file.uri).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        hr, crop = crop_image(decode_image(data, where=sample.key), sample, config, scale=recipe.scale)
        pair = degrade(hr, recipe, rng_for(config.seed, sample.key, "degradation"))
        facts = {"key": sample.key, "source_sha256": digest, "crop": crop, "degradation": pair.trace}
        members = {"hr.png": encode_png(pair.hr), "lr.png": encode_png(pair.lr), "json": json.dumps(facts).encode()}
        if writer:
            writer.write({"__key__": sample.key, **members})
        else:
            hashlib.sha256(b"".join(members.values())).hexdigest()
    if writer:
        writer.close()
    print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]), flush=True)


def run_loops(values: dict[str, Any], num_loops: int = 1, *, tars: bool = False) -> tuple[float, float]:
    """(CPU seconds of all, wall seconds of the slowest) of loops begun together, each over its part of the images."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--loop", json.dumps(values), "--tars", folder if tars else ""]
        loops = [
            subprocess.Popen(
                [*command, "--part", f"{part}/{num_loops}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for part in range(num_loops)
        ]
        for process in loops:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in loops:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [json.loads(process.communicate()[0]) for process in loops]
    return sum(cpu for cpu, _ in found), max(wall for _, wall in found)


@dataclass
class Watched:
    """One job: CPU seconds by kind of process and wall seconds, while it wrote (between its first and last shard) and
    in the rest; worker memory in MiB over time."""

    num_images: int = 0
    wall: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    rest_wall: float = 0.0
    rest_cpu: float = 0.0
    memory: list[float] = field(default_factory=list)

    @property
    def cpu_per_image(self) -> float:
        return sum(self.cpu.values()) / self.num_images

    @property
    def wall_per_image(self) -> float:
        return self.wall / self.num_images


def kind_of(process: psutil.Process, driver: int) -> str:
    title = " ".join(process.cmdline())
    return "driver" if process.pid == driver else "workers" if title.startswith("ray::Map(work)") else "ray"


def run_job(values: dict[str, Any]) -> Watched:
    """Run `ccsr shard`, and look at its processes ten times a second."""
    result, output = Watched(), Path(values["output"])
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(values, file)
        file.flush()
        began = time.time()
        job = psutil.Popen([CCSR, "shard", "-c", file.name], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        cpu: dict[tuple[int, float], tuple[str, float]] = {}
        seen: dict[int, dict[str, float]] = {}
        before_all = sum(seconds for _, seconds in look(cpu, job.pid, []))
        while job.poll() is None:
            totals: dict[str, float] = defaultdict(float)
            for kind, seconds in look(cpu, job.pid, result.memory):
                totals[kind] += seconds
            seen.setdefault(len(list(output.glob("records/*.json"))), totals)
            time.sleep(0.1)
        assert job.returncode == 0, "the job failed"
        ended = time.time()
    times = sorted((path.stat().st_mtime, path) for path in output.glob("records/*.json"))
    first = 2 * values["runtime"]["num_actors"]  # by then every worker is at work
    counts = [len(json.loads(path.read_bytes())["entries"]) for _, path in times]
    start, end = seen[min(n for n in seen if n >= first)], seen[len(times)]
    result.num_images = sum(counts[first:])
    result.wall = times[-1][0] - times[first - 1][0]
    result.cpu = {kind: end[kind] - start.get(kind, 0.0) for kind in end}
    result.rest_wall = ended - began - result.wall
    result.rest_cpu = sum(totals.values()) - before_all - sum(result.cpu.values())
    return result


def look(cpu: dict[tuple[int, float], tuple[str, float]], driver: int, memory: list[float]) -> list[tuple[str, float]]:
    """(kind, CPU seconds) of each process of the job, Ray's too, also of those that have ended; `cpu` remembers."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            kind, times, key = kind_of(process, driver), process.cpu_times(), (process.pid, process.create_time())
            cpu[key] = "workers" if "workers" in (kind, cpu.get(key, ("",))[0]) else kind, times.user + times.system
            if kind == "workers":
                memory.append(process.memory_info().rss / 2**20)
    return list(cpu.values())


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def cost_rows(photos: Path, scratch: Path, rounds: int) -> list[str]:
    """CPU and wall of one worker against one loop, rates of two workers against two loops, pair by pair."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        values = [shard_values(photos, str(scratch / f"cost{number}-{n}"), "centre crop 512", n) for n in (1, 2)]
        num_images = len(list(photos.iterdir()))
        bare_cpu = run_loops(values[0])[0] / num_images
        job = run_job(values[0])
        tar_wall = run_loops(values[0], tars=True)[1] / num_images
        found["CPU of all job processes / CPU of the bare loop (at most 1.176)"].append(job.cpu_per_image / bare_cpu)
        found["wall of one worker / wall of a ShardWriter loop (at most 1.1)"].append(job.wall_per_image / tar_wall)
        two_loops = run_loops(values[0], 2)[1] / num_images
        two_workers = run_job(values[1])
        found["images/s of two workers / of two bare loops (at least 0.9)"].append(
            two_loops / two_workers.wall_per_image
        )
        found["bare loop, CPU ms per image"].append(bare_cpu * 1e3)
        found["ShardWriter loop, wall ms per image"].append(tar_wall * 1e3)
        for kind in ("workers", "driver", "ray"):
            found[f"job, CPU ms per image: {kind}"].append(job.cpu[kind] / job.num_images * 1e3)
        found["apart: start-up and end, CPU s"].append(job.rest_cpu)
        found["apart: start-up and end, wall s"].append(job.rest_wall)
        print(*(f"{name}: {values[-1]:.3f}" for name, values in found.items()), sep="\n", flush=True)
    return [f"| {name} | {median(values)} |" for name, values in found.items()]


def memory_rows(photos: Path, scratch: Path) -> list[str]:
    """Resident memory of the worker on whole 2K images, sampled over its life."""
    memory = np.array(run_job(shard_values(photos, str(scratch / "memory"), "whole")).memory)
    second, last = (np.array_split(memory, 4)[quarter].mean() for quarter in (1, 3))
    return [
        f"| largest (required: under 1024) | {memory.max():.0f} |",
        f"| mean of the second quarter of its time | {second:.0f} |",
        f"| mean of the last quarter | {last:.0f} ({100 * (last / second - 1):+.1f} %) |",
    ]


def photo_rows(photos: Path, s3: str, scratch: Path) -> list[str]:
    """Shard a folder of photographs to disk and to S3: what the two sets are."""
    rows = []
    for name, output in (("disk", str(scratch / "photos")), ("S3", s3)):
        values = {**shard_values(photos, output, "centre crop 512", 2), "degradation": "realesrgan"}
        began = time.perf_counter()
        run_shard(ShardConfig.model_validate(values))
        seconds = time.perf_counter() - began
        facts = verify(output).facts
        counts = [facts[key] for key in ("num_samples", "num_bytes", "dataset_id")]
        rows.append(f"| {name} | {' | '.join(map(str, counts))} | {len(facts['quarantined'])} | {seconds:.0f} |")
    return rows


def card() -> list[str]:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    libraries = ("ray", "webdataset", "opencv-python-headless", "pillow", "numpy")
    return [
        f"* command: `python {' '.join(sys.argv)}`",
        f"* date: {date.today()}; load of the machine before and at the end: {LOAD:.1f}, {os.getloadavg()[0]:.1f}",
        f"* machine: {model.partition(': ')[2]}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in libraries),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--s3", help="with --photos: an empty place on S3")
    parser.add_argument("--out", type=Path, help="default: sharding.md, with --photos sharding_photos.md")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--tars", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        part, num_parts = map(int, options.part.split("/"))
        loop(json.loads(options.loop), options.tars, part, num_parts)
        return
    if not options.photos and options.images < 6 * PER_SHARD:  # two workers' first two shards each are not counted
        parser.error(f"--images must be at least {6 * PER_SHARD}")
    cv2.setNumThreads(1)
    with ray_cluster(RayConfig(num_cpus=2)), tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.photos:
            title = f"{len(list_images(str(options.photos)))} photographs, centre crop 512, `realesrgan`, two workers"
            header = "| to | samples | bytes | dataset id | quarantined | seconds |"
            tables = {title: [header, *photo_rows(options.photos, options.s3, scratch)]}
        else:
            photos = scratch / "sources"
            save_photos(photos, options.images)
            of = f"{options.images} PNGs of {WIDTH} x {HEIGHT} px, {PER_SHARD} a shard, `ccsr`"
            tables = {
                f"Cost: {of}, centre crop 512": ["| | median (rounds) |", *cost_rows(photos, scratch, options.rounds)],
                f"Memory of a worker: {of}, whole images": ["| resident | MiB |", *memory_rows(photos, scratch)],
            }
    lines = ["# Sharding" + (": photographs" if options.photos else ""), "", *card()]
    for title, (header, *rows) in tables.items():
        lines += ["", f"## {title}", "", header, "|---" * (header.count("|") - 1) + "|", *rows]
    print("\n".join(lines))
    name = "sharding_photos.md" if options.photos else "sharding.md"
    (options.out or Path(__file__).with_name(name)).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
