"""`ccsr shard` in separate processes, to be disturbed; and what must hold afterwards."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from infra.files.publish import download
from infra.files.storage import join, list_files, read_bytes
from infra.imaging.images import encode_png
from infra.shards.shard import read_index
from pipelines.sets.clean import clean
from pipelines.sets.verify import verify

CCSR = str(Path(sys.executable).with_name("ccsr"))
NUM_PHOTOS, DRAWS, PER_SHARD = 24, 2, 2
NUM_SHARDS = NUM_PHOTOS * DRAWS // PER_SHARD
KEYS = [f"set-photo{number:02d}-000-{draw}" for number in range(NUM_PHOTOS) for draw in range(DRAWS)]
PATIENCE_SECONDS = 600


def save_photos(folder: Path) -> None:
    folder.mkdir()
    for number in range(NUM_PHOTOS):
        pixels = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        (folder / f"photo{number:02d}.png").write_bytes(encode_png(pixels))


@dataclass
class ShardJob:
    """One `ccsr shard` into `output`, on the Ray at `address` or a new one; `environment` is added to its.

    `source` is where its photographs are to be read instead of `photos`, by a source of `kind`; `inside` goes before
    the command.
    """

    photos: Path
    output: str
    address: str | None = None
    num_actors: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    source: str | None = None
    kind: str = "folder"
    inside: Sequence[str] = ()

    def start(self) -> subprocess.Popen[str]:
        values = {
            "job": "shard",
            "output": self.output,
            "sources": [{"kind": self.kind, "name": "set", "path": self.source or str(self.photos)}],
            "degradation": "realesrgan",
            "draws": DRAWS,
            "samples_per_shard": PER_SHARD,
            "runtime": {
                "num_actors": self.num_actors,
                "ray": {"address": self.address} if self.address else {"num_cpus": 1},
            },
        }
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=self.photos.parent, delete=False) as file:
            yaml.safe_dump(values, file)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        # The output goes to a file: Ray's processes would hold a pipe open after their driver was killed.
        with open(f"{file.name}.log", "w") as log:
            return subprocess.Popen(
                [*self.inside, CCSR, "shard", "-c", file.name], env=environment, stdout=log, stderr=log, text=True
            )

    def run(self) -> tuple[int, str]:
        """Run to the end; exit code and what was printed."""
        return wait(self.start())


def wait(job: subprocess.Popen[str]) -> tuple[int, str]:
    code = job.wait(timeout=PATIENCE_SECONDS)
    return code, Path(f"{job.args[-1]}.log").read_text()  # type: ignore[index]


def wait_until(job: subprocess.Popen[str], reached: Callable[[], Any]) -> Any:
    """What `reached` returned once that was true. Fails if the job ends before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.poll() is None and time.monotonic() < deadline:
        if found := reached():
            return found
        time.sleep(0.005)
    raise AssertionError("the job ended before it could be disturbed:\n" + wait(job)[1])


def num_records(output: str) -> int:
    return sum(place.endswith(".json") for place in list_files(join(output, "records")))


def writing_workers() -> list[psutil.Process]:
    """The Ray workers below this process that are inside a task of `ccsr shard`, in order of their start."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "Map(work)" in " ".join(process.cmdline()):
                found.append((process.create_time(), process.pid, process))
    return [process for _, _, process in sorted(found)]


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[None]:
    """A file system of `size` at `folder`. PermissionError where mounting is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        raise PermissionError(mounted.stderr.decode().strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def require_undisturbed(output: str, whole: str) -> None:
    """The set at `output` has the manifest, the samples and the objects of the one at `whole`, and `--clean` names and
    removes whatever killed writers left."""
    strays = clean(output)
    assert [stray.name for stray in strays if not stray.removed] == []
    names = [[place.removeprefix(uri) for place in list_files(uri)] for uri in (output, whole)]
    assert names[0] == names[1]
    hashes = [hashlib.sha256(read_bytes(join(uri, "manifest.json"))).hexdigest() for uri in (output, whole)]
    assert hashes[0] == hashes[1], differing(output, whole)
    manifest = verify(output)
    with tempfile.TemporaryDirectory() as folder:
        tars = [download(join(output, shard["shard"]), Path(folder)) for shard in manifest.facts["shards"]]
        assert [entry.key for tar in tars for entry in read_index(tar, "")] == KEYS


def differing(output: str, whole: str) -> list[str]:
    facts = [json.loads(read_bytes(join(uri, "manifest.json"))) for uri in (output, whole)]
    return [name for name in facts[0].keys() | facts[1].keys() if facts[0].get(name) != facts[1].get(name)]
