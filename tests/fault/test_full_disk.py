"""A full disk: three lines and exit code 5, nothing half-written counts, and with more space the job goes on."""

import subprocess
from pathlib import Path

import pytest
from shard_jobs import NUM_SHARDS, ShardJob, num_records, require_undisturbed, tmpfs

from infra import StorageError
from infra.manifest import committed_records
from infra.publish import staging
from infra.storage import sha256_file


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    try:
        with tmpfs(folder, "4m"):
            yield folder
    except PermissionError as error:
        pytest.skip(f"mounting a small file system takes root: {error}")


def test_a_full_disk_stops_the_job_and_more_space_finishes_it(
    photos: Path, whole: str, address: str, small_disk: Path
) -> None:
    output = str(small_disk / "out")
    code, printed = ShardJob(photos, output, address).run()
    assert code == 5, printed
    what, where, todo = printed[printed.index("error: ") :].splitlines()[:3]
    assert "No space left on device" in what
    assert where.strip().startswith(f"where: {output}/")
    assert todo.strip().startswith("to do: ")
    assert "Traceback" not in printed
    assert 0 < num_records(output) < NUM_SHARDS
    for record in committed_records(output).values():
        assert sha256_file(Path(output, record.shard)) == record.sha256
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    code, printed = ShardJob(photos, output, address).run()
    assert code == 0, printed
    require_undisturbed(output, whole)


def test_a_full_temporary_folder_is_named(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with (
        pytest.raises(StorageError, match="No space left on device") as caught,
        staging("s3://bucket/shards/000000.tar") as path,
    ):
        path.write_bytes(bytes(5 << 20))
    assert caught.value.where == str(small_disk)
    assert not list(small_disk.iterdir())
