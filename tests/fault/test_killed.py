"""kill -9 of a job's workers or driver: the set that is made in the end is the undisturbed one."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from shard_jobs import KEYS, NUM_SHARDS, ShardJob, num_records, require_undisturbed, wait, wait_until, writing_workers

from pipelines.sets.clean import clean
from pipelines.sets.verify import verify


@pytest.mark.parametrize("num_kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_the_job_survives_kill_9_of_its_workers(
    num_kills: int, photos: Path, whole: str, address: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    job = ShardJob(photos, output, address, num_actors=2).start()
    rng = np.random.default_rng(num_kills)
    # Seeded numbers of finished shards, and a wait that ends anywhere within the making of the next ones.
    moments = np.sort(rng.integers(0, NUM_SHARDS - 4, num_kills))
    for moment, pause in zip(moments, rng.uniform(0, 0.2, num_kills), strict=True):
        wait_until(job, lambda: num_records(output) >= moment)  # noqa: B023
        time.sleep(pause)
        worker = wait_until(job, writing_workers)[0]
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(60)
    code, printed = wait(job)
    assert code == 0, printed
    require_undisturbed(output, whole)


# Numbers of records at the kill: at the start, between shards, with all of them but without a manifest.
@pytest.mark.parametrize(
    "moment", [9, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 2, 17, NUM_SHARDS))]
)
def test_the_same_command_finishes_after_kill_9_of_the_driver(
    moment: int, photos: Path, whole: str, address: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    job = ShardJob(photos, output, None if moment == 17 else address).start()  # one whose Ray dies with it
    wait_until(job, lambda: (tmp_path / "out" / "run.json").exists() and num_records(output) >= moment)
    if moment < NUM_SHARDS:
        time.sleep(np.random.default_rng(moment).uniform(0, 0.2))
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "out" / "manifest.json").exists(), "killed too late"
    code, printed = ShardJob(photos, output, address).run()
    assert code == 0, printed
    require_undisturbed(output, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "webdataset"])
def test_lists_and_foreign_tars_are_sharded_exactly_once_too(
    kind: str, photos: Path, whole: str, address: str, tmp_path: Path
) -> None:
    files = sorted(photos.iterdir())
    if kind == "list":
        source = photos.with_suffix(".txt")
        source.write_text("".join(f"{file}\n" for file in files))
    else:
        source = tmp_path / "tars"
        source.mkdir()
        for number in range(2):
            with webdataset.TarWriter(str(source / f"{number}.tar"), encoder=False) as writer:
                for file in files[12 * number : 12 * number + 12]:
                    writer.write({"__key__": file.stem, "png": file.read_bytes()})
    output = str(tmp_path / "out")
    again = ShardJob(photos, output, address, num_actors=2, source=str(source), kind=kind)
    job = again.start()
    wait_until(job, lambda: num_records(output) >= 3)
    os.kill(wait_until(job, writing_workers)[0].pid, signal.SIGKILL)
    wait_until(job, lambda: num_records(output) >= 9)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "out" / "manifest.json").exists(), "killed too late"
    code, printed = again.run()
    assert code == 0, printed
    assert all(stray.removed for stray in clean(output))
    made, undisturbed = verify(output), verify(whole)
    assert [entry.key for entry in made.entries] == KEYS
    assert made.index["source_hash"] == undisturbed.index["source_hash"]
    assert made.index["phash"] == undisturbed.index["phash"]
