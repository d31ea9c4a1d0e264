"""kill -9 in the middle of a job: the same command finishes it, and the result is the undisturbed one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from infra.config import load_config
from infra.images import encode_png
from infra.manifest import Manifest, write_manifest
from pipelines.config import ShardConfig
from pipelines.plan import plan_shards
from pipelines.shard import resolve_degradation, write_shard
from pipelines.sources import list_sources
from pipelines.verify import verify

CCSR = str(Path(sys.executable).with_name("ccsr"))


def test_sharding_survives_kill_9_of_its_driver(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        (source / f"photo{number:02d}.png").write_bytes(encode_png(pixels))
    values = {
        "job": "shard",
        "output": str(tmp_path / "killed"),
        "sources": [{"kind": "folder", "name": "set", "path": str(source)}],
        "degradation": "realesrgan",
        "draws": 2,
        "samples_per_shard": 2,
        "runtime": {"num_workers": 1, "ray": {"num_cpus": 1}},
    }
    path = tmp_path / "shard.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [CCSR, "shard", "-c", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    records = tmp_path / "killed" / "records"
    deadline = time.monotonic() + 300
    while driver.poll() is None and time.monotonic() < deadline:
        if records.is_dir() and len(list(records.glob("*.json"))) >= 3:
            break
        time.sleep(0.02)
    assert driver.poll() is None, "the job ended before it could be killed"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    finished = verify(str(tmp_path / "killed"))

    config = load_config(path, ShardConfig, [f"output={tmp_path}/whole"])
    shards = plan_shards(list_sources(config.sources), config)
    assert len(shards) == 24
    for shard in shards:
        write_shard(config, resolve_degradation(config), shard)
    whole: Manifest = write_manifest(config.output, len(shards), scale=4, has_lr=True)
    assert finished.dataset_id == whole.dataset_id
    assert finished.entries == whole.entries
